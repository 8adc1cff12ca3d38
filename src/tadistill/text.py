r"""Functions for the texts that people read: untrusted values made safe to print, the right forms of counted nouns, and the words and
numbers in a text.

visible("a\x1b[2J")     -> shows control characters as escapes, here as `\x1b`
visible_parts(value)    -> does the same for every text in lists and dicts
one_line(text)          -> also shows line breaks as escapes
shortened(sentence)     -> cuts every quoted value at 200 characters
beginning(text, 120)    -> the first 120 characters, on one line
counted(1, "stage")     -> "1 stage"; counted(3, "stage") -> "3 stages"
listed(["a", "b"])      -> "a and b"
shown(3)                -> "3"; shown(a model) -> "a LlamaForCausalLM"
changes({"lr": 1}, {"lr": 2}) -> yields "lr 1 → 2"
named("Paris", text)  -> yields the places where a text has these words
numbers("2 or 1,000") -> [Decimal(2), Decimal(1000)]
"""

import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

MINUS = "\N{MINUS SIGN}"
LONGEST_VALUE = 200
"""The largest number of characters of a quoted value in a message."""
_LONGEST_SENTENCE = 3000
_SHORT = 30
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that change the direction of the text around them
    "\u2028\u2029\ufeff\ud800-\udfff\U000e0000-\U000e007f]"  # line separators, byte order mark, lone surrogates, invisible tag characters
)
_VALUES = re.compile(
    r"`[^`]+`|(?<!\w)'(?:[^'\\]|\\.){201,}'(?!\w)|(?<!\w)\"(?:[^\"\\]|\\.){201,}\"(?!\w)|\[[^\[\]]{201,}\]|\{[^{}]{201,}\}|\S{201,}"
)


def visible(text: str) -> str:
    """Return the text with control characters, direction marks and invisible characters shown as escapes. Tabs and line feeds stay."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def visible_parts(value: Any) -> Any:
    """Apply `visible` to every text of a value, also inside lists and dicts. Markup (HTML of our own templates) stays as it is."""
    if isinstance(value, str):
        return value if hasattr(value, "__html__") else visible(value)
    if isinstance(value, dict):
        return {visible_parts(key): visible_parts(part) for key, part in value.items()}
    return [visible_parts(part) for part in value] if isinstance(value, list | tuple) else value


def one_line(text: str) -> str:
    """Return the text as `visible` does, with line feeds also shown as escapes."""
    return visible(text).replace("\n", "\\n")


def shortened(sentence: str) -> str:
    """Return the sentence with long quoted values cut. Each cut says how many characters are missing."""
    # the pattern also matches short quoted values, because the text between two of them must not count as a value
    cut = _VALUES.sub(lambda found: _cut(found[0], LONGEST_VALUE) if len(found[0]) > LONGEST_VALUE else found[0], sentence)
    return _cut(cut, _LONGEST_SENTENCE) if len(cut) > _LONGEST_SENTENCE else cut


def beginning(text: str, most: int) -> str:
    """Return a text on one line, cut after `most` characters."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def guarded(cell: str) -> str:
    """Return a cell of a CSV file in a safe form: a formula gets an apostrophe in front, so that a spreadsheet does not run it."""
    return f"'{visible(cell)}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else visible(cell)


def _cut(text: str, length: int) -> str:
    kept = length - 40  # with the note, the result is shorter than `length`, so a second call does not cut it again
    return f"{text[: kept - 1]}… ({len(text) - kept} more characters){text[-1]}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, such as "1 stage" or "3 stages". `many` is the plural, if it is not `one` with an s."""
    return f"{number} {form(number, one, many or f'{one}s')}"


def form(number: int, one: str, many: str) -> str:
    """Return the form of a word for a number: `one` for 1, else `many`."""
    return one if number == 1 else many


def size(count: float) -> str:
    """Return a number of bytes as text, such as `1.5 GB`."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 1)):
        if round(count, digits) < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def shown(value: Any) -> str:
    """Return a value of a user's program for a sentence: as Python writes it, or only its type if that is long or has several lines."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE and "\n" not in text else f"a {type(value).__name__}"


def listed(names: Sequence[str]) -> str:
    """Return names as text, such as "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def changes(old: Any, new: Any, at: str = "", *, named: Sequence[str] = ()) -> Iterator[str]:
    """Yield a text such as `optim.lr 0.001 → 0.002` for each value that differs in two nested dicts of plain data.

    The dicts at the places `named` have names of the user's choice. Their entries that only one side has are new or removed. Elsewhere, a
    key that one side lacks is a default of another version, and is left out.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*new, *old]):
            place = f"{at}.{name}" if at else name
            if name in old and name in new:
                yield from changes(old[name], new[name], place, named=named)
            elif at in named:
                yield f"{place} ({'new' if name in new else 'removed'})"
    elif old != new:
        texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
        yield f"{at} {' → '.join(texts)}" if max(map(len, texts)) <= _SHORT else at


# --- words in a text ---

_WITHOUT_SPACES = ("CJK ", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@lru_cache(maxsize=4096)
def without_spaces(c: str) -> bool:
    """Return True for a character of a script that writes no spaces between words, such as Chinese or Thai."""
    return not c.isascii() and unicodedata.name(c, "").startswith(_WITHOUT_SPACES)


def named(phrase: str, text: str, flags: int = 0) -> Iterator[re.Match[str]]:
    """Yield the places where a text has a phrase as words of its own: `Paris` in "(Paris)", but not in "Parisian", and `5` not in "5.5"."""
    yield from whole(re.escape(phrase), text, flags)


def whole(pattern: str, text: str, flags: int = 0) -> Iterator[re.Match[str]]:
    """Yield the matches of a pattern that are words of their own, as in `named`."""
    for found in re.finditer(pattern, text, flags):
        if not (_goes_on(text, found.start()) or _goes_on(text, found.end())):
            yield found


_INSIDE_NUMBER = re.compile(r"(?:\d[.,]|[-−])\0\d|\d\0[.,]\d")


def _goes_on(text: str, at: int) -> bool:
    # True if a word or a number goes on from the character before this place to the one after it
    before, after = text[max(at - 2, 0) : at], text[at : at + 2]
    return (_in_word(before[-1:]) and _in_word(after[:1])) or bool(_INSIDE_NUMBER.search(f"{before}\0{after}"))


def _in_word(c: str) -> bool:
    return c != "" and (c.isalnum() or unicodedata.category(c)[0] == "M") and not without_spaces(c)


# --- numbers in a text ---

_NUMBER = re.compile(
    r"(\\[dt]?frac\s*(?:\d|\{[^{}]*\})\s*(?:\d|\{[^{}]*\})|"  # fractions, powers, and products with roots and pi
    r"(?<![\w.,])[-−+]?[$€£¥]?\d[\d.,]*\s*(?:/\s*\d[\d.,]*|\^\s*\{?[-−+]?\d+|(?:\\sqrt|√)\s*\{?\s*\d*|\\pi\b|π)|(?:\\sqrt|√)\s*\{?\s*\d[\d.,]*)|"
    r"(?<![\w.^])(?<!\^\{)([-−+]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)([eE][-+]?\d+)?"
)
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,!;]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # as in 1{,}234
_UNIT = re.compile(  # as in \text{cm}^2, m^2, ^\circ, ^{\text{th}}
    r"(?:\\(?:text|mathrm)\s*\{[^{}]*[^\W\d][^{}\d]*\}|(?<![A-Za-z])(?:[cdkm]?m|in|ft|yd|mi|units?))\s*\^\s*\{?[23]\}?|"
    r"\^\s*\{?\s*(?:\\circ|°|\\text\s*\{\s*(?:st|nd|rd|th)\s*\})\s*\}?"
)
_FORM = r"text\w*|math(?:rm|bf|bb|it|sf)|mbox|bf|rm|left|right|q?quad|large|Large|displaystyle|ensuremath|dots|ldots|degree|circ"
_EXPRESSION = re.compile(rf"\\(?!(?:{_FORM})(?![a-zA-Z]))[a-zA-Z]+|[\^√π½⅓⅔¼¾]")


def numbers(text: str) -> list[Decimal]:
    """Return the numbers of a text. Fractions, powers and roots are NaN, which equals no number."""
    found = []
    for fraction, sign, digits, exponent in _NUMBER.findall(_GROUPS.sub(",", text)):
        try:
            found.append(Decimal("NaN" if fraction else f"{sign.replace('−', '-')}{digits.replace(',', '')}{exponent}"))
        except InvalidOperation:  # an exponent of more than 18 digits
            continue
    return found


def only_number(text: str) -> Decimal | None:
    """Return the only number of a text, or None if the text is an expression. Of `x = 5` and `5 = x`, the last side with a number."""
    sides = [_UNIT.sub("", side) for side in re.split(r"=|\\approx", text)]
    text = next((side for side in reversed(sides) if numbers(side)), "")
    found = numbers(text)
    return found[0] if len(found) == 1 and found[0].is_finite() and not _EXPRESSION.search(text) else None


def this_command() -> str:
    """Return the command that the user gave."""
    return shlex.join(["tadistill", *sys.argv[1:]])
