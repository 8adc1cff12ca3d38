"""The exceptions of tadistill. The command line prints their message without a traceback.

Most classes also inherit from a built-in exception such as ValueError, so callers can catch the built-in exception instead.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tadistill.text import one_line, shortened


class TadistillError(Exception):
    """Base class of every error that tadistill raises on purpose.

    Args:
        problems: one sentence per problem. Control characters and line breaks are shown as escapes. A quoted value is cut after 200
            characters.
    """

    def __init__(self, *problems: object):
        super().__init__(*(shortened(one_line(str(problem))) for problem in problems))

    @property
    def problems(self) -> tuple[str, ...]:
        """The sentences of the error, one per problem."""
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


def did_you_mean(given: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6) -> str:
    """Return the end of a sentence about a name that does not exist: the nearest known name, or `otherwise` if none is near."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)
    return f"did you mean `{close[0]}`?" if close else otherwise


def did_you_mean_then(given: str, known: Iterable[str], rest: str, *, cutoff: float = 0.6) -> str:
    """Return the end of a sentence about a name that does not exist: the nearest known name, if one is near, and then the text `rest`."""
    near = did_you_mean(given, known, "", cutoff=cutoff)
    return f"{near} {rest[0].upper()}{rest[1:]}" if near else rest


def cause(error: object) -> object:
    """Return what an error says, without the name of its file if the system raised it, such as `No space left on device`."""
    return getattr(error, "strerror", None) or error


def leads_nowhere(path: Path) -> str:
    """Return the error sentence for a link whose target does not exist. The text is empty if the path is no such link."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which does not exist; correct the link"
    return ""


def no_file(path: Path, folders: Iterable[Path], suffixes: tuple[str, ...] = ()) -> str:
    """Return the error sentence for a path that is in none of the `folders`.

    The sentence names the target of a link that leads nowhere. Otherwise it suggests a similar name from these folders, if there is one.
    It may be the name of a folder, or of a file with one of the `suffixes`.
    """
    searched = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))
    try:
        there = [folder for folder in searched if folder.is_dir()]
        if broken := next(filter(None, (leads_nowhere(folder / path.name) for folder in there)), None):
            return broken
        names = [p.name for folder in there for p in folder.iterdir() if (p.is_dir() or p.suffix in suffixes) and p.name != path.name]
    except OSError as error:  # a folder that cannot be read
        return f"its folder cannot be read ({cause(error)}); correct the path"
    if not there:
        return f"the folder {' or '.join(map(str, searched))} does not exist; correct the path"
    return f"there is no `{path.name}` in {' or '.join(map(str, there))}; {did_you_mean(path.name, names, 'correct the path')}"


class Gathering:
    """Collects the errors of several checks, so that the user sees all problems at once. For example:

    found = Gathering()
    for name in models:
        with found.about(f"models.{name}"):
            check_one(name)
    found.finish()
    """

    def __init__(self) -> None:
        self._errors: list[TadistillError] = []

    @contextmanager
    def about(self, what: str = "") -> Iterator[None]:
        """Collect an error that the block raises. `what` names the thing that the block checks, such as `models.xl`."""
        try:
            with about(what):
                yield
        except TadistillError as error:
            self._errors.append(error)

    def finish(self) -> None:
        """Raise one error with the sentences of all collected errors. Its class is the class of the first error."""
        if self._errors:
            problems = dict.fromkeys(problem for error in self._errors for problem in error.problems)
            raise type(self._errors[0])(*problems) from self._errors[0]


@contextmanager
def about(what: str) -> Iterator[None]:
    """Put `what` (such as `models.xl`) in front of the message of an error in the block.

    A message that already begins with the first part of `what` (here `models.`) is not changed.
    """
    try:
        yield
    except TadistillError as error:
        kind = what.split(".", 1)[0]
        if not what or error.problems[0].startswith(f"{kind}."):
            raise
        raise type(error)(*(f"{what}: {problem}" for problem in error.problems)) from error


class ConfigError(TadistillError, ValueError):
    """A recipe, an override or an argument breaks a rule. The error message gives the value, the rule and the fix."""


class NotHere(ConfigError):
    """A plan needs a model or a data set that is not on this disk. `tadistill plan` then shows only the other parts of the plan."""


class NotPlanned(ConfigError):
    """A study has no plan yet, because a process is just planning it."""


class DataError(TadistillError, ValueError):
    """A data set is missing or empty, or it lacks a column that the recipe needs."""


class ModelError(TadistillError, ValueError):
    """A model or tokenizer cannot be found or loaded, or it does not fit the other models of the recipe."""


WRONG_INPUT = (ConfigError, DataError, ModelError)
"""The errors of a user's input. A command that raises one of them ends with exit code 2."""


class StoreError(TadistillError, OSError):
    """The store cannot be read or written, or an artifact in it is damaged."""


class StageFailed(TadistillError, RuntimeError):
    """A stage (one step of a study, such as a training) failed, for instance because its loss was not finite."""


class ServerFailed(TadistillError, RuntimeError):
    """A server that runs a teacher does not answer, or its answers are wrong. All work that was finished before is kept."""


class Interrupted(Exception):
    """A stage (one step of a study, such as a training) was asked to stop. Its state is saved, and the same command resumes it."""


class JudgeFailed(TadistillError, RuntimeError):
    """The server of a judge (a language model that rates answers) stopped answering. The ratings so far are saved."""


# --- inputs that change --------------------------------------------------------------------------------------------------


def check_unchanged(what: Path | str, planned: str, found: str) -> None:
    """Raise StageFailed if the fingerprint `found` of an input is not the one of the plan."""
    if found != planned:
        raise StageFailed(f"{what} has changed since this stage was planned; run the same command again, which makes a new plan")


@contextmanager
def unchanged(what: Path | str, planned: str | None, found: Callable[[], str]) -> Iterator[None]:
    """Raise StageFailed if an input of a stage has changed since the plan, before or while the `with` block reads it.

    A change after that does no harm, so a long stage does not fail at its end.

    Args:
        planned: the input's fingerprint in the plan. None if there are no files that can change.
        found: returns the fingerprint now. It must not use the network, which compute nodes may lack.
    """
    if planned is None:
        yield
        return
    check_unchanged(what, planned, found())
    try:
        yield
    except Exception:  # a file that is half written cannot be read
        check_unchanged(what, planned, found())
        raise
    check_unchanged(what, planned, found())
