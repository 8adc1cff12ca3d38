"""The exceptions. A user's mistake becomes one sentence (value, rule, fix) and exit code 2, never a traceback.

Each class also inherits from a standard error, so that users of the library can catch either.
"""


class TadistillError(Exception):
    """Base class of every error that tadistill raises on purpose."""


class ConfigError(TadistillError, ValueError):
    """A recipe, an override or an argument breaks a rule. Its message gives the value, the rule and the fix."""


class DataError(TadistillError, ValueError):
    """A data set is missing, is empty, or lacks a column that the recipe needs."""


class ModelError(TadistillError, ValueError):
    """A model or tokenizer cannot be found, loaded or combined with the others."""


class StoreError(TadistillError, OSError):
    """The store cannot be read or written, or an artifact in it is damaged."""


class StageFailed(TadistillError, RuntimeError):
    """A stage stopped before it was finished (for instance on a loss that is not finite)."""


class Interrupted(Exception):
    """A stage was asked to stop. Its state is saved, and the same command resumes from it."""


class JudgeFailed(TadistillError, RuntimeError):
    """A judge's endpoint stopped answering before every question was asked. The answers so far are kept."""
