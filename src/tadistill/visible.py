r"""Functions that make untrusted text (data, names, answers, values of a recipe) safe to print on a terminal.

visible("a\x1b[2J")     -> control characters are shown as escapes, here as `\x1b`
visible_parts(value)    -> the same for every text in lists and dicts
one_line(text)          -> line breaks are shown as \n, too
shortened(sentence)     -> every quoted value is cut at 200 characters
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
    """Return the text with control characters, escapes and directional marks shown as escapes. Tabs and line feeds stay."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def visible_parts(value: Any) -> Any:
    """Return the value with every text made visible, also inside lists and dicts. HTML that was made on purpose stays as it is."""
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
    # short quoted values are found too, so that the text between two of them is none
    cut = _VALUES.sub(lambda found: _cut(found[0], LONGEST_VALUE) if len(found[0]) > LONGEST_VALUE else found[0], sentence)
    return _cut(cut, _LONGEST_SENTENCE) if len(cut) > _LONGEST_SENTENCE else cut


def guarded(cell: str) -> str:
    """Return a cell of a CSV file in a safe form: a formula gets an apostrophe in front, so that a spreadsheet does not run it."""
    return f"'{visible(cell)}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else visible(cell)


def _cut(text: str, length: int) -> str:
    kept = length - 40  # room for the note, so that a text that is cut is never cut again
    return f"{text[: kept - 1]}… ({len(text) - kept} more characters){text[-1]}"
