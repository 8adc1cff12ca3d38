"""What judges said of a study's answers: ``judge/judge-*.json`` beside the plan, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tadistill.disk import read_json
from tadistill.errors import StoreError


@dataclass(frozen=True)
class Judgement:
    """One judge's table; `rows` start with an arm (or a pair) and a set."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def judgements(study_dir: Path) -> list[Judgement]:
    """All judgements of a study, by file name: comparisons first, then scores; empty where nobody judged."""
    found: list[Judgement] = []
    for path in sorted((study_dir / "judge").glob("judge-*.json")):
        content = read_json(path)
        try:
            found += _tables(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}): delete it and run `tadistill judge` again") from error
    return found


def _tables(content: Mapping[str, Any]) -> list[Judgement]:
    pairs = [row for row in content["rows"] if "wins" in row]
    scores = [row for row in content["rows"] if "score" in row]
    note = "Intervals are 95 %." + _gaps(content)
    tables: list[Judgement] = []
    if pairs:
        columns = ("arm against other", "set", "wins – ties – losses", "win rate (%)", "95 % interval", "prompts")
        tables.append(Judgement(f"Pairs, judged by {content['judge']}", note, columns, tuple(map(_pair, pairs))))
    if scores:
        columns = ("arm", "set", "score", "95 % interval", "prompts")
        tables.append(Judgement(f"Scores by {content['judge']} ({content['mode']})", note, columns, tuple(map(_score, scores))))
    return tables or [Judgement(f"{content['judge']} ({content['mode']}) said nothing that could be used", _gaps(content), (), ())]


def _gaps(content: Mapping[str, Any]) -> str:
    """Unreadable and missing answers of the judge, where there are any."""
    texts: list[str] = []
    for key, what in (("unparsed", "could not be read"), ("missing", "are missing")):
        value = content.get(key, 0)
        count = len(value) if isinstance(value, Sequence) else int(value)
        if count:
            texts.append(f" {count} replies of the judge {what}.")
    return "".join(texts)


def _pair(row: Mapping[str, Any]) -> tuple[str, ...]:
    outcome = f"{row['wins']} – {row['ties']} – {row['losses']}"
    return (f"{row['arm']} against {row['other']}", row["set"], outcome, *_span(row, "win_rate"), str(row["n"]))


def _score(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["arm"], row["set"], *_span(row, "score"), str(row["n"]))


def _span(row: Mapping[str, Any], what: str) -> tuple[str, str]:
    low, high = row["low"], row["high"]
    return f"{row[what]:.2f}", "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
