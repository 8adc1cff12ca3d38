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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
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


# --- texts ----------------------------------------------------------------------------------------------------------------

_WITHOUT_SPACES = ("CJK ", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@lru_cache(maxsize=4096)
def without_spaces(c: str) -> bool:
    """Return True for a character of a script that writes no spaces between words, such as Chinese or Thai."""
    return not c.isascii() and unicodedata.name(c, "").startswith(_WITHOUT_SPACES)


def named(phrase: str, text: str, flags: int = 0) -> Iterator[re.Match[str]]:
    """Yield the places where a text has a phrase as words of its own: `Paris` in "(Paris)", but not in "Parisian", and `5` not in "5.5"."""
    for found in re.finditer(re.escape(phrase), text, flags):
        if not (_goes_on(text, found.start()) or _goes_on(text, found.end())):
            yield found


_INSIDE_NUMBER = re.compile(r"(?:\d[.,]|[-−])\0\d|\d\0[.,]\d")


def _goes_on(text: str, at: int) -> bool:
    # True if a word or a number goes on from the character before this place to the one after it
    before, after = text[max(at - 2, 0) : at], text[at : at + 2]
    return (_in_word(before[-1:]) and _in_word(after[:1])) or bool(_INSIDE_NUMBER.search(f"{before}\0{after}"))


def _in_word(c: str) -> bool:
    return c != "" and (c.isalnum() or unicodedata.category(c)[0] == "M") and not without_spaces(c)


def _without_thinking(text: str) -> str:
    answer = text.rpartition("</think>")[2]
    return "" if answer.lstrip().startswith("<think>") else answer  # thinking that was cut has no answer after it


# --- numbers ------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(\\[dt]?frac\s*(?:\d|\{[^{}]*\})\s*(?:\d|\{[^{}]*\})|(?<![\w.])\d[\d.,]*\s*/\s*\d[\d.,]*)|"
    r"(?<![\w.])([-−+]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)([eE][-+]?\d+)?"
)
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,!;]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # as in 1{,}234
_UNIT = re.compile(r"\\(?:text|mathrm)\s*\{[^{}]*[^\W\d][^{}\d]*\}\s*\^\s*\{?\d\}?|\^\s*\{?\\circ\}?")  # as in \text{cm}^2
_EXPRESSION = re.compile(r"\\(?!text|mathrm|mathbf|mbox|left|right|quad)[a-zA-Z]+|[\^√π½⅓⅔¼¾]")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    r"""Return the final number of a text. Return None if there is no number.

    Three places are searched in this order: the text after the last ####, the last \boxed{}, and the whole text. After ####, the first
    number counts. A box must have only one number, or one after its last equals sign. In the whole text, the last number counts. Commas
    between groups of three digits, and currency signs, are skipped. Fractions are not numbers. Thinking up to `</think>` is left out.
    """
    text = _without_thinking(text)
    marked, boxed = _numbers(text.rpartition(_MARK)[2] if _MARK in text else ""), final_box(text) or ""
    if not marked and _numbers(boxed):
        return _only_number(boxed)
    found = marked[:1] or _numbers(text)[-1:]
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


def _numbers(text: str) -> list[Decimal]:
    # the numbers of a text; a fraction is NaN, which equals no number
    found = []
    for fraction, sign, digits, exponent in _NUMBER.findall(_GROUPS.sub(",", text)):
        try:
            found.append(Decimal("NaN" if fraction else f"{sign.replace('−', '-')}{digits.replace(',', '')}{exponent}"))
        except InvalidOperation:  # an exponent of more than 18 digits
            continue
    return found


def _only_number(text: str) -> Decimal | None:
    # the only number of a text that is no expression; of `x = 5`, the part after the sign
    text = _UNIT.sub("", re.split(r"=|\\approx", text)[-1])
    found = _numbers(text)
    return found[0] if len(found) == 1 and found[0].is_finite() and not _EXPRESSION.search(text) else None


def _read_number(value: Any, choices: tuple[str, ...], where: str) -> Decimal:
    text = as_text(value)
    boxed = final_box(text)
    number = _only_number(text.rpartition(_MARK)[2] if _MARK in text or boxed is None else boxed)
    if number is None:
        fix = "write one number, or a text that ends in #### and one number (for fractions and other expressions, use the column `math`)"
        raise _wrong("numeric", value, where, fix)
    return number


# --- choices ------------------------------------------------------------------------------------------------------------

_LETTERS = string.ascii_uppercase
_A_LETTER = "a letter such as B, or name the column of the choices (columns: {choices: COLUMN})"
_SAID = re.compile(
    r"\b(?:answer|(?:correct|right|best|final|my)\s+(?:option|choice))\b(?:\s+(?:to|for)\b[^\n.:]{1,80}?)?[^\w\n]{0,9}?"
    r"(?:\b(?:is|(?:would|should|must|will)\s+be)\b|[:=>]|\n)"
    r"|\bI(?:['’]d|['’]ll|\s+would|\s+will|\s+must)?\s+(?:choose|pick|select|go\s+with)\b",
    re.IGNORECASE,
)
_SURELY = r"(?:clearly|definitely|certainly|obviously|actually|indeed|most|likely|probably|therefore|thus)"
_RIGHT = re.compile(rf"\W{{0,9}}\b(?:is|must\s+be)\s+(?:(?:the|only|one|{_SURELY})\s+)*(?:correct|right|best|answer)\b", re.IGNORECASE)
_FILLER = re.compile(rf"[\W_]*(?:(?:{_SURELY}|the|only|letter|option|choice|answer|number)\b[\W_]*)*", re.IGNORECASE)
_UNSURE = re.compile(r"\b(?:nor|or|and|if|whether|not)[^\w\n]*\Z", re.IGNORECASE)  # as in "neither A nor B is correct"
_JOINED = re.compile(r"[^\w\n]*(?:\band\b|\bor\b|[/&])")
_SENTENCE = r"\s+(?:is|was|are|has)\b"  # as in "A is wrong"
_OTHER = r"[^\w\n]*(?:(?:\band\b|\bor\b|[/&])[^\w\n]*[A-HJ-Z]\b|,[^\w\n]*[A-HJ-Z]\b(?!\s+(?!and\b|or\b)[a-z]))"  # as in "A or B", "A, B"
_AFTER_WORDS = re.compile(rf"([A-Z])(?![\w'’]|{_SENTENCE}|{_OTHER})|([a-z])(?=[).]|[^\w\n]*(?:\n|\Z))")
_FIRST = re.compile(rf"([A-Z])(?=[*_\"'`’”]*[.):,;\]}}。、】」』]|[*_\"'`’”]*\s*(?:\n|\Z)|\s+[-–—])(?!{_OTHER})|([a-z])(?=\))")
_LIST = re.compile(r"[\W_]*A[.):].*?\n[\W_]*B[.):]", re.DOTALL)
_LAST = re.compile(r"(?:\A|[^\w\s]|\n|\b(?i:option|choice|answer|only|that|so|thus|therefore|hence)\b)[^\w\n]*([A-Z])\Z")
_MARKED = re.compile(
    r"[(\[]([A-Z])[)\]]|\*\*[(\"'`]*([A-Z])(?:[).:]|\*\*)|\b(?i:option|choice)\s+([A-Z])\b|:[^\w\n]{0,9}([A-Z])[^\w\n]*$", re.M
)
_ALONE = re.compile(r"(?<![A-Za-z0-9'’])(?![AI]\s+(?!and\b|or\b)[a-z])([A-Z])(?![A-Za-z0-9'’])([^\w\n]*\Z)?")


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

    Five places are searched in this order: the last \boxed{}; the text after the last "answer is" or "answer:" that an option follows; the
    text before the last "is correct"; the beginning of the text, unless it lists A, B …; and the whole text, which must name exactly one
    option, or one letter that is in brackets, in bold print, after "option" or a colon, or at the end. Thinking is left out.
    """
    text = re.sub(r"\\(?:text|mathrm|mathbf)\w*\s*(?=\{)", "", unicodedata.normalize("NFKC", _without_thinking(text)))
    names = [unicodedata.normalize("NFKC", option).strip(" .\n") or option for option in options]
    longest_first = sorted(range(len(names)), key=lambda i: -len(names[i]))  # "not good" before "not"
    words = {i: names[i] for i in longest_first if len(names[i]) > 1 or names[i] not in _LETTERS}
    after = [final_box(text) or "", *(text[m.end() :] for m in reversed([*_SAID.finditer(text)]))]
    found = [_at_start(place, options, words, _AFTER_WORDS) for place in after]
    found += [_at_end(text[: m.start()], options, words) for m in reversed([*_RIGHT.finditer(text)])]
    found += [] if _LIST.match(text) else [_at_start(text, options, words, _FIRST)]
    return next((i for i in found if i is not None), _only_one(text, options, words))


def _at_start(text: str, options: tuple[str, ...], words: Mapping[int, str], letter: re.Pattern[str]) -> int | None:
    start = len(text) - len(_FILLER.sub("", text, count=1))
    for i, name in words.items():
        for found in named(name, text[: start + len(name) + 2], re.IGNORECASE):
            rest = text[found.end() :]
            if found.start() <= start and not re.match(_SENTENCE, rest):
                joined = _JOINED.match(rest)
                return None if joined and _at_start(rest[joined.end() :], options, words, letter) is not None else i
    by_letter = letter.match(text, start)
    return _index((by_letter[1] or by_letter[2]).upper(), options) if by_letter else None


def _at_end(text: str, options: tuple[str, ...], words: Mapping[int, str]) -> int | None:
    for i, name in words.items():
        tail = text[-len(name) - 12 :]
        if any(found.end() == len(tail) and not _UNSURE.search(tail[: found.start()]) for found in named(name, tail, re.IGNORECASE)):
            return i
    by_letter = _LAST.search(text[-40:])
    return _index(by_letter[1], options) if by_letter else None


def _only_one(text: str, options: tuple[str, ...], words: Mapping[int, str]) -> int | None:
    said, rest = set[int | None](), text
    for i, name in words.items():
        for found in named(name, rest, re.IGNORECASE):
            said.add(i)
            rest = rest[: found.start()] + "\0" * len(name) + rest[found.end() :]
    letters = {_index("".join(groups), options) for groups in _MARKED.findall(text)} - {None}
    alone = {found[1]: found[2] is not None for found in _ALONE.finditer(text)}  # True for a letter at the end
    if not letters and len(said) != 1 and len(alone) == 1 and any(alone.values()):
        letters = {_index(letter, options) for letter in alone}
    one = said | letters if len(said) < 2 else letters
    return one.pop() if len(one) == 1 else None


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
