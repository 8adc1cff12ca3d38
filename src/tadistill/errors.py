"""The exception tree. A user's mistake ends as one sentence (value, rule, fix) and exit code 2, never as a traceback.

Each class also inherits the standard error it refines, so that library users can catch either.
"""


class TadistillError(Exception):
    """Root of every error that tadistill raises on purpose."""


class ConfigError(TadistillError, ValueError):
    """A recipe, an override or an argument breaks a rule. Says the value, the rule and the fix."""


class DataError(TadistillError, ValueError):
    """A data set is missing, empty, or lacks a column that the recipe needs."""


class ModelError(TadistillError, ValueError):
    """A model or tokenizer cannot be found, loaded or combined with the others."""


class StoreError(TadistillError, OSError):
    """The store cannot be read or written, or an artifact in it is damaged."""


class StageFailed(TadistillError, RuntimeError):
    """A stage stopped before it was finished (for instance on a loss that is not finite)."""


class Interrupted(Exception):
    """The run was asked to stop; the state is saved and the same command goes on from it."""


class JudgeFailed(TadistillError, RuntimeError):
    """A judge's endpoint stopped answering before every question was asked. What was answered is kept."""
