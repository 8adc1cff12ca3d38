"""Text of strangers (data, names, answers, values of a recipe) in a form that cannot act on a terminal or fill it.

visible("a\\x1b[2J")     -> the text with `\\x1b` written out: no cursor moves, no title changes, no text runs backwards
visible_parts(value)    -> the same for every text in lists and dicts
one_line(text)          -> the same, with line breaks written as \\n
shortened(sentence)     -> the same sentence with every quoted value cut at 200 characters
"""

import re
from typing import Any

LONGEST_VALUE = 200
"""Number of characters of a value that a message shows."""
_LONGEST_SENTENCE = 3000
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of the text around them
    "\u2028\u2029\ufeff\ud800-\udfff\U000e0000-\U000e007f]"  # line breaks in disguise, halves of characters, invisible letters
)
_VALUES = re.compile(
    r"`[^`]+`|(?<!\w)'(?:[^'\\]|\\.){201,}'(?!\w)|(?<!\w)\"(?:[^\"\\]|\\.){201,}\"(?!\w)|\[[^\[\]]{201,}\]|\{[^{}]{201,}\}|\S{201,}"
)


def visible(text: str) -> str:
    """Return the text with control characters, escapes and directional marks written out; tabs and line feeds stay."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def visible_parts(value: Any) -> Any:
    """Return a value in which every text is visible, also within lists and dicts. HTML that was made on purpose stays as it is."""
    if isinstance(value, str):
        return value if hasattr(value, "__html__") else visible(value)
    if isinstance(value, dict):
        return {visible_parts(key): visible_parts(part) for key, part in value.items()}
    return [visible_parts(part) for part in value] if isinstance(value, list | tuple) else value


def one_line(text: str) -> str:
    """Return visible text in which line feeds are written out too."""
    return visible(text).replace("\n", "\\n")


def shortened(sentence: str) -> str:
    """Return a sentence whose long values are cut, with the number of characters left out."""
    # short quoted values are found too, so that the text between two of them is none
    cut = _VALUES.sub(lambda found: _cut(found[0], LONGEST_VALUE) if len(found[0]) > LONGEST_VALUE else found[0], sentence)
    return _cut(cut, _LONGEST_SENTENCE) if len(cut) > _LONGEST_SENTENCE else cut


def guarded(cell: str) -> str:
    """Return a cell of a CSV file that a spreadsheet does not run: an apostrophe makes a formula text."""
    return f"'{visible(cell)}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else visible(cell)


def _cut(text: str, length: int) -> str:
    kept = length - 40  # room for the note, so that a text that is cut is never cut again
    return f"{text[: kept - 1]}… ({len(text) - kept} more characters){text[-1]}"
