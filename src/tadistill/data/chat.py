"""Apply chat templates: write a conversation as text, and find the token that ends an answer.

A template is a Jinja program that comes with a tokenizer. Some templates raise an error, leave out a role, or do not write the start of an
answer. This module reports the first two cases, and adds a missing start.
"""

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tadistill.data.chat_jinja import THINKING, attempted, compiled, text_of
from tadistill.errors import DataError, ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER, _DATE = "an answer 7919", "a date 7919"  # texts that no template contains
_MARK = re.compile(r"\b(text|thinking|call|tool)_(\d+)_(\d+)_7919\b")  # in place of a text, or the name of a call or a tool
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a tag that transformers adds to Jinja; it marks what the model wrote
_START, _END = "\ufdd0", "\ufdd1"  # around a marked part; Unicode noncharacters, which no text contains
THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
"""Thinking at the beginning of a text, in tags."""


def render(
    messages: Seq[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    tools: Seq[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return a conversation as text, up to the point where the assistant's answer begins.

    Some templates do not write the start of an answer, even on request. This function then adds it.

    Args:
        where: the data set and the row, for error messages.
        tools: descriptions of the functions that the assistant may call.
        settings: further variables of the template.

    Raises:
        ModelError: the template is not valid Jinja.
        DataError: the template refuses the conversation, or leaves out a turn, a tool or a tool call.
    """
    text = written(messages, tokenizer, where, tools, settings, prompt=True)
    _check_parts(messages, tokenizer, where, tools, settings or {})
    return text + _header(default_template(tokenizer.chat_template), _texts(tokenizer.special_tokens_map))


def written(
    messages: Seq[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    tools: Seq[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    prompt: bool = False,
) -> str:
    """Return a whole conversation as text, with the template's own start of an answer at its end if `prompt` is True.

    Other arguments and errors are those of `render`, which also checks the text.
    """
    from jinja2 import TemplateError, TemplateSyntaxError  # here: most data sets need no chat template

    roles = tuple(str(m.get("role")) for m in messages)
    try:
        return text_of(template_for(tokenizer, tools), messages, {**tokenizer.special_tokens_map, **(settings or {})}, tools, prompt=prompt)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template of the tokenizer {tokenizer.name_or_path} is not valid Jinja (line {error.lineno}: {error.message}); "
            "correct `chat_template` in its files, or set `data.template` to alpaca or plain"
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        given = " and data.chat_template_kwargs" if settings else ""
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the turns {', '.join(roles)}{given} ({reason}); change or delete the row, "
            "or use a tokenizer with another template"
        ) from error


def marked(
    messages: Seq[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Seq[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[tuple[int, int]] | None:
    """Return the parts of `written(...)` that the chat template marks with {% generation %}, as (start, end) in characters. Return None if
    the template has no such tag."""
    template = template_for(tokenizer, tools)
    if not _GENERATION.search(template):
        return None
    found, length = list[tuple[int, int]](), 0
    text = text_of(template, messages, {**tokenizer.special_tokens_map, **(settings or {})}, tools, marks=(_START, _END))
    for piece in re.split(f"({_START}.*?{_END})", text, flags=re.DOTALL):
        inside = piece.startswith(_START)
        size = len(piece) - 2 * inside
        found += [(length, length + size)] if inside else []
        length += size
    return found


def check_settings(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any]) -> None:
    """Check that the chat template uses every variable in `settings`.

    Raises:
        ModelError: the template does not use a variable.
    """
    if not settings or not tokenizer.chat_template:
        return
    known = _variables(template_for(tokenizer, ())) | _variables(template_for(tokenizer, [{}]))
    for name in settings:
        if name not in known:
            raise ModelError(
                f"data.chat_template_kwargs sets `{name}`, but the chat template of the tokenizer {tokenizer.name_or_path} has no such "
                f"variable; {did_you_mean(name, known, 'correct the name, or remove it')}"
            )


def without_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without its thinking, in fields and at the beginning of its text."""
    kept = {name: value for name, value in message.items() if name not in THINKING}
    content = kept.get("content")
    if isinstance(content, str):
        kept["content"] = without_thought(content)
    return kept


def without_thought(text: str) -> str:
    """Return a text without the thinking in tags at its beginning."""
    found = THOUGHT.match(text)
    return text[found.end() :] if found else text


def missing(part: str, turn: int, where: str) -> DataError:
    """Return the error about a part of a message that the chat template leaves out: "the text", "the thinking" or a call."""
    drop = "set data.thinking: drop, " if part == "the thinking" else ""
    return DataError(
        f"{where}: the tokenizer's chat template leaves out {part} of turn {turn + 1} of `messages`; use a tokenizer with another "
        f"template, {drop}or delete the row"
    )


def called(functions: Seq[Mapping[str, Any]]) -> list[str]:
    """Return the function names in a list of tools, or in a list of tool calls."""
    found = [each.get("function", each) for each in functions]
    return [str(each["name"]) for each in found if isinstance(each, Mapping) and each.get("name")]


def closing(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token with which the tokenizer's chat template ends an answer. If there is no such token, return the EOS id.

    Raises:
        ModelError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, but every response must end with one; set `eos_token` in the tokenizer's configuration"
        )
    added: Any = tokenizer.added_tokens_encoder
    turn = end_of_turn(default_template(tokenizer.chat_template), added, tokenizer.special_tokens_map)
    return int(tokenizer.eos_token_id) if turn is None else turn  # type: ignore[arg-type]


def end_of_turn(template: str | None, tokens: Mapping[str, int], specials: Mapping[str, Any]) -> int | None:
    """Return the id of the token that a chat template writes right after an answer. Return None if it writes no single token there.

    Args:
        tokens: maps the added and special tokens of the tokenizer to their ids.
        specials: maps names such as `bos_token`, which templates can use, to the texts of these tokens.
    """
    text = _rendered(template, (("user", "hello"), ("assistant", _ANSWER)), dict(_texts(specials)), False)
    if text is None or _ANSWER not in text:
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    found = [token for token in tokens if token and rest.startswith(token)]
    return tokens[max(found, key=len)] if found else None


def opening(template: str | None, variables: Mapping[str, Any]) -> str:
    """Return the text that a chat template writes between its generation prompt and an answer, such as an empty thought. It is empty if
    there is none, or if the template fails.

    Args:
        variables: the texts of special tokens, and further variables of the template.
    """
    turns = (("user", "hello"), ("assistant", _ANSWER))
    prompt, whole = _rendered(template, turns[:1], variables, True), _rendered(template, turns, variables, False)
    if prompt is None or whole is None or not whole.startswith(prompt):
        return ""
    found = whole[len(prompt) :]
    return found.partition(_ANSWER)[0] if _ANSWER in found else ""


def dated(template: str | None, variables: Mapping[str, Any]) -> bool:
    """Return True if a chat template writes the current date into a prompt. `variables` are those of `opening`."""
    text = _rendered(template, (("user", "hello"),), {**variables, "strftime_now": lambda form: _DATE}, True)
    return text is not None and _DATE in text


def default_template(given: Any) -> str | None:
    """Return the chat template for conversations without tools, or the one for tools if it is the only one. `given` is one template, or
    several templates by name."""
    if isinstance(given, list):  # as in tokenizer_config.json
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    found = given.get("default") or given.get("tool_use") if isinstance(given, dict) else given
    return found if isinstance(found, str) else None


def template_for(tokenizer: "PreTrainedTokenizerBase", tools: Seq[Mapping[str, Any]]) -> str:
    """Return the chat template for a conversation with these tools, or without any. Empty if the tokenizer has none.

    Some tokenizers have a second template for conversations with tools.
    """
    given: Any = tokenizer.chat_template
    if isinstance(given, dict):
        given = (tools and given.get("tool_use")) or given.get("default")
    return given or ""


def _texts(specials: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, text) for name, text in specials.items() if isinstance(text, str)))


@lru_cache
def _header(template: str | None, specials: tuple[tuple[str, str], ...]) -> str:
    prompt = (("user", "hello"),)
    plain, prompted = (_rendered(template, prompt, dict(specials), flag) for flag in (False, True))
    answered = _rendered(template, (*prompt, ("assistant", _ANSWER)), dict(specials), False)
    if plain is None or plain != prompted or answered is None or _ANSWER not in answered or not answered.startswith(plain):
        return ""
    header = answered[len(plain) :].partition(_ANSWER)[0]
    return header if header.strip() else ""  # "[INST] hello [/INST] an answer": the prompt ends where the answer begins


def _check_parts(
    messages: Seq[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str, tools: Seq[Any], settings: Mapping[str, Any]
) -> None:
    given = _with_marks(messages), _renamed(tools, "tool", 0), {**tokenizer.special_tokens_map, **settings}
    for kind, turn, number in _left_out(template_for(tokenizer, tools), json.dumps(given, default=str)):
        names, role = called(messages[turn].get("tool_calls") or ()), messages[turn].get("role")
        what, fix = f"the turn of role `{role}`", "move its text into a user's turn, or use a tokenizer with another template"
        if kind == "tool":
            what = f"the tool `{called([tools[number]])[0]}`"
            fix = "use a tokenizer whose template writes tools, or remove `tools` from `columns` of the data set"
        elif names:
            tags_alone = kind == "text" and not str(without_thinking(messages[turn]).get("content") or "").strip()
            part = f"the call of `{names[number]}`" if kind == "call" else f"the {'thinking' if tags_alone else kind}"
            raise missing(part, turn, where)
        raise DataError(f"{where}: the tokenizer's chat template leaves out {what}; {fix}")


def _with_marks(messages: Seq[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # marks in place of texts, and of the names, arguments and ids of calls; a template may read other fields
    found, ids = list[dict[str, Any]](), dict[str, str]()
    for turn, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        thought = f"thinking_{turn}_0_7919" if calls else "a thought"  # beside a call it is no thinking of an earlier answer
        changed: dict[str, Any] = {name: thought for name in THINKING if message.get(name)}
        if str(message.get("content") or "").strip() or not calls:  # some templates write calls only if there is no text
            changed["content"] = f"text_{turn}_0_7919"
        if calls:
            changed["tool_calls"] = _renamed(calls, "call", turn)
            ids |= {str(call["id"]): _id(turn, i) for i, call in enumerate(calls) if call.get("id")}
        if message.get("tool_call_id"):
            changed["tool_call_id"] = ids.get(str(message["tool_call_id"]), "000007919")
        found.append({**message, **changed})
    return found


def _id(turn: int, number: int) -> str:
    return f"7919{turn:03}{number:02}"  # nine digits: Mistral's templates accept no other length


def _renamed(functions: Seq[Mapping[str, Any]], kind: str, turn: int) -> list[dict[str, Any]]:
    # tools or tool calls with marks in place of their names, and of the ids and the values of arguments of calls
    found = list[dict[str, Any]]()
    for i, each in enumerate(functions):
        inner = each.get("function", each)
        changed = {"name": f"{kind}_{turn}_{i}_7919"} if called([each]) else {}
        if kind == "call" and isinstance(arguments := inner.get("arguments"), str | Mapping):
            marks = dict.fromkeys(arguments if isinstance(arguments, Mapping) else ("a",), f"given_{turn}_{i}_7919")
            changed |= {"arguments": json.dumps(marks) if isinstance(arguments, str) else marks}
        outer = {"id": _id(turn, i)} if kind == "call" and each.get("id") else {}
        found.append({**each, **outer} | ({"function": {**inner, **changed}} if changed and "function" in each else changed))
    return found


@lru_cache(maxsize=1024)
def _left_out(template: str, given: str) -> list[tuple[str, int, int]]:
    # kind, turn and number of each mark that the template leaves out; `given` has messages, tools and variables as JSON
    messages, tools, variables = json.loads(given)
    text = attempted(template, messages, variables, tools, prompt=True)
    if text is None:  # a template may refuse the marks
        return []
    text = text.lower()  # a template may write names in capitals
    source, found = json.dumps([messages, tools]), list[tuple[str, int, int]]()
    for mark in _MARK.finditer(source):
        kind, turn, number = mark[1], int(mark[2]), int(mark[3])
        written = mark[0] in text
        if kind == "call":  # Kimi K2 Thinking's writes the id alone; without the arguments, the id is that of a tool's answer
            arguments = f"given_{turn}_{number}_7919"
            written |= _id(turn, number) in text and (arguments in text or arguments not in source)
        elif kind != "tool" and messages[turn].get("tool_calls"):  # gpt-oss's drops both like thinking, as soon as an answer follows
            written = written or mark[0] in (attempted(template, messages[: turn + 1], variables, tools) or "").lower()
        found += [] if written else [(kind, turn, number)]
    return found


def _rendered(template: str | None, turns: Seq[tuple[str, str]], variables: Mapping[str, Any], prompt: bool) -> str | None:
    return attempted(template or "", [{"role": role, "content": text} for role, text in turns], variables, prompt=prompt)


@lru_cache
def _variables(template: str) -> frozenset[str]:
    from jinja2 import TemplateError, meta

    try:
        environment = compiled("").environment
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateError:  # `render` reports the error
        return frozenset()
