"""Read JSON Lines files. Every line contains one JSON object."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tadistill.errors import DataError

_READERS = {".csv": "read_csv", ".parquet": "read_parquet", ".xlsx": "read_excel", ".arrow": "read_feather"}
_ONE_A_LINE = "`jq -c '.[]' FILE` writes each of its objects on a line of its own"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line. Empty lines are skipped.

    Raises:
        DataError: a line is not one JSON object. The message names the file and the line.
    """
    for number, line in _lines(path):
        yield _row(line, path, number)


def count(path: Path) -> Iterator[int]:
    """Yield the line number (from 1) of each row. The rows are not parsed."""
    return (number for number, _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # Excel and PowerShell write a byte order mark
        for number, line in enumerate(lines, 1):
            line = line.removeprefix("\ufeff")  # joined files have a mark at the start of each
            if line and not line.isspace():
                yield number, line


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}, line {number}"
    if path.suffix in _READERS and not line.lstrip().startswith("{"):
        read = f"pandas.{_READERS[path.suffix]}({path.name!r}).to_json('{path.stem}.jsonl', orient='records', lines=True)"
        raise DataError(f"{path} is not a JSON Lines file; convert it, for instance in Python: {read}")
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:  # `surrogateescape` turns a byte that is not UTF-8 into a surrogate
        byte = ord(line[error.start]) & 0xFF
        raise DataError(f"{where}: byte 0x{byte:02x} at character {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is {_not_json(line, error)}; every line must be one JSON object") from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits, or thousands of nested lists
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number in it has too many digits"
        raise DataError(f"{where} cannot be read ({reason}); correct or delete the row") from error
    if not isinstance(row, dict):
        what = f"a JSON array ({_ONE_A_LINE})" if isinstance(row, list) else f"a {type(row).__name__}"
        raise DataError(f"{where} is {what}; every line must be one JSON object")
    return row


def _not_json(line: str, error: json.JSONDecodeError) -> str:
    start = line.strip()
    if start.startswith("version https://git-lfs"):
        return "part of a pointer of Git LFS (run `git lfs pull` in its folder to get the file)"
    if start[0] == "[":
        return f"the start of a JSON array ({_ONE_A_LINE})"
    if start == "{" or (start[0] == "{" and error.pos >= len(line.rstrip())):
        return "a JSON object that does not end on this line (`jq -c . FILE` writes each object on one line)"
    if start[0] != "{":
        return 'not JSON (write the row as {"instruction": "…", "output": "…"}, for instance)'
    return f"not JSON ({error.msg} at character {error.pos + 1})"
