"""Writes prompts.jsonl, the training questions of tinyworld-bridge.yaml.

    python recipes/bridge/write.py [TRAIN] [FILE]

Each question of recipes/takd/curves/train.jsonl is in the file eight times, with its reference answer. A teacher that writes text samples a
new answer to every row, so it can give up to eight answers to a question.
"""

import json
import sys
from pathlib import Path

TIMES = 8
HERE = Path(__file__).parent


def read(file: Path) -> list[dict]:
    """Return the rows of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def repeated(rows: list[dict]) -> list[dict]:
    """Return the rows eight times, one copy after the other, without the facts, which only test sets need."""
    return [{name: row[name] for name in ("instruction", "output")} for _ in range(TIMES) for row in rows]


if __name__ == "__main__":
    source, target = (sys.argv[1:] + [None] * 2)[:2]
    rows = repeated(read(Path(source or HERE.parent / "takd" / "curves" / "train.jsonl")))
    Path(target or HERE / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
