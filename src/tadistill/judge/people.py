"""Ratings by people. Write a blind sheet with a study's answers, and read the sheets that raters filled in.

A sheet shows prompts, each with the answers of several arms. Raters see letters in random order instead of the arms' names. A separate key
file maps each letter to its arm. The summary has mean ratings, win rates and the raters' agreement.
"""

import csv
import hashlib
import io
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from tadistill.charts import embedded, html_templates
from tadistill.disk import read_json, write_json, write_text
from tadistill.errors import ConfigError, DataError
from tadistill.judge.questions import Answers
from tadistill.judge.scores import Row, pair_rows, rounded, with_mean
from tadistill.statistics import macro_interval
from tadistill.text import guarded

SCALE = (1, 5)
_COLUMNS = ("sheet", "item", "letter", "instruction", "input", "answer", "rating")


@dataclass(frozen=True)
class Sheet:
    """A sheet for raters who do not know the arms. Raters see only `shown`, the prompts and answers. `key` maps letters to arms."""

    identity: str
    shown: list[dict[str, Any]]
    key: dict[str, Any]


def make_sheet(answers: Answers, *, name: str, with_reference: bool, seed: int) -> Sheet:
    """Make a sheet, in which the prompts and the answers to each prompt are in random order. `with_reference` adds the reference answers.

    Raises:
        ConfigError: a prompt has fewer than 2 or more than 26 answers.
    """
    arms = [arm for arm in next(iter(answers.items)).answers if arm in answers.arms or with_reference]
    if not 2 <= len(arms) <= len(ascii_uppercase):
        raise ConfigError(
            f"a sheet shows 2 to {len(ascii_uppercase)} answers per prompt, but the number of arms is {len(arms)}; change it with --arm"
        )
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
    return Sheet(identity, shown, {"sheet": identity} | content | {"evaluations": answers.evaluations})


def write_sheet(directory: Path, sheet: Sheet, *, name: str) -> Path:
    """Write sheet-NAME.html, sheet-NAME.csv and sheet-NAME.key.json, and return the path of the page.

    Raises:
        ConfigError: there is another sheet of this name, or the CSV file has been changed. Raters may be using it, so no file is written.
    """
    key_path = directory / f"sheet-{name}.key.json"
    if key_path.is_file() and read_json(key_path).get("sheet") != sheet.identity:
        raise ConfigError(f"{key_path} belongs to another sheet, which raters may be using; choose another --name, or delete this key file")
    table = directory / f"sheet-{name}.csv"
    if table.is_file() and table.read_text(encoding="utf-8", errors="replace") != _table(sheet):
        raise ConfigError(f"{table} has been changed, perhaps by a rater; choose another --name, or move or delete this CSV file")
    page = directory / f"sheet-{name}.html"
    write_json(key_path, sheet.key)
    write_text(page, render_sheet(sheet))
    write_text(table, _table(sheet))
    return page


def render_sheet(sheet: Sheet) -> str:
    """Return the page of a sheet as HTML. The page needs no network and no other file."""
    data = {"sheet": sheet.identity, "scale": SCALE, "items": sheet.shown}
    template = html_templates("tadistill.judge").get_template("sheet.html.j2")
    return template.render(data=embedded(data), count=len(sheet.shown), low=SCALE[0], high=SCALE[1])


def _table(sheet: Sheet) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for item in sheet.shown:
        for answer in item["answers"]:
            cells = (item["instruction"], item["input"], answer["text"])
            writer.writerow([sheet.identity, item["item"], answer["letter"], *map(guarded, cells), ""])
    return text.getvalue()


# --- reading ratings back ------------------------------------------------------------------------------------------

_NEEDED = ("item", "letter", "rating")


@dataclass(frozen=True)
class Rating:
    """One rater's rating of one answer."""

    rater: str
    item: str
    letter: str
    value: int


def load_key(path: Path) -> dict[str, Any]:
    """Load the key file of a sheet, which maps the letters of the answers to arms.

    Raises:
        ConfigError: there is no such sheet.
        DataError: the file is not the key of a sheet.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; first write the sheet and its key with `tadistill human STUDY`")
    key = read_json(path)
    try:
        for item in key["items"].values():
            _ = (item["set"], dict(item["letters"]))
        low, high = key["scale"]
        _ = (key["sheet"], int(low), int(high))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not the key of a sheet ({type(error).__name__}: {error}); restore the original key file") from error
    return key


def read_ratings(paths: Sequence[Path], key: Mapping[str, Any]) -> list[Rating]:
    """Read the ratings of all files. Answers without a rating are skipped.

    The column `rater` names the rater of a row. A file without this column counts as one rater. A file that is given twice is read once.

    Raises:
        DataError: a file is not a filled-in copy of this sheet. The message names the file, the line and the problem.
    """
    ratings: dict[tuple[str, str, str], Rating] = {}
    for path, name in _raters(paths).items():
        before = len(ratings)
        for line, row in _rows(path):
            rating = _rating(f"{path}, line {line}", row, key, rater=name)
            if rating is None:
                continue
            place = (rating.rater, rating.item, rating.letter)
            if place in ratings:
                twice = f"{path}, line {line}: {rating.rater} rated answer {rating.letter} of {rating.item} twice"
                raise DataError(f"{twice}; keep one of the rows, or give the raters different names")
            ratings[place] = rating
        if len(ratings) == before:
            raise DataError(f"{path} contains no rating; fill in its column `rating`, or leave the file out")
    return list(ratings.values())


def summarise_ratings(ratings: Sequence[Rating], key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean ratings of every arm, the wins of every pair of arms, and the agreement of the raters.

    Every prompt has the same weight. For one arm, the value of a prompt is the mean rating over the raters. For a pair of arms, each rater
    votes +1, 0 or -1. The sign of the mean vote is the outcome of the prompt: a win, a tie or a loss. n is the number of prompts.
    """
    items = key["items"]
    arms = tuple(sorted({arm for item in items.values() for arm in item["letters"].values()}))
    sets = tuple(sorted({item["set"] for item in items.values()}))
    by_arm: dict[tuple[str, str], dict[str, int]] = {}  # (item, arm) -> rater -> value
    for rating in ratings:
        arm = items[rating.item]["letters"][rating.letter]
        by_arm.setdefault((rating.item, arm), {})[rating.rater] = rating.value
    rows: list[Row] = []
    for arm in arms:
        means = {
            s: [float(np.mean([*by_arm[i, arm].values()])) for i in items if items[i]["set"] == s and (i, arm) in by_arm] for s in sets
        }
        rows += _score_rows(arm, means, key["scale"])
    for arm, other in itertools.combinations(arms, 2):
        outcomes = {name: _outcomes(by_arm, [i for i in items if items[i]["set"] == name], arm, other) for name in sets}
        rows += pair_rows(arm, other, {name: np.asarray([values], float) for name, values in outcomes.items()})
    raters = sorted({rating.rater for rating in ratings})
    answers = sum(len(item["letters"]) for item in items.values())
    return {
        "arms": arms,
        "rows": rows,
        "raters": raters,
        "scale": list(key["scale"]),
        "agreement": agreement(ratings, scale=key["scale"]),
        "unparsed": 0,
        "missing": answers * len(raters) - len(ratings),
    } | ({"evaluations": key["evaluations"]} if "evaluations" in key else {})  # sheets of earlier versions do not have them


def agreement(ratings: Sequence[Rating], *, scale: Sequence[int]) -> dict[str, Any]:
    """Return the agreement of the raters: Krippendorff's alpha (ordinal), over the answers that at least two raters rated.

    In the result, `value` is None if no answer has two ratings, or if all these ratings are equal.

    Raises:
        ConfigError: the package `krippendorff` is needed but not installed.
    """
    places = list(dict.fromkeys((r.item, r.letter) for r in ratings))
    raters = list(dict.fromkeys(r.rater for r in ratings))
    table = np.full((len(raters), len(places)), np.nan)
    for r in ratings:
        table[raters.index(r.rater), places.index((r.item, r.letter))] = r.value
    shared = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    found = {"measure": "Krippendorff's alpha (ordinal)", "value": None, "raters": len(raters), "shared": int(shared.shape[1])}
    if shared.size and len(np.unique(shared[~np.isnan(shared)])) > 1:
        try:
            import krippendorff
        except ImportError as error:
            raise ConfigError(
                "the raters' agreement needs the package krippendorff; install it with `pip install 'tadistill[judge]'`"
            ) from error
        domain = list(range(int(scale[0]), int(scale[1]) + 1))
        value = krippendorff.alpha(reliability_data=shared, value_domain=domain, level_of_measurement="ordinal")
        found["value"] = round(float(value), 4)
    return found


def _raters(paths: Sequence[Path]) -> dict[Path, str]:
    # the name of a file's rater is the shortest end of its path that no other file has: `ann`, or `ann/answers` beside `bob/answers`
    files = {path.resolve(): path for path in reversed(paths)}
    ends = {path: _ends(path.absolute()) for path in reversed(files.values())}
    return {path: next(end for end in own if sum(end in other for other in ends.values()) == 1) for path, own in ends.items()}


def _ends(path: Path) -> list[str]:
    folders = ["/".join(path.parts[n:-1]) for n in range(len(path.parts) - 1, -1, -1)]
    return [str(Path(folder, name)) for folder in folders for name in (path.stem, path.name)]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give a CSV sheet that a rater filled in, or a file answers.csv") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text; save it as CSV (UTF-8)") from error
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lacking = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if lacking:
            raise DataError(f"{path} has no column {lacking[0]}; a filled-in sheet needs the columns {', '.join(_NEEDED)}")
        return [(reader.line_num, {str(k): v or "" for k, v in row.items() if k is not None}) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}); save it as CSV (UTF-8)") from error


def _rating(place: str, row: Mapping[str, str], key: Mapping[str, Any], *, rater: str) -> Rating | None:
    item, letter, text = (row[name].strip() for name in _NEEDED)
    if row.get("sheet", "").strip() not in ("", key["sheet"]):
        raise DataError(
            f"{place}: the row belongs to sheet {row['sheet'].strip()}, but the chosen sheet is {key['sheet']}; "
            f"choose the row's sheet with --name, or delete the row"
        )
    if item not in key["items"]:
        raise DataError(f"{place}: the sheet has no item `{item}`; use one of its items, p001 to {list(key['items'])[-1]}")
    letters = key["items"][item]["letters"]
    if letter.upper() not in letters:
        raise DataError(f"{place}: item {item} has no answer `{letter}`; use one of its answers, {', '.join(letters)}")
    if not text:
        return None
    low, high = key["scale"]
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = float("nan")
    if value not in range(low, high + 1):
        raise DataError(f"{place}: the rating is `{text}`; it must be a whole number from {low} to {high}, or empty")
    return Rating(row.get("rater", "").strip() or rater, item, letter.upper(), int(value))


def _outcomes(by_arm: Mapping[tuple[str, str], Mapping[str, int]], items: Sequence[str], arm: str, other: str) -> list[float]:
    outcomes = []
    for item in items:
        mine, theirs = by_arm.get((item, arm), {}), by_arm.get((item, other), {})
        signs = [np.sign(mine[rater] - theirs[rater]) for rater in mine if rater in theirs]
        if signs:
            outcomes.append(float(np.sign(np.mean(signs))))
    return outcomes


def _score_rows(arm: str, means: Mapping[str, Sequence[float]], scale: Sequence[int]) -> list[Row]:
    rows = []
    for name, group in with_mean(means):
        low, high = macro_interval([np.asarray(values, float)[None, :, None] for values in group], bounds=(min(scale), max(scale)))
        score = float(np.mean([np.mean(values) for values in group]))
        rows.append({"arm": arm, "set": name} | rounded(score=score, low=low, high=high) | {"n": sum(map(len, group))})
    return rows
