"""Right answers of rows, and the rules that compare a model's answer with the right answer.

In a recipe, a data set names the column of its right answers under the name of a rule, as in `columns: {numeric: answer}`. There are four
rules, which are also the names of metrics:

- `numeric`: the final number equals the right number.
- `choice`: the chosen letter or label word is the right one.
- `math`: the final expression equals the right expression, as the library math-verify decides.
- `checks`: the answer passes all checks of the row, such as {"kind": "max_words", "n": 20}.
"""

import importlib.util
import json
import logging
import re
import string
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from tadistill.errors import ConfigError, DataError


@dataclass(frozen=True)
class Rule:
    """A rule: one function parses the right answer of a row, and another compares a model's answer with the right answer."""

    read: Callable[[Any, tuple[str, ...], str], Any]
    """Parses the right answer. Its arguments are the value of the column, the choices of the row, and the name of the row for messages.
    Raises a DataError if the value is not valid."""
    right: Callable[[str, Any], bool]
    """Returns True if an answer is right. Its arguments are the model's answer and the result of `read`."""


def _wrong(rule: str, value: Any, where: str, fix: str) -> DataError:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return DataError(f"{where}: the rule `{rule}` cannot use the right answer `{text[:200]}`; {fix}, or delete the row")


def as_text(value: Any) -> str:
    """Return a text or a number as text. Return an empty text for any other value."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number or isinstance(value, str) else ""


# --- numbers ------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<![\w.])([-−+]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)([eE][-+]?\d+)?")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    r"""Return the final number of a text. Return None if there is no number.

    Three places are searched in this order: the text after the last ####, the last \boxed{}, and the whole text. After ####, the first
    number counts. In the other two places, the last number counts. Commas between groups of three digits, and currency signs, are skipped.
    """
    marked, boxed = text.rpartition(_MARK)[2] if _MARK in text else "", final_box(text) or ""
    found = _numbers(marked)[:1] or _numbers(boxed)[-1:] or _numbers(text)[-1:]
    return found[0] if found else None


def final_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]


def _numbers(text: str) -> list[Decimal]:
    found = []
    for sign, digits, exponent in _NUMBER.findall(text):
        try:
            found.append(Decimal(f"{sign.replace('−', '-')}{digits.replace(',', '')}{exponent}"))
        except InvalidOperation:  # an exponent of more than 18 digits
            continue
    return found


def _read_number(value: Any, choices: tuple[str, ...], where: str) -> Decimal:
    text = as_text(value)
    alone = _MARK in text or final_box(text) is not None or len(_numbers(text)) == 1
    number = final_number(text) if alone else None
    if number is None:
        raise _wrong(
            "numeric", value, where, "write one number, or a text that ends in #### and a number (for expressions, use the column `math`)"
        )
    return number


# --- choices ------------------------------------------------------------------------------------------------------------

_SAID = re.compile(r"\b(?:answer|choice|option)\b(?:\s+is)?\s*[:=]?(.*)", re.IGNORECASE)
_LETTERS = string.ascii_uppercase
_A_LETTER = "a letter such as B, or name the column of the choices (columns: {choices: COLUMN})"


@dataclass(frozen=True)
class Choice:
    """The right choice of a row, as an index. `options` is empty if the row names only the letter of the choice."""

    options: tuple[str, ...]
    right: int


def _read_choice(value: Any, choices: tuple[str, ...], where: str) -> Choice:
    letters = _LETTERS[: len(choices)] if choices else _LETTERS
    value = value[0] if isinstance(value, list) and len(value) == 1 else value  # a column of references has lists
    if choices and isinstance(value, int) and 0 <= value < len(choices):
        return Choice(choices, int(value))
    if isinstance(value, str) and value in choices:
        return Choice(choices, choices.index(value))
    letter = value.strip("(). \n") if isinstance(value, str) else ""
    if len(letter) == 1 and letter in letters:
        return Choice(choices, letters.index(letter))
    of_row = f"one of the choices {', '.join(choices)}, its letter or its number from 0"
    raise _wrong("choice", value, where, f"write {of_row if choices else _A_LETTER}")


def chosen(text: str, options: tuple[str, ...]) -> int | None:
    r"""Return the index of the option that a text chooses, by its words or by its letter (A, B, C …). Return None if it chooses none.

    Four places are searched in this order: the last \boxed{}; the text after the last "answer is" or "answer:"; the beginning of the
    text; and the whole text, which must name exactly one option, or one letter in brackets.
    """
    boxed, said = final_box(text), _SAID.findall(text)
    for place, letter_ends in ((boxed or "", r"\b"), (said[-1] if said else "", r"\b"), (text, r"(?=[.):,\]]|\s*$|\n)")):
        found = _at_start(place.lstrip(" \n\t([{*$\"'`"), options, letter_ends)
        if found is not None:
            return found
    return _only_one(text, options)


def _at_start(text: str, options: tuple[str, ...], letter_ends: str) -> int | None:
    for i in sorted(range(len(options)), key=lambda i: -len(options[i])):  # "not good" before "not"
        if re.match(rf"{re.escape(options[i])}(?!\w)", text, re.IGNORECASE):
            return i
    letter = re.match(rf"([A-Z]){letter_ends}", text)
    return _index(letter[1], options) if letter else None


def _only_one(text: str, options: tuple[str, ...]) -> int | None:
    named, rest = set[int | None](), text
    for i in sorted(range(len(options)), key=lambda i: -len(options[i])):
        rest, count = re.subn(rf"(?<!\w){re.escape(options[i])}(?!\w)", "\0", rest, flags=re.IGNORECASE)
        named |= {i} if count else set()
    named = named or {_index(letter, options) for letter in re.findall(r"\(([A-Z])\)", text)}
    return next(iter(named)) if len(named) == 1 else None


def _index(letter: str, options: tuple[str, ...]) -> int | None:
    index = _LETTERS.index(letter)
    return index if not options or index < len(options) else None


# --- mathematics --------------------------------------------------------------------------------------------------------

_SECONDS = 5  # math-verify's own limit for one expression


def _read_math(value: Any, choices: tuple[str, ...], where: str) -> str:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "the column `math` needs the package math-verify; run `pip install 'tadistill[math]'`, or use `numeric` if the answers are "
            "numbers"
        )
    text = as_text(value).rpartition(_MARK)[2].strip()
    if not text:
        raise _wrong("math", value, where, "write an expression, for instance \\frac{1}{2}")
    marked = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    text = text if marked else f"${text}$"
    if not any(not isinstance(found, str) for found in _parsed(text)):
        raise _wrong("math", value, where, "write an expression that math-verify can parse, for instance \\frac{1}{2}")
    return text


def _same_math(answer: str, right: str) -> bool:
    from math_verify import verify  # here: it imports sympy, which is slow

    return bool(verify(_parsed(right), _parsed(answer), timeout_seconds=_limit()))  # math-verify expects the right one first


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # an expression that takes too long counts as wrong, without a warning
    return parse(text, parsing_timeout=_limit())  # type: ignore[arg-type]  # None means no limit


def _limit() -> int | None:
    return _SECONDS if threading.current_thread() is threading.main_thread() else None  # math-verify sets its limit with a signal


# --- checks of form -----------------------------------------------------------------------------------------------------


def _is_json(answer: str) -> bool:
    try:
        json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", answer.strip()))
    except (ValueError, RecursionError):
        return False
    return True


_NUMBERS: Mapping[str, Callable[[str, int], bool]] = {
    "min_words": lambda answer, n: len(answer.split()) >= n,
    "max_words": lambda answer, n: len(answer.split()) <= n,
}
_TEXTS: Mapping[str, Callable[[str, str], bool]] = {
    "contains": lambda answer, text: text.lower() in answer.lower(),
    "excludes": lambda answer, text: text.lower() not in answer.lower(),
    "starts_with": lambda answer, text: answer.strip().lower().startswith(text.lower()),
    "ends_with": lambda answer, text: answer.strip().lower().endswith(text.lower()),
}
_PLAIN: Mapping[str, Callable[[str], bool]] = {"lowercase": lambda answer: answer == answer.lower(), "json": _is_json}


def _read_checks(value: Any, choices: tuple[str, ...], where: str) -> tuple[tuple[str, Any], ...]:
    found = []
    for given in value if isinstance(value, list) and value else [None]:
        check: dict[str, Any] = given if isinstance(given, dict) else {}
        kind = check.get("kind")
        if kind in _NUMBERS and isinstance(check.get("n"), int) and not isinstance(check["n"], bool) and set(check) == {"kind", "n"}:
            found.append((kind, check["n"]))
        elif kind in _TEXTS and isinstance(check.get("text"), str) and check["text"] and set(check) == {"kind", "text"}:
            found.append((kind, check["text"]))
        elif kind in _PLAIN and set(check) == {"kind"}:
            found.append((kind, None))
        else:
            kinds = f"{', '.join(_NUMBERS)} with a number `n`, {', '.join(_TEXTS)} with a `text`, or {', '.join(_PLAIN)}"
            raise _wrong("checks", value, where, f'write a list of objects such as {{"kind": "max_words", "n": 20}}; the kinds are {kinds}')
    return tuple(found)


def _passes(answer: str, checks: tuple[tuple[str, Any], ...]) -> bool:
    tests: dict[str, Callable[..., bool]] = {**_NUMBERS, **_TEXTS, **_PLAIN}
    return all(tests[kind](answer) if kind in _PLAIN else tests[kind](answer, value) for kind, value in checks)


RULES: Mapping[str, Rule] = {
    "numeric": Rule(_read_number, lambda answer, right: final_number(answer) == right),
    "choice": Rule(_read_choice, lambda answer, right: chosen(answer, right.options) == right.right),
    "math": Rule(_read_math, _same_math),
    "checks": Rule(_read_checks, _passes),
}
"""Maps the name of a rule to the rule. The rule's metric, and its key in `columns` of a recipe, have this name too."""
