"""Collect the answers of all arms to the same prompts, the ratings by judges, and the scores of models that are no arms."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tadistill.config.evaluate import REFERENCE
from tadistill.data.prompts import split_thought
from tadistill.disk import read_json
from tadistill.errors import StoreError
from tadistill.metrics import metric_title, names_in
from tadistill.results.collect import Numbers, Reader, Results, once, with_passes
from tadistill.results.measured import Scores, places, stream_predictions
from tadistill.results.number_text import number
from tadistill.results.study import ArmRecord, StudyPlan
from tadistill.results.verdict import by_importance
from tadistill.text import counted, form, listed

_PROMPTS = 50  # maximum number of prompts per set: enough to read and search
_BYTES = 1_500_000  # size limit of all answers together; long answers reduce the number of prompts, but not below `_FEWEST`
_FEWEST = 5

Samples = dict[str, list[dict[str, Any]]]


@once
def samples(results: Results) -> Samples:
    """Return the first prompts of each test set, with their references and the answer of every arm.

    A prompt that a chat template wrote also has `turns`, each with a `role`, a `text` and perhaps `thinking`. An answer has `text` and
    `thinking`.
    Answers are not chosen by quality. They come from the first finished training seed and the first decoding seed.
    """
    by_set: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in results.sets}
    chat = results.plan.recipe["data"].get("template") == "chat"
    wanted = {name: set(rows[:_PROMPTS].tolist()) for name, rows in results.compared.items()}  # every arm has answered these rows
    for arm in results.plan.arms:
        finished = results.scores[arm.name]
        if not finished:
            continue
        rows = stream_predictions(results.store, arm.evaluate[arm.first_seed(finished)])
        for row in first_answers(row for row in rows if row["index"] in wanted.get(row["set"], ())):
            kept = {name: row[name] for name in ("index", "prompt", "references")} | {"turns": _turns(row, chat), "answers": {}}
            prompt = by_set[row["set"]].setdefault(row["index"], kept)
            thinking, text = split_thought(row["prediction"], row["prompt"])
            prompt["answers"][arm.name] = {"text": text, "thinking": thinking, "scores": _scores(row)}
    found = {name: [prompts[index] for index in sorted(prompts)] for name, prompts in by_set.items() if prompts}
    count = _how_many(found)
    return {name: prompts[:count] for name, prompts in found.items()}


def _turns(row: Mapping[str, Any], chat: bool) -> list[dict[str, str]]:
    # an instruction is stored without turns; a prompt that is stored as it is in the data has no template
    asked = row.get("instruction", row["prompt"])
    text = "\n\n".join(filter(None, (asked, row.get("input"))))
    return row.get("turns", [{"role": "user", "text": text}] if chat and asked != row["prompt"] else [])


def shown_first(results: Results) -> list[str]:
    """Return the arms whose answers the page shows when it opens.

    If at most four arms have answers, all of them are shown. Otherwise the page shows the teacher and the two arms that the report's answer
    compares.
    """
    names = [arm.name for arm in results.plan.arms if results.scores[arm.name]]
    if len(names) <= 4:
        return names
    teacher = [arm.name for arm in results.plan.arms if arm.path == (results.plan.teacher,) and arm.name in names]
    compared = by_importance(results)
    return [*teacher[:1], *([compared[0].arm, compared[0].other] if compared else names[:2])]


@once
def references(results: Results) -> Results | None:
    """Return the results of models that the study measured although they are no arms, such as the original teacher.

    They take the place of the arms, and nothing is claimed about them. A model is left out if it has not answered all rows on which arms
    are compared. Return None if no model is left.
    """
    of_arms = {key for arm in results.plan.arms for seed in arm.evaluate for key in arm.measured_by(seed)}
    keys: dict[str, dict[int, str]] = {}
    for stage in results.plan.stages:
        if stage.kind == "evaluate" and stage.key not in of_arms and results.store.finished(stage.key):
            keys.setdefault(stage.model, {})[stage.seed] = stage.key
    read, pass_at = Reader(results.store), results.plan.recipe["evaluate"].get("pass_at", ())
    arms, scores, numbers = list[ArmRecord](), dict[str, dict[int, Scores]](), dict[str, dict[int, Numbers]]()
    for model, by_seed in keys.items():
        name = f"{model} ({'teacher, ' if model == results.plan.teacher else ''}no arm)"
        arm = ArmRecord(name, (model,), name, (model,), "", model, None, None, by_seed, {}, {}, dict.fromkeys(by_seed), None)
        scores[name], numbers[name] = {}, {}
        for seed, key in by_seed.items():
            rows, compared = read.rows(key), results.compared
            if rows.keys() == compared.keys() and all(np.isin(compared[of], rows[of]).all() for of in rows):
                found = read.scores(arm, seed, {of: places(rows[of], compared[of]) for of in rows})
                scores[name][seed] = {of: with_passes(table, pass_at) for of, table in found.items()}
                numbers[name][seed] = read.numbers[key]
        arms += [arm] if scores[name] else []
    measured = {metric for by_seed in scores.values() for tables in by_seed.values() for table in tables.values() for metric in table}
    metrics, plan = tuple(metric for metric in results.metrics if metric in measured), replace(results.plan, arms=tuple(arms))
    return replace(results, plan=plan, metrics=metrics, missing=(), scores=scores, numbers=numbers, kept={}) if arms else None


def _how_many(found: Samples) -> int:
    size = 0
    for count in range(_PROMPTS):
        size += sum(len(json.dumps(prompts[count], ensure_ascii=False).encode()) for prompts in found.values() if count < len(prompts))
        if size > _BYTES:
            return max(_FEWEST, count)
    return _PROMPTS


def _scores(row: dict[str, Any]) -> str:
    shown = (*names_in("quality"), "length")
    return " · ".join(f"{metric_title(m)} {number(row[m], m)}" for m in shown if row.get(m) is not None)


# --- judgements -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """A table of one judge's ratings. Each row starts with an arm (or a pair of arms) and a test set."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def judgements(results: Results) -> list[Judgement]:
    """Return all judgements of a study, in the order of their file names. In each file, comparisons come before scores.

    Ratings of answers that the study no longer has are left out, and the note names their arms: an arm was removed or trained again.
    """
    found: list[Judgement] = []
    for path in sorted((results.study_dir / "judge").glob("judge-*.json")):
        content = read_json(path)
        try:
            found += _tables(content, _former(content, results.plan))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{path} is damaged ({type(error).__name__}: {error}); delete the file, and run `tadistill judge` again"
            ) from error
    return found


def _former(content: Mapping[str, Any], plan: StudyPlan) -> list[str]:
    """Return the rated arms whose answers the study no longer has."""
    now = {arm.name: set(arm.evaluate.values()) for arm in plan.arms}
    rated = dict.fromkeys(row[name] for row in content["rows"] for name in ("arm", "other") if name in row and row[name] != REFERENCE)
    keys = content.get("evaluations", {})
    return [arm for arm in rated if arm not in now or not set(keys.get(arm, ())) <= now[arm]]


def _tables(content: Mapping[str, Any], former: Sequence[str]) -> list[Judgement]:
    rows = [row for row in content["rows"] if row["arm"] not in former and row.get("other") not in former]
    pairs = [row for row in rows if "wins" in row]
    scores = [row for row in rows if "score" in row]
    about = _gaps(content)
    if former:
        about += f" The ratings of {listed(former)} are left out, because the study no longer has the rated answers."
        if not rows:
            return [Judgement(f"Ratings by {content['judge']} ({content['mode']})", about.strip(), (), ())]
    if "evaluations" not in content:
        about += " An earlier version wrote this file, so the ratings may be of answers that the study no longer has."
    note = "Intervals are 95 %." + about
    tables: list[Judgement] = []
    if pairs:
        columns = ("arm against other", "set", "wins – ties – losses", "win rate (%)", "95 % interval", "prompts")
        tables.append(Judgement(f"Pairs, judged by {content['judge']}", note, columns, tuple(map(_pair, pairs))))
    if scores:
        columns = ("arm", "set", "score", "95 % interval", "prompts")
        tables.append(Judgement(f"Scores by {content['judge']} ({content['mode']})", note, columns, tuple(map(_score, scores))))
    return tables or [Judgement(f"{content['judge']} ({content['mode']}) gave no usable reply", about.strip(), (), ())]


def _gaps(content: Mapping[str, Any]) -> str:
    texts: list[str] = []
    for key, one, many in (("unparsed", "could not be read", "could not be read"), ("missing", "is missing", "are missing")):
        value = content.get(key, 0)
        count = len(value) if isinstance(value, Sequence) else int(value)
        if count:
            texts.append(f" {counted(count, 'reply', 'replies')} of the judge {form(count, one, many)}.")
    return "".join(texts)


def _pair(row: Mapping[str, Any]) -> tuple[str, ...]:
    outcome = f"{row['wins']} – {row['ties']} – {row['losses']}"
    return (f"{row['arm']} against {row['other']}", row["set"], outcome, *_span(row, "win_rate"), str(row["n"]))


def _score(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["arm"], row["set"], *_span(row, "score"), str(row["n"]))


def _span(row: Mapping[str, Any], what: str) -> tuple[str, str]:
    low, high = row["low"], row["high"]
    return f"{row[what]:.2f}", "" if low is None or low == high else f"[{low:.2f}, {high:.2f}]"


def first_answers(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the predictions of each test set's lowest decoding seed. The predictions of other seeds are not kept."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kept = found.setdefault(row["set"], [])
        if kept and row["seed"] < kept[0]["seed"]:
            kept.clear()
        if not kept or row["seed"] == kept[0]["seed"]:
            kept.append(row)
    return [row for kept in found.values() for row in kept]
