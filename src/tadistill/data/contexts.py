"""Write the teacher's own prompts (`context` of a method) as text, and add their token ids to encoded rows.

`messages` returns the prompt for a teacher behind an API, with or without a `context`.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tadistill.config.method_parts import TeacherContext
from tadistill.data import chat
from tadistill.data.prompts import Rules, before_answer
from tadistill.data.rows import Example
from tadistill.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tadistill.data.encoding import Encoded


class Row(NamedTuple):
    """A row of the training set: its token ids, its example, and the student's prompt as text."""

    encoded: "Encoded"
    example: Example
    prompt: str
    chats: bool
    """True if a chat template writes the student's prompt."""


def behind(
    rows: Seq[Row],
    rules: Rules,
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Callable[[list[str], list[bool]], list[list[int]]],
    *,
    name: str,
) -> tuple[list["Encoded"], dict[str, int]]:
    """Add the teacher's own prompts to encoded rows. Return the rows that are kept, and a dict with the number of too long prompts.

    The key of the dict is a field of `Counts`: `cut_context` if too long prompts are cut, else `long_context`.

    Args:
        tokens: turns texts into token ids. Its second argument has True for each text that a chat template has written.
        name: the data set, for error messages.

    Raises:
        DataError, ModelError: as in `render`; or a prompt is empty, or too long although `rules.long_prompts` is `refuse`.
    """
    context, cut = rules.context, rules.long_prompts == "cut"
    assert context is not None
    chats = [_in_chat(context, row.chats) for row in rows]
    places = [f"{name}, row {row.encoded.row + 1}" for row in rows]
    prompts = [(r.example, r.prompt, c, w) for r, c, w in zip(rows, chats, places, strict=True)]
    texts = [render(context, e, p, tokenizer, chats=c, where=w, settings=rules.chat_template_kwargs) for e, p, c, w in prompts]
    ids, most = tokens(texts, chats), context.max_prompt
    if empty := [where for where, prompt in zip(places, ids, strict=True) if not prompt]:
        raise DataError(f"{empty[0]}: the teacher's prompt is empty; write more than placeholders in context.template")
    over = [(where, len(prompt)) for where, prompt in zip(places, ids, strict=True) if len(prompt) > most]
    if over and rules.long_prompts == "refuse":
        raise DataError(
            f"{over[0][0]}: the teacher's prompt has {over[0][1]} tokens, more than context.max_prompt ({most}); raise this limit, or set "
            "data.long_prompts to cut or drop"
        )
    kept = [(r.encoded, prompt[:most]) for r, prompt in zip(rows, ids, strict=True) if cut or len(prompt) <= most]
    return [replace(e, teacher_prompt=tuple(prompt)) for e, prompt in kept], {"cut_context" if cut else "long_context": len(over)}


def _in_chat(context: TeacherContext, student: bool) -> bool:
    # True if the chat template writes the teacher's prompt; `student`: True if it writes the student's prompt
    return student or context.system is not None if context.chat is None else context.chat


def render(
    context: TeacherContext,
    example: Example,
    prompt: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chats: bool,
    where: str = "data",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the teacher's prompt for an example as text.

    Args:
        prompt: the whole prompt of the student.
        chats: True if the tokenizer's chat template writes the teacher's prompt.
        where: the name of the row in messages.
        settings: variables of the chat template.

    Raises:
        DataError: the row has no column for a placeholder, or the chat template refuses the turns.
        ModelError: the tokenizer has no chat template.
    """
    text = None if context.template is None else context.filled(_columns(context, example, prompt, where))
    if not chats:
        assert text is not None, "no chat template writes the teacher's prompt, and context.template is missing; set context.template"
        return text
    if not tokenizer.chat_template:
        raise ModelError(
            f"{where}: the `context` needs a chat template, but the tokenizer has none; set `tokenizer:` of the models to one that has a "
            "chat template, or set context.chat: false"
        )
    return chat.render(_turns(context, example, text), tokenizer, where, example.tools, settings)


def _turns(context: TeacherContext, example: Example, text: str | None) -> list[dict[str, Any]]:
    turns = before_answer(example)
    if text is not None:
        turns[-1] = turns[-1] | {"content": text}
    if context.system is not None:
        turns = [{"role": "system", "content": context.system}, *(turn for turn in turns if turn["role"] != "system")]
    return turns


def messages(example: Example, context: TeacherContext | None, where: str = "data") -> list[dict[str, Any]]:
    """Return the messages for a teacher behind an API. An instruction, or a whole prompt, becomes one message of a user.

    Raises:
        DataError: the row has no column for a placeholder of the context.
    """
    if context is None:
        return before_answer(example)
    text = None if context.template is None else context.filled(_columns(context, example, None, where))
    return _turns(context, example, text)


def _columns(context: TeacherContext, example: Example, prompt: str | None, where: str) -> Mapping[str, str]:
    found = {**example.extra, "output": example.references[0]} | ({} if prompt is None else {"prompt": prompt})
    if example.messages:
        found["instruction"] = example.messages[-1].get("content") or ""
    elif not example.verbatim:
        found |= {"instruction": example.instruction, "input": example.input}
    if missing := [name for name in context.columns if name not in found]:
        raise DataError(
            f"{where}: context.template names `{{{missing[0]}}}`, but the row has only {', '.join(found)}; correct the template, or add "
            f"the column to data.train.extra, for instance `extra: [{missing[0]}]`"
        )
    return found
