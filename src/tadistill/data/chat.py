"""Chat templates: how they write a conversation as text, and which token ends an answer.

A template is a Jinja program that comes with a tokenizer. Some templates raise an error, leave out a role, or do not write the start of an
answer.
"""

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tadistill.errors import DataError, ModelError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

_ANSWER = "an answer 7919"  # text that no template contains
_GENERATION = re.compile(r"(\{%-?)\s*(end)?generation\s*(-?%\})")  # a tag of transformers, which only marks a part


def render(messages: Seq[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    """Return a conversation as text, up to the point where the assistant's answer begins.

    Some templates do not write the start of an answer, even on request. This function then adds it.

    Args:
        where: the data set and the row, for error messages.

    Raises:
        ModelError: the template is not valid Jinja.
        DataError: the template refuses the conversation, or leaves out a turn.
    """
    from jinja2 import TemplateError, TemplateSyntaxError  # here: most data sets need no chat template

    roles = tuple(str(m.get("role")) for m in messages)
    try:
        text = str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True))
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template of the tokenizer {tokenizer.name_or_path} is not valid Jinja (line {error.lineno}: {error.message}); "
            "correct `chat_template` in its files, or set `data.template` to alpaca or plain"
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the turns {', '.join(roles)} ({reason}); change or delete the row, or use a "
            "tokenizer with another template"
        ) from error
    template, specials = _template(tokenizer), _texts(tokenizer.special_tokens_map)
    for role in _left_out(template, roles, specials):
        raise DataError(
            f"{where}: the tokenizer's chat template leaves out the turn of role `{role}`; move its text into a user's turn, or use a "
            "tokenizer with another template"
        )
    return text + _header(template, specials)


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
    turn = end_of_turn(_template(tokenizer), added, tokenizer.special_tokens_map)
    return int(tokenizer.eos_token_id) if turn is None else turn  # type: ignore[arg-type]


def end_of_turn(template: str | None, tokens: Mapping[str, int], specials: Mapping[str, Any]) -> int | None:
    """Return the id of the token that a chat template writes right after an answer. Return None if it writes no single token there.

    Args:
        tokens: maps the added and special tokens of the tokenizer to their ids.
        specials: maps names such as `bos_token`, which templates can use, to the texts of these tokens.
    """
    text = _rendered(template, (("user", "hello"), ("assistant", _ANSWER)), _texts(specials), False)
    if text is None or _ANSWER not in text:
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    found = [token for token in tokens if token and rest.startswith(token)]
    return tokens[max(found, key=len)] if found else None


def default_template(given: Any) -> str | None:
    """Return the chat template for conversations without tools. `given` is one template, or several templates by name."""
    if isinstance(given, list):  # as in tokenizer_config.json
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    found = given.get("default") if isinstance(given, dict) else given
    return found if isinstance(found, str) else None


def _template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    return default_template(tokenizer.chat_template)


def _texts(specials: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, text) for name, text in specials.items() if isinstance(text, str)))


@lru_cache
def _header(template: str | None, specials: tuple[tuple[str, str], ...]) -> str:
    prompt = (("user", "hello"),)
    plain, prompted = (_rendered(template, prompt, specials, flag) for flag in (False, True))
    answered = _rendered(template, (*prompt, ("assistant", _ANSWER)), specials, False)
    if plain is None or plain != prompted or answered is None or _ANSWER not in answered or not answered.startswith(plain):
        return ""
    header = answered[len(plain) :].partition(_ANSWER)[0]
    return header if header.strip() else ""  # "[INST] hello [/INST] an answer": the prompt ends where the answer begins


@lru_cache(maxsize=1024)
def _left_out(template: str | None, roles: tuple[str, ...], specials: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    marks = [f"text {i} 7919" for i in range(len(roles))]
    text = _rendered(template, tuple(zip(roles, marks, strict=True)), specials, True)
    return () if text is None else tuple(role for role, mark in zip(roles, marks, strict=True) if mark not in text.lower())


def _rendered(template: str | None, turns: tuple[tuple[str, str], ...], specials: tuple[tuple[str, str], ...], prompt: bool) -> str | None:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        compiled = _compiled(template or "")
        return compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **dict(specials))
    except Exception:  # a stranger's program may raise anything; what is wrong with it shows in the data's own rows
        return None


@lru_cache
def _compiled(template: str) -> "Template":
    import jinja2.ext  # not transformers: planning must start quickly
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(_GENERATION.sub(lambda m: f"{m[1]} {'endif' if m[2] else 'if true'} {m[3]}", template))
