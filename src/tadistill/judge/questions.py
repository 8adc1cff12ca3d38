"""The question that a judge is asked, and the strict parsing of its reply.

After MiniLLM (Gu et al. 2024, section 3.1 and appendix): two answers to instruction and input are rated 1 to 10 each. The wording differs.
Every pair is asked in both orders, because judges favour a position.
"""

import re
from dataclasses import dataclass

from tadistill.config.judge import REFERENCE
from tadistill.errors import ConfigError
from tadistill.judge.answers import Answers

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
ATTEMPTS = 1 + len(_AGAIN)  # most times that a question is asked until its reply can be parsed

_SCORE = r"(?P<{0}>\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?"
_LABEL = r"(?:(?:assistant|answer)\s*{0}(?:'s)?\s*(?:score)?\s*[:=\-]?\s*)?"
_LINE = re.compile(
    r"(?:the\s+)?(?:scores?\s*(?:are)?\s*[:=]?\s*)?"
    + _LABEL.format(1) + _SCORE.format("first") + r"\s*[,;|&\s]\s*(?:and\s+)?"
    + _LABEL.format(2) + _SCORE.format("second") + r"\s*\.?",
    re.IGNORECASE,
)  # fmt: skip
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """Two answers to one prompt in one order: `left` is shown as Assistant 1. `seed` is the index of the training seed."""

    set: str
    index: int
    seed: int
    left: str
    right: str
    text: str


def make_questions(answers: Answers, *, mode: str, against: str = REFERENCE) -> list[Question]:
    """Pair each arm with `against`, in both orders, for every prompt and training seed.

    Raises:
        ConfigError: `against` is neither an arm nor `REFERENCE`, is the only arm, or does not fit the mode.
    """
    if mode == "score" and against != REFERENCE:
        raise ConfigError(f"mode score compares each arm with the reference, not with `{against}`; use --mode pair to compare two arms")
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


def write_question(instruction: str, given: str, left: str, right: str) -> str:
    """Write the text that the judge reads. It names no arm and does not say which answer is the reference."""
    parts = [("Instruction", instruction), ("Input", given), ("Assistant 1's answer", left), ("Assistant 2's answer", right)]
    blocks = [f"[{name}]\n{text}\n[End of {name}]" for name, text in parts if text or name != "Input"]
    return "\n\n".join([_TASK, *blocks, _FORM])


def again(text: str, attempt: int) -> str:
    """Return the question for attempt number `attempt`, from 0. Each reminder has other words, because a judge at temperature 0 gives the
    same reply to the same text."""
    return text if attempt == 0 else f"{text}\n\n{_AGAIN[attempt - 1]}"


def parse(reply: str) -> tuple[float, float] | None:
    """Parse the two scores; None where the reply does not have the required form.

    In addition to ``8 7``, it accepts commas, ``8/10 7/10``, labels (``Assistant 1: 8, Assistant 2: 7``, also on two lines), Markdown's
    asterisks, and a ``<think>`` block before. Scores outside 1 to 10 and further numbers are not accepted.
    """
    lines = [line for line in (_plain(line) for line in _THOUGHT.sub("", reply, count=1).splitlines()) if line]
    labelled = len(lines) > 1 and all(re.match(rf"(?i)(?:assistant|answer)\s*{n}\b", line) for n, line in enumerate(lines[:2], start=1))
    for candidate in (lines[:1], lines[:2] if labelled else []):
        match = _LINE.fullmatch(" ".join(candidate))
        if match is not None:
            first, second = float(match["first"]), float(match["second"])
            return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None
    return None


def _plain(line: str) -> str:
    return re.sub(r"[*_`#>]", "", line).strip().strip("\"'()[]").strip()
