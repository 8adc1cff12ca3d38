"""Select the answers that are judged, write the questions for the judge, and parse its replies.

All arms are judged on the same prompts, with the answers of the first decoding seed. Arms whose evaluation is not finished are left out.
As in MiniLLM (Gu et al. 2024, section 3.1 and appendix), the judge sees two answers and rates each from 1 to 10. The wording of the
question is not that of MiniLLM. Judges may prefer the first or the second answer, so every pair is asked in both orders.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tadistill.config.evaluate import REFERENCE
from tadistill.data.chat import without_thought
from tadistill.data.prompts import split_prompt
from tadistill.errors import ConfigError, DataError
from tadistill.results.measured import stream_predictions
from tadistill.results.sample_answers import first_answers
from tadistill.results.study import ArmRecord, StudyPlan, load_plan
from tadistill.store import Store

T = TypeVar("T")
Prompt = tuple[str, int]  # a test set, and an index in it


@dataclass(frozen=True)
class Item:
    """One prompt with its answers. `answers` maps an arm (or `REFERENCE`) to its answers, one per training seed (`Answers.seeds`)."""

    set: str
    index: int
    instruction: str
    input: str
    answers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Answers:
    """The prompts and answers that are judged. `unfinished` names the arms that have no answers yet."""

    plan: StudyPlan
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    items: tuple[Item, ...]
    unfinished: tuple[str, ...]

    @property
    def evaluations(self) -> dict[str, list[str]]:
        """Maps each arm to the keys of the evaluations that wrote its answers, one per training seed. Reports use them to recognise
        ratings of answers that the study no longer has."""
        return {arm.name: [arm.evaluate[seed] for seed in self.seeds] for arm in self.plan.arms if arm.name in self.arms}


def read_answers(
    study_dir: Path, store: Store, *, arms: Sequence[str] = (), sets: Sequence[str] = (), all_seeds: bool = False, limit: int | None = None
) -> Answers:
    """Read prompts of a study with the answers of its arms. By default, all prompts and all arms are read.

    Args:
        all_seeds: read all training seeds for which these arms are evaluated, not only the first one.
        limit: the number of prompts per set. The prompts are evenly spaced over the set, and the same for all arms.

    Raises:
        ConfigError: an arm or a set does not exist, or an arm in `arms` has no answers yet.
        DataError: there is nothing to judge.
        StoreError: a file cannot be read.
    """
    plan = load_plan(study_dir)
    store = Store(store.root, plan.command)
    seeds = (_first_seed(plan, store),)
    chosen, unfinished = _choose(plan, store, arms, seeds[0])
    if all_seeds:
        everywhere = dict.fromkeys(seed for arm in chosen for seed in arm.evaluate)
        seeds = tuple(seed for seed in everywhere if all(store.finished(arm.evaluate.get(seed, "")) for arm in chosen))
    names = tuple(arm.name for arm in chosen)
    answers = {(arm.name, seed): first_answers(stream_predictions(store, arm.evaluate[seed])) for arm in chosen for seed in seeds}
    tables = {at: {(row["set"], row["index"]): row for row in rows} for at, rows in answers.items()}
    return Answers(plan, names, seeds, _items(tables, names, seeds, sets, limit), unfinished)


def _first_seed(plan: StudyPlan, store: Store) -> int:
    seeds = list(dict.fromkeys(seed for arm in plan.arms for seed in arm.evaluate))
    finished = (seed for seed in seeds if any(store.finished(arm.evaluate.get(seed, "")) for arm in plan.arms))
    return next(finished, seeds[0])


def _choose(plan: StudyPlan, store: Store, wanted: Sequence[str], seed: int) -> tuple[list[ArmRecord], tuple[str, ...]]:
    known = {arm.name: arm for arm in plan.arms}
    if REFERENCE in known:
        raise ConfigError(
            f"the study {plan.study} has an arm named `{REFERENCE}`, which is the name of the reference answers; rename the arm"
        )
    for name in wanted:
        if name not in known:
            raise ConfigError(f"the study {plan.study} has no arm `{name}`; its arms are {', '.join(known)}")
    arms = [known[name] for name in dict.fromkeys(wanted)] or list(plan.arms)
    unfinished = tuple(arm.name for arm in arms if seed not in arm.evaluate or not store.finished(arm.evaluate[seed]))
    if wanted and unfinished:
        raise ConfigError(
            f"arm `{unfinished[0]}` has no answers for training seed {seed} yet; run `{plan.command}` to evaluate it, or leave the arm out"
        )
    if len(unfinished) == len(arms):
        raise DataError(f"the study {plan.study} has no answers for training seed {seed} yet; run `{plan.command}` to generate them")
    return [arm for arm in arms if arm.name not in unfinished], unfinished


def _items(
    tables: Mapping[tuple[str, int], Mapping[tuple[str, int], Mapping[str, Any]]],
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    sets: Sequence[str],
    limit: int | None,
) -> tuple[Item, ...]:
    rows = next(iter(tables.values()))
    known = tuple(dict.fromkeys(name for name, _ in rows))
    for name in sets:
        if name not in known:
            raise ConfigError(f"the study has no answers for the set `{name}`; its sets are {', '.join(known) or 'none'}")
    items: list[Item] = []
    for name in dict.fromkeys(sets or known):
        shared = sorted(index for of, index in rows if of == name and all((name, index) in table for table in tables.values()))
        count = min(limit or len(shared), len(shared))
        for index in (shared[i * len(shared) // count] for i in range(count)):
            row = rows[name, index]
            answers = {arm: tuple(tables[arm, seed][name, index]["prediction"] for seed in seeds) for arm in arms}
            answers[REFERENCE] = (row["references"][0],) * len(seeds)
            # evaluations of earlier versions stored only the rendered prompt
            task = (row["instruction"].strip(), row["input"].strip()) if "instruction" in row else split_prompt(row["prompt"])
            items.append(Item(name, index, *task, answers))
    if not items:
        raise DataError(f"the arms {', '.join(arms)} have no prompt in common; judge fewer arms, or evaluate them on the same sets")
    return tuple(items)


_TASK = (
    "Rate two answers to the same task. Judge how helpful, relevant, accurate and detailed each answer is, by the same measure "
    "for both. Neither the order of the answers nor their length is a merit."
)
_FORM = (
    "Give each answer a score from 1 (worst) to 10 (best). The first line of your reply must hold the two scores only, first that of "
    "Assistant 1, then that of Assistant 2, with a space between them. Explain them in one sentence on the second line."
)
# no numbers as an example: a weak judge would repeat them, and they would count as scores
_AGAIN = (
    "An earlier reply did not begin with a line of two scores from 1 to 10. Begin with that line.",
    "Earlier replies did not begin with a line of two scores. Reply with two numbers from 1 to 10, a space between them, and nothing else.",
)

_SCORE = r"(?P<{0}>\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?"
_LABEL = r"(?:(?:assistant|answer)\s*{0}(?:'s)?\s*(?:score)?\s*[:=\-]?\s*)?"
_LINE = re.compile(
    r"(?:the\s+)?(?:scores?\s*(?:are)?\s*[:=]?\s*)?"
    + _LABEL.format(1) + _SCORE.format("first") + r"\s*[,;|&\s]\s*(?:and\s+)?"
    + _LABEL.format(2) + _SCORE.format("second") + r"\s*\.?",
    re.IGNORECASE,
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about two answers to one prompt. The answer of `left` is shown as Assistant 1, and the answer of `right` as Assistant 2.

    `seed` is the position of the training seed in `Answers.seeds`.
    """

    set: str
    index: int
    seed: int
    left: str
    right: str
    text: str


def make_questions(answers: Answers, *, mode: str, against: str = REFERENCE) -> list[Question]:
    """Return the questions that compare each arm with `against`, for every prompt and training seed. Each pair is asked in both orders.

    `mode` is `pair` or `score` (see `scores.summarise`). With `score`, `against` must be `REFERENCE`.

    Raises:
        ConfigError: `against` is neither `REFERENCE` nor an arm with answers, is the only arm, or does not fit `mode`.
    """
    if mode == "score" and against != REFERENCE:
        raise ConfigError(f"mode `score` compares each arm with the reference, not with `{against}`; use --mode pair to compare two arms")
    if against != REFERENCE and against not in answers.arms:
        raise ConfigError(f"`{against}` is neither an arm with answers nor `{REFERENCE}`; the arms are {', '.join(answers.arms)}")
    judged = [arm for arm in answers.arms if arm != against]
    if not judged:
        raise ConfigError(f"`{against}` cannot be judged against itself; name another arm")
    questions = []
    for item in answers.items:
        for arm in judged:
            for seed in range(len(answers.seeds)):
                for left, right in ((arm, against), (against, arm)):
                    text = write_question(item.instruction, item.input, item.answers[left][seed], item.answers[right][seed])
                    questions.append(Question(item.set, item.index, seed, left, right, text))
    return questions


def in_order_of_asking(prompts: Mapping[str, Prompt], *, together: int) -> dict[str, list[str]]:
    """Return the questions of each test set in the order in which they are asked, which is the same on every run.

    The order of a set's prompts is random. So is the order of a prompt's questions, so arms, training seeds and orders mix. The prompts
    are asked in groups of `together` or more: first one question about each prompt of the group, then the others, prompt by prompt. So
    one place of the order shows what many prompts get, and an endpoint that fails later leaves one incomplete prompt, or a few.

    Args:
        prompts: maps the text of each question to its prompt.
    """
    texts, sets = defaultdict[Prompt, list[str]](list), defaultdict[str, list[list[str]]](list)
    for text in _at_random(prompts):
        texts[prompts[text]].append(text)
    for prompt in _at_random(texts):
        sets[prompt[0]].append(texts[prompt])
    order = defaultdict[str, list[str]](list)
    for name, of_set in sets.items():
        groups = max(len(of_set) // together, 1)
        for group in (of_set[i::groups] for i in range(groups)):
            order[name] += [first for first, *_ in group]
            order[name] += [text for _, *others in group for text in others]
    return order


def _at_random(items: Iterable[T]) -> list[T]:
    return sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())


def write_question(instruction: str, given: str, left: str, right: str) -> str:
    """Return the text of a question to the judge. The text names no arm and does not say which answer is the reference."""
    parts = [("Instruction", instruction), ("Input", given), ("Assistant 1's answer", left), ("Assistant 2's answer", right)]
    blocks = [f"[{name}]\n{text}\n[End of {name}]" for name, text in parts if text or name != "Input"]
    return "\n\n".join([_TASK, *blocks, _FORM])


def wordings(text: str) -> list[str]:
    """Return the texts that are sent, one after the other, until a reply can be parsed: the question itself, and then the question with a
    reminder of the required form.

    The reminders differ, because a judge at temperature 0 gives the same reply to the same text.
    """
    return [text, *(f"{text}\n\n{reminder}" for reminder in _AGAIN)]


def parse_scores(reply: str) -> tuple[float, float] | None:
    """Return the two scores of a reply. Return None if the reply does not have the required form, such as ``8 7``.

    Also accepted are commas, ``8/10 7/10``, labels (``Assistant 1: 8, Assistant 2: 7``, also on two lines), Markdown's asterisks, and a
    ``<think>`` block before the scores. Scores outside 1 to 10 and lines with more than two numbers are not accepted.
    """
    lines = [line for line in (_plain(line) for line in without_thought(reply).splitlines()) if line]
    labelled = len(lines) > 1 and all(re.match(rf"(?i)(?:assistant|answer)\s*{n}\b", line) for n, line in enumerate(lines[:2], start=1))
    for candidate in (lines[:1], lines[:2] if labelled else []):
        match = _LINE.fullmatch(" ".join(candidate))
        if match is not None:
            first, second = float(match["first"]), float(match["second"])
            return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None
    return None


def _plain(line: str) -> str:
    return re.sub(r"[*_`#>]", "", line).strip().strip("\"'()[]").strip()
