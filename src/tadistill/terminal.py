"""The console of the commands. It also handles an output that cannot be written."""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.segment import Segment

from tadistill.visible import visible

BROKEN_PIPE = 141
"""Exit code of a command whose output nobody reads any more. Shells use the same code (128 + SIGPIPE)."""
_PLAIN = {"–": "-", "−": "-", "…": ".", "×": "x"}
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Terminal(Console):
    """A rich console that prints control characters as visible escapes, so that only rich itself moves the cursor."""

    def render(self, *given: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*given, **options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """End the program without a message, because nobody reads the output any more."""
        _silence()
        raise SystemExit(BROKEN_PIPE)


@contextmanager
def output() -> Iterator[None]:
    """Run a command inside this block. Characters that the output's encoding lacks are printed as escapes.

    The command ends if its output cannot be written. If the reader has gone (`| head`), it ends without a message and with exit code 141.
    On a full disk it ends with one sentence and exit code 1.
    """
    codecs.register_error("tadistill", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tadistill")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:  # an output has no file name; files have their own errors
            raise
        _silence()
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: the output cannot be written ({error.strerror}); free some space, or write it elsewhere\n")
            sys.stderr.flush()
        sys.exit(1)


def _silence() -> None:
    with contextlib.suppress(OSError, ValueError):  # the output is closed, or is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (plain := _PLAIN.get(error.object[error.start])):
        return plain, error.start + 1
    return codecs.backslashreplace_errors(error)
