"""Command line shared by the benchmarks that write a page: measure, show, and store the rows and the page."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with `--json`, `--markdown` and `--quick`; `quick` says what that option makes small."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, help="write the rows there")
    found.add_argument("--markdown", type=Path, help="write the page there")
    found.add_argument("--quick", action="store_true", help=f"{quick}: says that it runs, not what it finds")
    return found


def write(options: argparse.Namespace, command: str, result: Mapping[str, Any], markdown: Callable[[Any, str], str]) -> None:
    """Print the page that `markdown` makes from the result and the whole command, and write the files that the options name."""
    command += "".join(f" --{name} {path}" for name, path in (("json", options.json), ("markdown", options.markdown)) if path)
    text = markdown(result, command)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
