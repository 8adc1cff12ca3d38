"""A blind sheet for people: the same prompts, the arms' answers under letters in random order, the key in a file of its own."""

import csv
import hashlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tadistill.disk import read_json, write_json, write_text
from tadistill.errors import ConfigError
from tadistill.judge.answers import Answers

SCALE = (1, 5)
COLUMNS = ("sheet", "item", "letter", "instruction", "input", "answer", "rating")


@dataclass(frozen=True)
class Sheet:
    """`shown` is what raters see; `key` says which arm a letter stands for. The two share the sheet's id and the items' ids only."""

    identity: str
    shown: list[dict[str, Any]]
    key: dict[str, Any]


def make_sheet(answers: Answers, *, name: str, with_reference: bool, seed: int) -> Sheet:
    """Shuffles the prompts, and the answers of every prompt anew.

    Raises:
        ConfigError: fewer than two answers to compare, or more than there are letters.
    """
    arms = [arm for arm in next(iter(answers.items)).answers if arm in answers.arms or with_reference]
    if not 2 <= len(arms) <= len(ascii_uppercase):
        raise ConfigError(f"a sheet shows 2 to {len(ascii_uppercase)} answers to a prompt, not {len(arms)}: choose other arms")
    rng = random.Random(seed)
    items = rng.sample(answers.items, len(answers.items))
    shown, key = [], {}
    for number, item in enumerate(items, start=1):
        order = dict(zip(ascii_uppercase, rng.sample(arms, len(arms)), strict=False))
        answered = [{"letter": letter, "text": item.answers[arm][0]} for letter, arm in order.items()]
        shown.append({"item": f"p{number:03d}", "instruction": item.instruction, "input": item.input, "answers": answered})
        key[f"p{number:03d}"] = {"set": item.set, "index": item.index, "letters": order}
    content = {"study": answers.plan.study, "name": name, "training_seed": answers.seeds[0], "seed": seed, "scale": SCALE, "items": key}
    identity = hashlib.sha256(json.dumps([content, shown], sort_keys=True).encode()).hexdigest()[:12]
    return Sheet(identity, shown, {"sheet": identity} | content)


def write_sheet(directory: Path, sheet: Sheet, *, name: str) -> Path:
    """Writes sheet-NAME.html, sheet-NAME.csv and sheet-NAME.key.json; returns the page's path.

    Raises:
        ConfigError: another sheet has this name already. Raters may be filling it in, so it is left alone.
    """
    key_path = directory / f"sheet-{name}.key.json"
    if key_path.is_file() and read_json(key_path).get("sheet") != sheet.identity:
        raise ConfigError(f"{key_path} belongs to another sheet, which raters may hold: choose another --name, or delete it")
    table = directory / f"sheet-{name}.csv"
    if table.is_file() and table.read_text(encoding="utf-8", errors="replace") != _table(sheet):
        raise ConfigError(f"{table} has been filled in: move it elsewhere and read it back, choose another --name, or delete it")
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / f"sheet-{name}.html"
    write_json(key_path, sheet.key)
    write_text(page, render_sheet(sheet))
    write_text(table, _table(sheet))
    return page


def render_sheet(sheet: Sheet) -> str:
    """The page: one file with its script, style and data, which asks the network for nothing."""
    environment = Environment(loader=PackageLoader("tadistill.judge"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    data = {"sheet": sheet.identity, "scale": SCALE, "items": sheet.shown}
    embedded = Markup(json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"))
    return environment.get_template("sheet.html.j2").render(data=embedded, count=len(sheet.shown), low=SCALE[0], high=SCALE[1])


def _table(sheet: Sheet) -> str:
    """The sheet for a spreadsheet; the column `rating` is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in sheet.shown:
        for answer in item["answers"]:
            cells = (item["instruction"], item["input"], answer["text"])
            writer.writerow([sheet.identity, item["item"], answer["letter"], *map(_harmless, cells), ""])
    return text.getvalue()


def _harmless(cell: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; an apostrophe makes it text."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
