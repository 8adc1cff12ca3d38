"""Convert the rows of a data set into examples (`Example`).

A row has one of three forms. It contains an instruction, input and output; or a prompt and a completion; or messages. The columns
`tools`, `choices`, `facts` and those of right answers (`data.answers`) are read only if the recipe names them (`columns: {choices:
choices}`), because a user's data often has columns of these names with other contents.
"""

import json
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tadistill.config import DataRef
from tadistill.data import tinyworld
from tadistill.data.answers import RULES, as_text
from tadistill.data.chat_jinja import THINKING
from tadistill.errors import DataError

Facts = tuple[tuple[str, tuple[str, ...]], ...]
"""The facts that an answer must state, as pairs (value, rivals). An answer states a fact if it contains the value and none of the rivals,
which are the wrong values."""

Form = Literal["instruction", "messages", "prompt"]
"""The form of a row: an instruction around which a template is put, a conversation, or a whole prompt."""

OPTIONAL = ("choices", "facts")
"""Columns that are read only if the recipe names them in `columns`."""

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 80, 80, 3  # the limits of a value in a message


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answers."""

    instruction: str
    input: str
    references: tuple[str, ...]
    messages: tuple[dict[str, Any], ...] = ()
    """The messages before the answer, if the row is a conversation. In this case, `instruction` and `input` are empty."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last message of a conversation, or empty. Its content is the only reference. Without content, the reference is an empty text."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of the functions that the assistant may call, if the recipe names their column."""
    verbatim: bool = False
    """True if `instruction` is already the whole prompt. No template is then added."""
    facts: Facts = ()
    choices: tuple[str, ...] = ()
    """All possible answers of a classification task, including the references. Empty for any other task."""
    answers: Mapping[str, Any] = field(default_factory=dict)
    """The right answer for each rule of `data.answers` that the recipe names."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """The texts of further columns that the recipe names (`extra`)."""
    line: int | None = field(default=None, compare=False)
    """The line of the row in its file, from 1. None if the data set is not a local file."""


def example(row: dict[str, Any], ref: DataRef, index: int, line: int | None = None) -> Example:
    """Return the example that a row contains.

    Args:
        index: the number of the row in the split, from 0.
        line: the line of the row in its file, from 1.

    Raises:
        DataError: a column is missing, or its value is not text.
    """
    where = where_of(ref, index, line)
    choices = _choices(ref.choices or _optional("choices", row, ref, where), where)
    more: dict[str, Any] = {"choices": choices, "facts": _facts(_optional("facts", row, ref, where), where), "line": line}
    ruled = {name: _named(column, f"columns: {{{name}: {column}}}", row, where) for name, column in ref.columns.items() if name in RULES}
    more["answers"] = {name: RULES[name].read(value, choices, where) for name, value in ruled.items()}
    more["extra"] = {name: _extra(name, row, where) for name in ref.extra}
    form = form_of(row, ref)
    if form == "messages":
        turns, answer = _conversation(_get("messages", row, ref), ref, where)
        said = "" if answer.get("content") is None and answer.get("tool_calls") else answer.get("content")
        more |= {"last": answer, "tools": _tools(_optional("tools", row, ref, where), where)}
        return Example("", "", _references(said, choices, where), messages=turns, **more)
    if form == "instruction":
        given = _get("input", row, ref)
        instruction = text(ref.instruction or _get("instruction", row, ref), "instruction", where)
        references = _references(_answer(row, ref, "output", where), choices, where)
        return Example(instruction, "" if given is None else text(given, "input", where), references, **more)
    prompt = _get("prompt", row, ref)
    if prompt is None:
        named = [f"`{column}` (the {name})" for name in ("instruction", "prompt", "messages") if (column := ref.columns.get(name))]
        raise DataError(no_column(row, " or ".join(named) or "`instruction`, `prompt` or `messages`", where))
    answer = _answer(row, ref, "completion", where)
    return Example(text(prompt, "prompt", where), "", _references(answer, choices, where), verbatim=True, **more)


def form_of(row: dict[str, Any], ref: DataRef) -> Form:
    """Return the form of a row: an instruction, a conversation or a whole prompt."""
    messages = _get("messages", row, ref)
    instructed = ref.instruction is not None or _get("instruction", row, ref) is not None
    # in a row with an instruction, a column `messages` without turns is a column of the user's own
    turns = isinstance(messages, list) and bool(messages) and all(isinstance(turn, dict) for turn in messages)
    if messages is not None and (turns or not instructed or "messages" in ref.columns):
        return "messages"
    return "instruction" if instructed else "prompt"


def where_of(ref: DataRef, index: int, line: int | None) -> str:
    """Return the name of a row for messages: the data set and the `place` of the row."""
    return f"data set `{ref.load}`, {place(index, line)}"


def place(index: int, line: int | None) -> str:
    """Return the place of a row for messages: its line in its file, or, without a file, its number in the split. `index` counts rows from
    0."""
    return f"row {index + 1}" if line is None else f"line {line}"


def no_column(row: dict[str, Any], wanted: str, where: str, *, corpus: bool = False) -> str:
    """Return the error message for a row without the column `wanted`, or for a document of a `corpus`."""
    names = ", ".join(map(str, row)).encode("utf-8", "backslashreplace").decode()
    example = "{text: body}" if corpus else "{instruction: question, output: answer}"
    fix = f"Name the column in `columns` of this data set, for instance columns: {example}"
    if "conversations" in row and not corpus:  # of ShareGPT
        fix = 'Write the turns as messages: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    return f"{where} has no column {wanted}; its columns are {names[:300]}. {fix}"


def text(value: Any, what: str, where: str) -> str:
    """Return `value` if it is a string that can be written as UTF-8. Otherwise raise a DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {shown(value)}; it must be a string")
    _check_unicode(value, what, where)
    return value


def shown(value: Any) -> str:
    """Return a value as text for a message. A long value is shortened."""
    return _SHORT.repr(value)


def _check_unicode(value: str, what: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} has half of a surrogate pair (\\u{ord(value[error.start]):04x} at character {error.start + 1}); write "
            "the whole character, or delete the row"
        ) from error


def _get(name: str, row: dict[str, Any], ref: DataRef) -> Any:
    return row.get(ref.columns.get(name, name))  # type: ignore[call-overload]


def _optional(name: str, row: dict[str, Any], ref: DataRef, where: str) -> Any:
    named = ref.columns.get(name)  # type: ignore[call-overload]
    if named and named not in row:
        raise DataError(no_column(row, f"`{named}` (the {name})", where))
    return row.get(named or name) if named or ref.load in tinyworld.SPLITS else None


def _named(column: str, key: str, row: dict[str, Any], where: str) -> Any:
    if column not in row:
        raise DataError(f"{where} has no column `{column}`, which the recipe reads ({key}); add the column to the row, or delete the row")
    return row[column]


def _extra(name: str, row: dict[str, Any], where: str) -> str:
    value = _named(name, f"extra: [{name}]", row, where)
    if isinstance(value, list | tuple) and value:
        return "\n\n".join(text(part, f"a part of the column `{name}`", where) for part in value)
    return text(as_text(value) or value, f"the column `{name}`", where)


def _answer(row: dict[str, Any], ref: DataRef, wanted: str, where: str) -> Any:
    column = ref.columns.get(wanted, wanted)  # type: ignore[call-overload]
    if wanted == "output" and row.get(column) is None and "outputs" in row:
        column = "outputs"
    if column not in row:
        raise DataError(no_column(row, f"`{wanted}` (the response)", where))
    return row[column]


def _conversation(messages: Any, ref: DataRef, where: str) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    if ref.instruction is not None:
        raise DataError(
            f"{where} has messages, which contain their own instructions; remove the key `instruction` of this data set from the recipe"
        )
    turns = isinstance(messages, list) and len(messages) >= 2 and all(isinstance(turn, dict) for turn in messages)
    if turns and all(turn.get("role") != "assistant" for turn in messages):
        raise DataError(
            f"{where}: `messages` has no turn of the role assistant, so there is nothing to learn; add the assistant's answer, or delete "
            "the row"
        )
    if not turns or messages[-1].get("role") != "assistant":
        raise DataError(
            f"{where}: `messages` must be a list of at least two messages, of which the last one has the role assistant; write each one as "
            '{"role": "user", "content": "…"}'
        )
    *prompt, answer = (_turn(turn, f"turn {i} of messages", where) for i, turn in enumerate(messages, 1))
    for i, turn in enumerate(prompt, 1):
        if turn.get("content") is None and turn["role"] in ("user", "system"):  # many templates would write "None"
            raise DataError(f"{where}: turn {i} of `messages` has no content; give it a text (it may be empty), or delete the row")
    return tuple(prompt), answer


def _turn(turn: dict[str, Any], what: str, where: str) -> dict[str, Any]:
    if not isinstance(turn.get("role"), str) or not turn["role"]:
        raise DataError(f"{where}: {what} has the role {shown(turn.get('role'))}; it must be a string such as user, assistant or system")
    content = turn.get("content")
    if isinstance(content, list):
        turn = turn | {"content": "".join(_part(part, what, where) for part in content)}
    elif not isinstance(content, str | None):
        raise DataError(f"{where}: the content of {what} is {shown(content)}; it must be a string, or a list of text parts")
    if (calls := turn.get("tool_calls")) and not (isinstance(calls, list | tuple) and all(map(_is_call, calls))):
        raise DataError(
            f"{where}: `tool_calls` of {what} is {shown(calls)}; write a list of calls, as in "
            '[{"type": "function", "function": {"name": "…", "arguments": {…}}}], or delete the row'
        )
    for name in THINKING:
        if not isinstance(turn.get(name), str | None):
            raise DataError(f"{where}: `{name}` of {what} is {shown(turn[name])}; write a string or null, or delete the row")
    _check_unicode(json.dumps(turn, ensure_ascii=False, default=str), what, where)
    return turn


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def _part(part: Any, what: str, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(
        f"{where}: the content of {what} has the part {shown(part)}, but every part must be text, as in {{type: text, text: …}}; delete "
        "the row"
    )


def _tools(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(given, str):  # as some data sets of the Hub store it
        try:
            given = json.loads(given)
        except ValueError as error:
            raise DataError(
                f"{where}: the column of tools is {shown(given)}, which is not valid JSON ({error}); correct the row"
            ) from error
    if given is None or given == []:
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(tool, dict) for tool in given):
        raise DataError(f"{where}: the column of tools contains {shown(given)}; write a list of JSON schemas of functions")
    _check_unicode(json.dumps(given, ensure_ascii=False, default=str), "a tool", where)
    return tuple(given)


def _facts(given: Any, where: str) -> Facts:
    if given is None:
        return ()
    found = []
    for fact in given if isinstance(given, list | tuple) else (given,):
        pair = isinstance(fact, list | tuple) and len(fact) == 2 and isinstance(fact[0], str) and isinstance(fact[1], list | tuple)
        if not pair or not fact[0] or not all(isinstance(rival, str) for rival in fact[1]):
            raise DataError(f"{where}: the column of facts contains {shown(fact)}; write each fact as [value, [wrong values]]")
        for value in (fact[0], *fact[1]):
            if not value.isascii():  # a fact may have a hundred wrong values
                _check_unicode(value, "a fact", where)
        found.append((fact[0], tuple(fact[1])))
    return tuple(found)


def _choices(given: Any, where: str) -> tuple[str, ...]:
    if given is None or given == ():
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(c, str) and c for c in given):
        raise DataError(f"{where}: choices are {shown(given)}; write a list of strings, none of them empty")
    for choice in given:
        _check_unicode(choice, "a choice", where)
    if len(set(given)) < max(2, len(given)):
        raise DataError(f"{where}: choices are {', '.join(given) or 'an empty list'}; give at least two different choices")
    return tuple(given)


def _references(answer: Any, choices: tuple[str, ...], where: str) -> tuple[str, ...]:
    if answer is None or (isinstance(answer, list | tuple) and not answer):
        what = "null" if answer is None else "an empty list"
        raise DataError(f"{where}: the response is {what}; give a string (it may be empty), or delete the row")
    answers = answer if isinstance(answer, list | tuple) else (answer,)
    known = f"the choices are {', '.join(choices)}"
    if choices:
        wrong = [a for a in answers if isinstance(a, int) and not 0 <= a < len(choices)]
        if wrong:
            raise DataError(
                f"{where}: label {shown(wrong[0])} is outside 0 to {len(choices) - 1}; {known}. Correct the label. Some test sets write -1 "
                "in every row, because their labels are secret; then use another split"
            )
        answers = [choices[a] if isinstance(a, int) else a for a in answers]
    for answer in answers:
        if not isinstance(answer, str):
            fix = (
                known
                if choices
                else "if it is a label, list all labels in `choices` of this data set, or name the column of labels in `columns`"
            )
            raise DataError(f"{where}: the response is {shown(answer)}; it must be a string or a list of strings ({fix})")
        _check_unicode(answer, "the response", where)
        if choices and answer not in choices:
            raise DataError(f"{where}: the reference `{answer[:200]}` is not one of the choices; {known}")
    return tuple(answers)


def beyond_ascii(text: str) -> float:
    """Return the share (0 to 1) of non-ASCII characters among the letters, digits and symbols of a text."""
    found = [c for c in text.lower() if c.isalnum() or is_symbol(c)]
    return sum(not c.isascii() for c in found) / len(found) if found else 0.0


def is_symbol(c: str) -> bool:
    """Return True for a symbol that is not ASCII, such as an emoji or an arrow. Return False for punctuation."""
    return not c.isascii() and unicodedata.category(c)[0] == "S"


def repeated_grams(response: Sequence[int]) -> tuple[int, int]:
    """Return the number of 4-grams of a response's tokens, and how many of them occurred earlier in the response."""
    grams = [tuple(response[i : i + 4]) for i in range(len(response) - 3)]
    return len(grams), len(grams) - len(set(grams))
