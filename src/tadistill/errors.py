"""The exceptions of tadistill. The command line prints their message without a traceback.

Most classes also inherit from a built-in exception such as ValueError, so callers can catch the built-in exception instead.
"""


class TadistillError(Exception):
    """Base class of every error that tadistill raises on purpose."""


class ConfigError(TadistillError, ValueError):
    """A recipe, an override or an argument breaks a rule. The error message gives the value, the rule and the fix."""


class DataError(TadistillError, ValueError):
    """A data set is missing or empty, or it lacks a column that the recipe needs."""


class ModelError(TadistillError, ValueError):
    """A model or tokenizer cannot be found or loaded, or it does not fit the other models of the recipe."""


class StoreError(TadistillError, OSError):
    """The store cannot be read or written, or an artifact in it is damaged."""


class StageFailed(TadistillError, RuntimeError):
    """A stage failed, for instance because its loss was not finite."""


class Interrupted(Exception):
    """A stage was asked to stop. Its state is saved, and the same command resumes it."""


class JudgeFailed(TadistillError, RuntimeError):
    """The endpoint of a judge stopped answering before all questions were asked. The answers so far are saved."""
