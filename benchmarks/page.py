"""Shared parts of the benchmarks: their command line, the page that they write, its tables, and the memory of a process."""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with `--json`, `--markdown` and `--quick`; `quick` says what that option makes small."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, help="write the rows there")
    found.add_argument("--markdown", type=Path, help="write the page there")
    found.add_argument("--quick", action="store_true", help=f"{quick}: says that it runs, not what it finds")
    return found


def command(before: str = "") -> str:
    """Return the command of this process, as it is written on the page; `before` are the variables that it needs."""
    return " ".join([f"{before}python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write(options: argparse.Namespace, result: Mapping[str, Any], markdown: Callable[[Any], str]) -> None:
    """Print the page that `markdown` makes from the result, and write the files that the options name."""
    text = markdown(result)
    print(text)
    keep(options, result)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


def keep(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write the result, also an unfinished one, to the file of `--json`."""
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], left: Collection[str] | None = None) -> str:
    """Return a Markdown table whose columns `left` (default: the first column) are aligned left, and the others right."""
    ruler = ["---" if name in (columns[:1] if left is None else left) else "---:" for name in columns]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (columns, ruler, *rows))


def resident(field: str) -> int:
    """Return a number of bytes of this process, from Linux's status file: `VmRSS` now, `VmHWM` at most since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Let `VmHWM` begin again at the memory that is used now."""
    Path("/proc/self/clear_refs").write_text("5")
