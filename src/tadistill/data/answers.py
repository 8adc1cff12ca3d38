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
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise
from typing import Any

from tadistill.errors import ConfigError, DataError
from tadistill.text import numbers, only_number, whole


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


_NEXT = re.compile(r"\n[^\w\n]{0,9}(?:Question|Q|User|Human|Instruction)\b[^\w\n]{0,9}?:")


def _before_next(text: str) -> list[str]:
    # the text before a next question, as base models write it
    following = _NEXT.search(text.lstrip())
    return [text.lstrip()[: following.start()]] if following else []


def _without_thinking(text: str) -> str:
    answer = text.rpartition("</think>")[2]
    return "" if answer.lstrip().startswith("<think>") else answer  # thinking that was cut has no answer after it


# --- numbers ------------------------------------------------------------------------------------------------------------

_MARK = "####"


def final_number(text: str) -> Decimal | None:
    r"""Return the final number of a text. Return None if there is no number.

    Three places are searched in this order: the text after the last ####, the last \boxed{}, and the whole text. After ####, the first
    number counts. A box must have only one number, or one after its last equals sign. In the whole text, the last number counts. Commas
    between groups of three digits, and currency signs, are skipped. Fractions, powers and roots are not numbers. Thinking up to `</think>`
    is left out, and a next question after a #### or \boxed{}.
    """
    text = _without_thinking(text)
    text = next((part for part in _before_next(text) if _MARK in part or "\\boxed{" in part), text)
    marked, boxed = numbers(text.rpartition(_MARK)[2] if _MARK in text else ""), final_box(text) or ""
    if not marked and numbers(boxed):
        return only_number(boxed)
    found = marked[:1] or numbers(text)[-1:]
    return found[0] if found and found[0].is_finite() else None


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


def _read_number(value: Any, choices: tuple[str, ...], where: str) -> Decimal:
    text = as_text(value)
    boxed = final_box(text)
    number = only_number(text.rpartition(_MARK)[2] if _MARK in text or boxed is None else boxed)
    if number is None:
        fix = "write one number, or a text that ends in #### and one number (for fractions and other expressions, use the column `math`)"
        raise _wrong("numeric", value, where, fix)
    return number


# --- choices ------------------------------------------------------------------------------------------------------------

_LETTERS = string.ascii_uppercase
_SURELY = r"clearly|definitely|certainly|obviously|actually|indeed|most|likely|probably|therefore|thus|the|only"
_SAID = re.compile(
    r"\b(?:answer|(?:correct|right|best|final|my)\s+(?:option|choice))\b(?:\s+(?:to|for)\b[^\n.:]{1,80}?)?[^\w\n]{0,9}?"
    r"(?:\b(?:is|(?:would|should|must|will)\s+be)\b|[:=>]|\n)"
    r"|\bI(?:['’]d|['’]ll|\s+would|\s+will|\s+must)?\s+(?:choose|pick|select|go\s+with)\b",
    re.IGNORECASE,
)
_FILLER = re.compile(rf"[\W_]*(?:(?:{_SURELY}|letter|option|choice|answer|number)\b[\W_]*)*", re.IGNORECASE)
_RIGHT = re.compile(
    rf"[^\w\n]{{0,9}}\b(?:is|(?:must|could|may|might) be) (?:(?:{_SURELY}|one) )*"
    r"(?:correct|right|answer|best(?! (?!answer|option|choice|fit)\w))\b"
)
_WRONG = re.compile(
    r"[^\w\n,.]{0,4}(?:wrong\b|incorrect\b|no(?=[.\n]|\Z))|"
    r"[^\w\n,]{0,5}\b(?:(?:is|are|was|were|seems) (?:also |clearly |both )?(?:wrong|incorrect|false|partly)|"
    r"(?:is|are)(?: not|n['’]t) (?:the )?(?:correct|right|best|answer|true))\b"
)
_DENIED = re.compile(
    r"(?:\b(?:if|whether|not|cannot|never|neither|nor|false|please|missing|exclude|eliminate|rule out)\b|n['’]t\b|"
    r"(?<!\bI )\b(?:would|might|may|could) (?:say|think)\b)(?:(?!\bbut\b)[^.,;:!?\n])*\Z",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"(?<![A-Za-z0-9À-\u0dff])(?<![A-Za-z][-.'’])(?:(?![AI][^\S\n]+(?!(?:is|could|might|and|or|nor|because|since|as)\b)[a-z])([A-Z])"
    r"(?![A-Za-z0-9À-\u0dff+]|['’]\w|\.[A-Za-z]\b|-[a-z])|([a-z])(?=\)|[^\w\n]{0,9}(?:\n|\Z)))"
)
_MARK_BEFORE = re.compile(
    r"(?:\A|[^A-Za-z0-9\s]|\n|['’]s|\b(?:option|choice|letter|answer|that|but|so|hence|is|be|ist|est|es|say|think|choose|select|pick|"
    rf"with|leaves|{_SURELY})\b)[^\w\n]*\Z",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[^\w\n.]*(?:,|,? (?:and|or|nor|vs)\b|[/&])[^\w\n]*(?:option |choice )?[^\w\n]*", re.IGNORECASE)
_VERB = re.compile(r" (?:is|was|has|could|might)\b")
_CLOSED = re.compile(r"_*(?!['’]\w)(?:\s*(?:\Z|[^\w\s])|[^\S\n]*\n)")
_LIST = re.compile(r"[\W_]{0,9}A\b(?=.*(?:\n|[.;,\]])[^\w\n]{0,9}B[.):\n])", re.DOTALL)
_NO = "no(?! (?:idea|doubt|longer|evidence|need|other|one|way|more|matter|problem|reason|such|information)\\b)"


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
    fix = f"one of the choices {', '.join(choices)}, its letter or its number from 0"
    fix = fix if choices else "a letter such as B, or name the column of the choices (columns: {choices: COLUMN})"
    raise _wrong("choice", value, where, f"write {fix}")


@dataclass(frozen=True)
class _Mention:
    """A place where a text names an option by its letter, its words or both, as in "B. London"."""

    start: int
    end: int
    option: int | None
    letter: bool  # True for a capital letter that surely names an option, unlike the one in "vitamin C"
    words: bool
    stop: int  # the end of its first part, such as B in "B. London"


def chosen(text: str, options: tuple[str, ...]) -> int | None:
    r"""Return the index of the option that a text chooses, by its words or by its letter (A, B, C …). Return None if it chooses none.

    These places are searched in this order: the last \boxed{}; the option after the last "answer is", "answer:" or "I choose"; the one
    before "is correct"; the one at the beginning, unless it lists A, B …; and the whole text, which must name one option. Options as in
    "A or B", "not A" and "if A" do not count. Thinking is left out. If a next question follows, the text before it is searched first.
    """
    text = re.sub(r"\\(?:text|mathrm|mathbf)\w*\s*(?=\{)", "", unicodedata.normalize("NFKC", _without_thinking(text)))
    parts = [part for whole in (*_before_next(text), text) for part in (final_box(whole) or "", whole)]
    return next((found for part in parts if (found := _choice(part, options)) is not None), None)


def _choice(text: str, options: tuple[str, ...]) -> int | None:
    mentions = _claimed(text, _mentions(text, options))
    said = [m for cue in _SAID.finditer(text) for m in _at(text, cue.end(), mentions) if not _VERB.match(text, m.stop)]
    right = [m for m in mentions if _RIGHT.match(text, m.end) and (m.letter or m.words)]
    first = [m for m in _at(text, 0, mentions) if _CLOSED.match(text, m.stop) and not _LIST.match(text)]
    for place in (said, right if len({m.option for m in right}) == 1 else [], first):
        if place:
            return place[-1].option
    letters = {m.option for m in mentions if m.letter} - {None}
    words = {m.option for m in mentions if m.words and not m.letter}
    one = words | letters if len(words) < 2 else letters
    return one.pop() if len(one) == 1 else None


def _at(text: str, start: int, mentions: Sequence[_Mention]) -> Sequence[_Mention]:
    # the mention that begins here, perhaps after a few words such as "the option"
    at = bisect_left(mentions, start, key=lambda m: m.start)
    filler = _FILLER.match(text, start, start + 200)
    return [m for m in mentions[at : at + 1] if filler and m.start <= filler.end()]


def _mentions(text: str, options: tuple[str, ...]) -> list[_Mention]:
    # all mentions in order; a letter next to the words of its option makes one mention with them
    names = [unicodedata.normalize("NFKC", option).strip(" .\n") or option for option in options]
    words = {name.lower(): i for i, name in reversed([*enumerate(names)]) if len(name) > 1 or name not in _LETTERS}
    found = []
    pattern = "|".join(_NO if name == "no" else re.escape(name) for name in sorted(words, key=len, reverse=True))  # longest first
    for place in whole(pattern, text, re.IGNORECASE) if words else ():
        found += [_Mention(*place.span(), i, False, True, place.end()) for i in [words.get(place[0].lower())] if i is not None]
    taken = {at for m in found for at in range(m.start, m.end)}
    for place in _LETTER.finditer(text):
        if place.start() not in taken:
            marked = _MARK_BEFORE.search(text[max(place.start() - 24, 0) : place.start()])
            found.append(_Mention(*place.span(), _index(place[0].upper(), options), bool(place[1] and marked), False, place.end()))
    merged = list[_Mention]()
    for m in sorted(found, key=lambda m: m.start):
        last = merged[-1] if merged else m
        if m.option == last.option and m.words != last.words and re.fullmatch(r"[^\w\n]{0,4}", text[last.end : m.start]):
            merged[-1] = replace(last, end=m.end, letter=last.letter or m.letter, words=last.words or m.words)
        else:
            merged.append(m)
    return merged


def _claimed(text: str, mentions: list[_Mention]) -> list[_Mention]:
    # the mentions without those as in "A or B", "not A", "if A", "A is wrong"
    joined = {m.start for pair in pairwise(mentions) if _are_joined(text, *pair) for m in pair}
    denied = (_DENIED.search(text[max(m.start - 80, 0) : m.start]) or _WRONG.match(text, m.end) for m in mentions)
    return [m for m, no in zip(mentions, denied, strict=True) if not no and m.start not in joined]


def _are_joined(text: str, one: _Mention, other: _Mention) -> bool:
    between = text[one.end : other.start] if other.start < one.end + 20 and one.option != other.option is not None else "."
    return bool(_JOINED.fullmatch(between)) and not ("," in between and _VERB.match(text, other.stop))  # not "A, B is wrong"


def _index(letter: str, options: tuple[str, ...]) -> int | None:
    index = options.index(letter) if letter in options else _LETTERS.index(letter)
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
