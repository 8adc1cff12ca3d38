"""The console to which all commands print. `output` handles errors while the output is written, such as a closed pipe."""

import codecs
import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from tadistill.text import visible

MINUTE = 60.0
"""Smallest number of seconds between two lines about the progress of the same work, if the output is not a terminal."""
BROKEN_PIPE = 141
"""Exit code of a command whose output nobody reads any more. Shells use the same code (128 + SIGPIPE)."""
_PLAIN = {"–": "-", "−": "-", "…": ".", "×": "x"}
_for_events: list[TextIO] = []
"""The stream for events, if stdout is kept for them."""
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


Detail = Literal["problems", "progress", "everything"]
"""The amount of text that a command prints while it works: `problems` with `--quiet`, `everything` with `--verbose`, else `progress`.

The result of the command is always printed.
"""


class Terminal(Console):
    """A rich console that prints control characters as visible escapes, so that only rich itself moves the cursor.

    With `events` (`--log json`), stdout gets one JSON object for each event, and all other text goes to stderr.
    docs/concepts/interruptions.md describes the events.
    """

    def __init__(self, *, detail: Detail = "progress", events: bool = False, **given: Any):
        super().__init__(emoji=False, **{**given, "stderr": True} if events else given)
        self.detail, self.events = detail, events

    def keep_stdout(self) -> None:
        """Keep stdout for the events. All other text that this process and its later children write to stdout goes to stderr, for instance
        what the user's own code prints."""
        try:
            number, there = sys.stdout.fileno(), sys.stderr.fileno()
        except (OSError, ValueError):  # not files, so no other process writes to them
            return
        sys.stdout.flush()
        _for_events.append(open(os.dup(number), "w", encoding="utf-8"))  # noqa: SIM115  it stays open until the process ends
        os.dup2(there, number)

    def event(self, name: str, **facts: Any) -> None:
        """Write an event as one line of JSON. Without `--log json`, nothing is written."""
        if self.events:
            stream = _for_events[-1] if _for_events else sys.stdout
            stream.write(json.dumps({"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}) + "\n")
            stream.flush()

    def note(self, text: str, *, problem: bool = False) -> None:
        """Print a sentence. With `--quiet`, only problems are printed. With `--log json`, the sentence is an event `note`."""
        if self.events:
            self.event("note", text=text)
        elif problem or self.detail != "problems":
            self.say(text)

    def say(self, text: str, *, style: str = "") -> None:
        """Print a sentence as it is: square brackets are no markup, and no line is broken."""
        self.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show a spinner with a text while the `with` block runs. If the output is not a terminal, print the text at once, and then how far
        the work is once a minute.

        The block gets a function that shows how far the work is, behind the text.
        """
        if self.events or self.detail == "problems":
            yield lambda progress: None
        elif not self.is_interactive:
            self.note(f"{text} …")
            said = time.monotonic()

            def show(progress: str) -> None:
                nonlocal said
                if time.monotonic() - said >= MINUTE:
                    said = time.monotonic()
                    self.note(f"{text}: {progress}")

            yield show
        else:
            with self.status(Text(text)) as shown:
                yield lambda progress: shown.update(Text(f"{text}: {progress}"))

    def render(self, *given: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*given, **options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """End the program without a message, because nobody reads the output any more."""
        _silence()
        raise SystemExit(BROKEN_PIPE)


@contextmanager
def output() -> Iterator[None]:
    """Handle errors of stdout and stderr inside the `with` block, which contains the whole command.

    Characters that the output's encoding lacks are printed as escapes. The command ends if its output cannot be written. If the reader has
    closed the pipe (`| head`), the command ends without a message and with exit code 141. On a full disk, it ends with one sentence and
    exit code 1.
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
        if error.filename is not None or error.errno not in _UNWRITABLE:  # not stdout or stderr, whose errors have no file name
            raise
        _silence()
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: the output cannot be written ({error.strerror}); free some space, or write it elsewhere\n")
            sys.stderr.flush()
        sys.exit(1)


def _silence() -> None:
    for stream in (sys.stdout, *_for_events):
        with contextlib.suppress(OSError, ValueError):  # the output is closed, or is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (plain := _PLAIN.get(error.object[error.start])):
        return plain, error.start + 1
    return codecs.backslashreplace_errors(error)
