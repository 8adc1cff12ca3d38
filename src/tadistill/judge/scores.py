"""Ask the judge (a language model that rates answers) for scores, and compute wins, win rates and mean scores with 95 % intervals.

The judge is asked in several threads. The number of tokens is estimated before the first request. Every reply is appended to a cache file
at once (one JSON object per line). A question with a cached reply is not asked again.

Axes: S training seeds, N prompts. An arm's row includes a prompt only if the judge scored this arm's answers to this prompt in both orders
and for every seed.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tadistill.config.evaluate import REFERENCE, Judge
from tadistill.errors import JudgeFailed
from tadistill.judge.questions import Answers, Prompt, Question, in_order_of_asking, parse_scores, wordings
from tadistill.metrics import MEAN
from tadistill.models.chat_api import Refused, Reply, Unavailable, complete, estimated_tokens
from tadistill.models.chat_api_replies import Cache, in_threads
from tadistill.statistics import macro_interval
from tadistill.text import counted

if TYPE_CHECKING:
    from openai import OpenAI

_TOKENS_A_REPLY = 50  # two numbers and a sentence; only for the estimate
# Nothing more is asked if the endpoint has never answered and refuses so many questions. Their order is random, because a filter or a limit
# can refuse all prompts of one place. If it refuses four fifths of the prompts, the first 50 are all refused with a probability of 0.00001.
_REFUSALS = 50
# No more of a test set is asked if so many of its questions in a row are refused, and they are about 50 prompts or all. After so many
# refusals of any questions without an answer, one that was answered is asked again: if it is refused too, the endpoint refuses everything.
_REFUSALS_IN_A_ROW = 200
_SHARE = (0.0, 100.0)  # the bounds of a win rate

Scores = tuple[float, float]
Array = NDArray[np.float64]
Row = dict[str, Any]
T = TypeVar("T", bound=ArrayLike)


@dataclass(frozen=True)
class RequestEstimate:
    """The numbers of questions and tokens of a run of the judge. The tokens are estimated from the lengths of the texts.

    `cached` is the number of questions that already have a reply. `most_out` is the largest possible number of generated tokens.
    """

    questions: int
    cached: int
    tokens_in: int
    tokens_out: int
    most_out: int

    @property
    def requests(self) -> int:
        """The number of requests if every reply has readable scores: one for each unanswered question.

        Otherwise there are more requests, but at most three times as many.
        """
        return self.questions - self.cached


@dataclass(frozen=True)
class Verdicts:
    """The judge's scores. `scores` maps the text of a question to its scores (Assistant 1, Assistant 2). `unparsed` has the texts of the
    questions to which no reply had readable scores."""

    scores: dict[str, Scores] = field(default_factory=dict)
    unparsed: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    """Maps the text of a question to the reason why the endpoint refused it."""
    unasked: dict[str, str] = field(default_factory=dict)
    """Maps the text of a question that was not asked to the reason, a clause."""


def question_key(settings: Judge, text: str) -> str:
    """Return the cache key of a question. It depends on the judge model and its sampling settings.

    It does not depend on the address of the endpoint, so the replies stay valid if the address changes.
    """
    content = [settings.model, settings.temperature, settings.max_tokens, text]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:32]


def estimate_requests(questions: Sequence[Question], settings: Judge, cache: Cache) -> RequestEstimate:
    """Estimate the requests and tokens of a run. Questions with the same text are asked and counted once."""
    texts = list(dict.fromkeys(question.text for question in questions))
    open_texts = [text for text in texts if not _settled(text, settings, cache)]
    tokens_in = estimated_tokens(*open_texts)
    expected = len(open_texts) * min(_TOKENS_A_REPLY, settings.max_tokens)
    return RequestEstimate(len(texts), len(texts) - len(open_texts), tokens_in, expected, len(open_texts) * settings.max_tokens)


def ask(client: "OpenAI", settings: Judge, text: str) -> Reply:
    """Send one question to the judge, and return the reply. Raises Refused and Unavailable as `models.chat_api.complete` does."""
    message = {"role": "user", "content": text}
    return complete(
        client,
        {"model": settings.model, "messages": [message], "temperature": settings.temperature, "max_tokens": settings.max_tokens},
    )


def ask_all(
    questions: Sequence[Question], settings: Judge, cache: Cache, ask: Callable[[str], Reply], *, tick: Callable[[], None] = lambda: None
) -> Verdicts:
    """Ask every question that has no cached reply, and return all scores. The scores do not depend on the order of the replies.

    Args:
        ask: sends a question and returns the reply, or raises `Refused` or `Unavailable`. It is called from `settings.jobs` threads.
        tick: called once for each distinct question, after it is answered or refused.

    Raises:
        JudgeFailed: the endpoint failed, or it refused questions and answered none. The replies to all requests that were sent are awaited
            and saved first.
    """
    prompts = {question.text: (question.set, question.index) for question in questions}
    run = _Run(settings, cache, ask, tick, prompts)
    first = 0 if run.sample else _REFUSALS
    run.settle_all(run.order[:first])
    if run.sample and not run.failure:
        run.settle_all(run.order[first:])
    if run.verdicts.refused and not run.sample:
        run.fail(f"it has refused all questions so far, because {next(iter(run.verdicts.refused.values()))}")
    if run.failure:
        done = sum(_settled(text, settings, cache) for text in prompts)
        raise JudgeFailed(stopped(f"the endpoint failed: {run.failure}", done, len(prompts)))
    found = run.verdicts
    asked = found.scores.keys() | found.unparsed | found.refused.keys()
    found.unasked.update({text: run.closed[name] for text, (name, _) in prompts.items() if text not in asked})
    return found


def stopped(reason: str, done: int, total: int) -> str:
    saved = f"{done} of {counted(total, 'question is', 'questions are')} answered and saved"
    return f"{reason}; {saved}, {counted(total - done, 'is', 'are')} missing; run the same command to continue"


class _Run:
    def __init__(self, settings: Judge, cache: Cache, ask: Callable[[str], Reply], tick: Callable[[], None], prompts: Mapping[str, Prompt]):
        """`prompts` maps the text of each question to its prompt."""
        self.settings, self.cache, self.ask, self.tick, self.prompts = settings, cache, ask, tick, prompts
        self.stop, self.lock, self.verdicts, self.failure = threading.Event(), threading.Lock(), Verdicts(), ""
        self.rows = in_order_of_asking(prompts, together=_REFUSALS)
        self.places = {text: place for row in self.rows.values() for place, text in enumerate(row)}
        self.order = [text for each in zip_longest(*self.rows.values()) for text in each if text is not None]
        self.sample = next((text for text in prompts if cache.get(question_key(settings, text))), "")
        """A text that the endpoint has answered, in this run or an earlier one."""
        self.refused = set[str]()
        """The questions of which the endpoint has answered no wording in this run."""
        self.without_answer = 0
        """The number of refusals since the last answer of this run."""
        self.closed: dict[str, str] = {}
        """Maps each test set of which no more questions are asked to the reason."""

    def settle_all(self, texts: Sequence[str]) -> None:
        self.stop = threading.Event()
        for future in in_threads(texts, self.settle, threads=self.settings.jobs, stop=self.stop):
            if not future.cancelled() and (error := future.exception()) and not isinstance(error, Unavailable):
                raise error

    def settle(self, text: str) -> None:
        found, count = None, True
        for asked in wordings(text):
            key = question_key(self.settings, asked)
            reply = self.cache.get(key)
            if reply is None:
                if self.stop.is_set() or self.prompts[text][0] in self.closed:
                    return
                reply = self._request(text, asked, count)
                if reply is None:
                    return
                self.cache.put(key, reply)
                count, self.sample, self.without_answer = False, asked, 0
            found = parse_scores(reply.text)
            if found is not None:
                break
        with self.lock:
            if found is None:
                self.verdicts.unparsed.add(text)
            else:
                self.verdicts.scores[text] = found
            self.tick()

    def _request(self, text: str, asked: str, count: bool) -> Reply | None:
        try:
            try:
                return self.ask(asked)
            except Refused as error:
                with self.lock:
                    self.verdicts.refused[text] = str(error)
                    self.tick()
                    if count:
                        self._count(text)
                    self.without_answer += 1
                    doubt = self.without_answer >= _REFUSALS_IN_A_ROW and self.sample and self.closed.keys() != self.rows.keys()
                    self.without_answer = 0 if doubt else self.without_answer
                if doubt:
                    self._ask_again()
                return None
        except Unavailable as error:
            self.fail(str(error))
            raise

    def _count(self, text: str) -> None:
        self.refused.add(text)
        name = self.prompts[text][0]
        # in a row in the order of asking, not of the replies: a refusal can take milliseconds, and an answer seconds
        row, place = self.rows[name], self.places[text]
        sides = (range(place, -1, -1), range(place + 1, len(row)))
        in_a_row = [row[i] for side in sides for i in takewhile(lambda i: row[i] in self.refused, side)]
        if len(in_a_row) >= _REFUSALS_IN_A_ROW:
            here, of_set = (len({self.prompts[each] for each in texts}) for texts in (in_a_row, row))
            if here >= min(_REFUSALS, of_set):
                self.closed[name] = "the endpoint refused too many questions of a test set in a row"

    def _ask_again(self) -> None:
        try:
            self.ask(self.sample)
        except Refused:
            why = "the endpoint refuses everything, also a question that it had answered"
            with self.lock:
                self.closed = dict.fromkeys(self.rows, why) | self.closed

    def fail(self, reason: str) -> None:
        with self.lock:
            self.failure = self.failure or reason
        self.stop.set()


def _settled(text: str, settings: Judge, cache: Cache) -> bool:
    for asked in wordings(text):
        reply = cache.get(question_key(settings, asked))
        if reply is None:
            return False
        if parse_scores(reply.text) is not None:
            return True
    return True


# --- the summary --------------------------------------------------------------------------------------------------------


def summarise(answers: Answers, questions: Sequence[Question], verdicts: Verdicts, *, mode: str, against: str = REFERENCE) -> list[Row]:
    """Return one row per arm and test set. With several sets, each arm also gets a row for the mean over sets, if every set has answers.

    - n is the number of compared pairs of answers (prompts x training seeds).
    - Mode pair: an arm wins if it wins in both orders. If the two orders disagree, it is a tie. win_rate = 100 (wins + ties / 2) / n.
    - Mode score, as in MiniLLM: 100 x (sum of the arm's scores) / (sum of the reference's scores), over both orders.
    """
    scores = {(q.set, q.index, q.seed, q.left, q.right): verdicts.scores[q.text] for q in questions if q.text in verdicts.scores}
    make = _pair_rows if mode == "pair" else _score_rows
    rows: list[Row] = []
    for arm in (name for name in answers.arms if name != against):
        strata = {name: _complete(scores, answers, name, arm, against) for name in dict.fromkeys(item.set for item in answers.items)}
        rows += make(arm, against, strata)
    return rows


def verdict(first: Scores, second: Scores) -> int:
    """Return 1 if the arm has the higher score in both orders, -1 if the other answer has it in both orders, and 0 otherwise.

    Args:
        first: the scores (arm, other answer) if the arm is shown first.
        second: the scores (other answer, arm) if the arm is shown second.
    """
    lead, second_lead = first[0] - first[1], second[1] - second[0]
    return int(lead > 0 and second_lead > 0) - int(lead < 0 and second_lead < 0)


def ratio_interval(strata_SN2: Sequence[Array]) -> tuple[float, float]:
    """Return the 95 % interval of the mean, over test sets, of the ratio sum(scores of the arm) / sum(scores of the other answers).

    There is one array for each set, of shape (training seeds, prompts, 2). The last axis has the arm's score and then the score of the
    other answer.

    For each set, the delta method computes one value for each seed and prompt. The mean of these values equals the ratio, and the
    variance of their mean is, to first order, the variance of the ratio. `macro_interval` therefore computes the interval from them.
    """
    linear = []
    for values in strata_SN2:
        arm_SN, other_SN = values[..., 0], values[..., 1]
        ratio = arm_SN.sum() / other_SN.sum()
        linear.append((ratio + (arm_SN - ratio * other_SN) / other_SN.mean())[..., None])
    return macro_interval(linear, bounds=(0.0, np.inf))


def pair_rows(arm: str, other: str, strata_SN: Mapping[str, Array]) -> list[Row]:
    """Return one row per test set with values. With several sets, add a row over all of them, if every set has values.

    That row has the summed counts and the mean of the win rates, in which each set has the same weight. The arrays of `strata_SN` have one
    value per training seed and prompt: 1 is a win, 0 a tie, -1 a loss.
    """
    rows = []
    for name, group in with_mean(strata_SN):
        wins, losses = (sum(int((sign * outcomes_SN > 0).sum()) for outcomes_SN in group) for sign in (1, -1))
        n, rates_SN = sum(outcomes_SN.size for outcomes_SN in group), [50.0 * (outcomes_SN + 1) for outcomes_SN in group]
        low, high = macro_interval([rate_SN[..., None] for rate_SN in rates_SN], bounds=_SHARE)
        rate = float(np.mean([round(float(rate_SN.mean()), 4) for rate_SN in rates_SN]))
        row = {"arm": arm, "other": other, "set": name, "wins": wins, "ties": n - wins - losses, "losses": losses}
        rows.append(row | rounded(win_rate=rate, low=low, high=high) | {"n": n})
    return rows


def with_mean(strata: Mapping[str, T]) -> list[tuple[str, list[T]]]:
    """Return the name and the values of each test set that has values. With several sets, add all values, for the mean over sets.

    If a set has no values, there is no mean: a table would compare it with means over more sets.
    """
    groups = [(name, [values]) for name, values in strata.items() if np.size(values)]
    return [*groups, (MEAN, list(strata.values()))] if 1 < len(groups) == len(strata) else groups


def rounded(**values: float) -> dict[str, float]:
    """Return the values rounded to four decimals, as they are written into a summary."""
    return {name: round(value, 4) + 0.0 for name, value in values.items()}


def _pair_rows(arm: str, other: str, strata: Mapping[str, Array]) -> list[Row]:
    outcomes = {name: np.asarray([[verdict(*both) for both in of_seed] for of_seed in values], float) for name, values in strata.items()}
    return pair_rows(arm, other, outcomes)


def _score_rows(arm: str, other: str, strata: Mapping[str, Array]) -> list[Row]:
    # (S, N, order, assistant) -> (S, N, [arm, other]): the arm is Assistant 1 in the first order, 2 in the second
    both = {
        name: np.stack([v[..., 0, 0] + v[..., 1, 1], v[..., 0, 1] + v[..., 1, 0]], axis=-1) for name, v in strata.items()
    }  # fmt: skip
    rows = []
    for name, group in with_mean(both):
        score = float(np.mean([values[..., 0].sum() / values[..., 1].sum() for values in group]))
        low, high = ratio_interval(group)
        row = {"arm": arm, "set": name} | rounded(score=100 * score, low=100 * low, high=100 * high)
        rows.append(row | {"n": sum(values[..., 0].size for values in group)})
    return rows


def _complete(scores: Mapping[tuple, Scores], answers: Answers, name: str, arm: str, other: str) -> Array:
    kept = []
    for index in (item.index for item in answers.items if item.set == name):
        keys = [[(name, index, seed, *names) for names in ((arm, other), (other, arm))] for seed in range(len(answers.seeds))]
        if all(key in scores for of_seed in keys for key in of_seed):
            kept.append([[scores[key] for key in of_seed] for of_seed in keys])
    return np.asarray(kept, float).swapaxes(0, 1) if kept else np.empty((len(answers.seeds), 0, 2, 2))
