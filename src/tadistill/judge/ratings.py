"""Filled-in sheets -> mean ratings, win rates and the raters' agreement, in the form of a judge's summary.

Each file is one rater, unless it has a column `rater`. A row without a rating is an answer that was not rated.
"""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tadistill.disk import read_json
from tadistill.errors import ConfigError, DataError
from tadistill.judge.summary import Row, pair_rows
from tadistill.results.collect import MEAN
from tadistill.statistics import macro_interval

_NEEDED = ("item", "letter", "rating")


@dataclass(frozen=True)
class Rating:
    """What one rater gave one answer."""

    rater: str
    item: str
    letter: str
    value: int


def load_key(path: Path) -> dict[str, Any]:
    """The key of a sheet.

    Raises:
        ConfigError: there is no such sheet. DataError: the file is not a key.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: `tadistill human STUDY` without files writes a sheet and its key")
    key = read_json(path)
    try:
        for item in key["items"].values():
            _ = (item["set"], dict(item["letters"]))
        low, high = key["scale"]
        _ = (key["sheet"], int(low), int(high))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not the key of a sheet ({type(error).__name__}: {error}): take the file that came with it") from error
    return key


def read_ratings(paths: Sequence[Path], key: Mapping[str, Any]) -> list[Rating]:
    """Every rating of all files.

    Raises:
        DataError: a file is not a filled-in copy of this sheet; says the file, the line and what is wrong.
    """
    ratings: dict[tuple[str, str, str], Rating] = {}
    for path in paths:
        before = len(ratings)
        for line, row in _rows(path):
            rating = _rating(f"{path}, line {line}", row, key, rater=path.stem)
            if rating is None:
                continue
            place = (rating.rater, rating.item, rating.letter)
            if place in ratings:
                twice = f"{path}, line {line}: {rating.rater} rated {rating.item} {rating.letter} twice"
                raise DataError(f"{twice}; keep one row, or give raters different names")
            ratings[place] = rating
        if len(ratings) == before:
            raise DataError(f"{path} holds no rating: fill in its column rating, or leave the file out")
    return list(ratings.values())


def summarise_ratings(ratings: Sequence[Rating], key: Mapping[str, Any]) -> dict[str, Any]:
    """Rows (scores of every arm, wins of every pair of arms), raters, and agreement.

    A prompt's score is the mean over its raters; n counts prompts. An arm wins a prompt where a rater rates it higher; a
    prompt's outcome is the sign of the raters' mean of +1, 0, -1, so that every prompt counts once.
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
        rows += _score_rows(arm, {name: values for name, values in means.items() if values})
    for arm, other in itertools.combinations(arms, 2):
        outcomes = {name: _outcomes(by_arm, [i for i in items if items[i]["set"] == name], arm, other) for name in sets}
        strata = {name: np.asarray([values], float) for name, values in outcomes.items() if values}
        rows += pair_rows(arm, other, strata)
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
    }


def agreement(ratings: Sequence[Rating], *, scale: Sequence[int]) -> dict[str, Any]:
    """Krippendorff's alpha (ordinal) over the answers that at least two raters rated; None where it is not defined.

    It is not defined without such answers, or where all ratings are the same (there is nothing to tell apart).

    Raises:
        ConfigError: the `krippendorff` package is absent and there are several raters.
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
            raise ConfigError("raters' agreement needs the package krippendorff; `pip install 'tadistill[judge]'`") from error
        domain = list(range(int(scale[0]), int(scale[1]) + 1))
        value = krippendorff.alpha(reliability_data=shared, value_domain=domain, level_of_measurement="ordinal")
        found["value"] = round(float(value), 4)
    return found


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV file with commas, semicolons or tabs, as spreadsheets write them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: give the answers.csv that the sheet's page saved, or its filled-in CSV") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: save it as CSV (UTF-8)") from error
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lacking = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if lacking:
            raise DataError(f"{path} has no column {lacking[0]}; it needs {', '.join(_NEEDED)}, as the sheet has them")
        return [(reader.line_num, {str(k): v or "" for k, v in row.items() if k is not None}) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}): save it as CSV (UTF-8)") from error


def _rating(place: str, row: Mapping[str, str], key: Mapping[str, Any], *, rater: str) -> Rating | None:
    item, letter, text = (row[name].strip() for name in _NEEDED)
    if row.get("sheet", "").strip() not in ("", key["sheet"]):
        raise DataError(f"{place}: the row is of sheet {row['sheet'].strip()}, not of {key['sheet']}; name the right sheet with --name")
    if item not in key["items"]:
        raise DataError(f"{place}: the sheet has no item `{item}`; it has p001 to {list(key['items'])[-1]}")
    letters = key["items"][item]["letters"]
    if letter.upper() not in letters:
        raise DataError(f"{place}: item {item} has no answer `{letter}`; it has {', '.join(letters)}")
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


def _score_rows(arm: str, means: Mapping[str, Sequence[float]]) -> list[Row]:
    groups = [(name, [values]) for name, values in means.items()] + ([(MEAN, list(means.values()))] if len(means) > 1 else [])
    rows = []
    for name, group in groups:
        low, high = macro_interval([np.asarray(values, float)[None, :, None] for values in group])
        score = float(np.mean([np.mean(values) for values in group]))
        numbers = {field: round(value, 4) for field, value in (("score", score), ("low", low), ("high", high))}
        rows.append({"arm": arm, "set": name} | numbers | {"n": sum(map(len, group))})
    return rows
