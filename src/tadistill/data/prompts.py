"""Write the prompt of an example as text: the student's, and the teacher's own prompt (`context` of a method).

The template around an instruction is the Alpaca prompt, a line break, or the tokenizer's chat template. `messages` returns the prompt for a
teacher behind an API, with or without a `context`.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tadistill.config.method_parts import TeacherContext
from tadistill.data import chat
from tadistill.data.chat_jinja import thinking
from tadistill.data.rows import Example
from tadistill.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_FEWEST_LETTERS = 10  # of the template's letters in a prompt: a tokenizer of words may give back only "is that a a that the"
_WORDS = r"\s+".join
OPEN, CLOSE = "<think>", "</think>"
"""The marks at the beginning and the end of an assistant's thinking in a text."""
_ALPACA = re.compile(
    rf"(?:{_WORDS(map(re.escape, _NO_INPUT.split()))}|{_WORDS(map(re.escape, _WITH_INPUT.split()))})\s*"
    r"### Instruction:\s*(?P<instruction>.*?)(?:\n\s*### Input:\s*(?P<input>.*?))?\s*### Response:\s*",
    re.DOTALL,
)


def in_chat(example: Example, template: str) -> bool:
    """Return True if the prompt of this example is written by the tokenizer's chat template."""
    return not example.verbatim and (template == "chat" or bool(example.messages))


def render(
    example: Example, template: str, tokenizer: "PreTrainedTokenizerBase", where: str = "data", settings: Mapping[str, Any] | None = None
) -> str:
    """Return the prompt of an example as text.

    Args:
        template: alpaca, chat or plain.
        where: the name of the row in messages.
        settings: variables of the chat template (`data.chat_template_kwargs`).
    """
    if example.verbatim:
        return example.instruction
    if in_chat(example, template):
        check_template(example, tokenizer, where)
        return chat.render(before_answer(example), tokenizer, where, example.tools, settings)
    if template == "plain":
        return "\n".join(filter(None, (example.instruction, example.input))) + "\n"
    if example.input:
        body = f"### Instruction:\n{example.instruction}\n\n### Input:\n{example.input}\n\n"
        return f"{_WITH_INPUT}\n\n{body}### Response:\n"
    return f"{_NO_INPUT}\n\n### Instruction:\n{example.instruction}\n\n### Response:\n"


def check_template(example: Example, tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    """Raise a ModelError if the tokenizer has no chat template. The example must be one whose prompt a chat template writes (`in_chat`)."""
    if not chat.template_for(tokenizer, example.tools):
        why = "its rows are conversations" if example.messages else "data.template is chat"
        raise ModelError(
            f"{where}: {why}, but the tokenizer has no chat template; set `tokenizer:` of the models to one that has a chat template"
            + ("" if example.messages else ", or use data.template=alpaca or plain")
        )


def before_answer(example: Example) -> list[dict[str, Any]]:
    """Return the messages before the answer. An instruction and its input become one message of a user."""
    if example.messages:
        return [*example.messages]
    return [{"role": "user", "content": "\n\n".join(filter(None, (example.instruction, example.input)))}]


def task_of(example: Example) -> tuple[str, str]:
    """Return the instruction and the input of an example as text for people, without a template.

    For a conversation, the instruction has one line `role: content` per message, and the input is empty.
    """
    if example.messages:
        return "\n\n".join(f"{turn['role']}: {turn['text']}" for turn in map(for_people, example.messages)), ""
    return example.instruction, example.input


def for_people(message: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts of a message that reports show: its `role`, its `text` with the tool calls, and its `thinking` if it has any."""
    thought, text = split_thought(message.get("content") or "")
    calls = [each.get("function", each) for each in message.get("tool_calls") or ()]
    arguments = (call.get("arguments", "") for call in calls)
    said = (given if isinstance(given, str) else json.dumps(given, ensure_ascii=False) for given in arguments)
    lines = [text] * bool(text) + [f"calls {call.get('name')}({given})" for call, given in zip(calls, said, strict=True)]
    thought = str(thinking(message) or thought).strip()
    return {"role": message["role"], "text": "\n".join(lines)} | ({"thinking": thought} if thought else {})


def split_thought(text: str, prompt: str = "") -> tuple[str, str]:
    """Split a text of the assistant into its thinking (`<think>…</think>` at its start) and the rest.

    Without thinking, the first part is empty. If `</think>` is missing, the rest is empty. `prompt` is the text before `text`. If it ends
    with `<think>`, the thinking begins with `text`.
    """
    begun = prompt.rstrip().endswith(OPEN)
    if not begun and not text.lstrip().startswith(OPEN):
        return "", text
    thought, _, rest = text.lstrip().removeprefix(OPEN).partition(CLOSE)
    return thought.strip(), rest.lstrip()


def split_prompt(text: str) -> tuple[str, str]:
    """Return the instruction and the input that a prompt in the Alpaca template contains. For any other prompt, return (prompt, "")."""
    match = _ALPACA.fullmatch(text.strip())
    if match is None:
        return text.strip(), ""
    return match["instruction"].strip(), (match["input"] or "").strip()


def in_alpaca(prompt: str, row: str) -> bool:
    """Return True if a prompt is the text of a row in the Alpaca template. Both are as the tokenizer gives them back.

    The tokenizer may have changed letters, and may have lost words of the row and some words and spaces of the template.
    """
    added = Counter(_letters(prompt)) - Counter(_letters(row))
    return added.total() >= _FEWEST_LETTERS or split_prompt(prompt) != (prompt.strip(), "")


def _letters(text: str) -> Iterator[str]:
    return (c for c in unicodedata.normalize("NFKD", text).casefold() if not c.isspace() and not unicodedata.combining(c))


# --- the teacher's own prompts ---------------------------------------------------------------------------------------------


def written_by_template(context: TeacherContext, student: bool) -> bool:
    """Return True if the chat template writes the teacher's prompt. `student` says whether it writes the student's prompt."""
    return student or context.system is not None if context.chat is None else context.chat


def render_for_teacher(
    context: TeacherContext,
    example: Example,
    prompt: str,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Mapping[str, Any],
    *,
    chats: bool,
    where: str,
) -> str:
    """Return the teacher's prompt for an example as text.

    Args:
        prompt: the whole prompt of the student.
        settings: variables of the chat template.
        chats: True if the tokenizer's chat template writes the teacher's prompt.
        where: the name of the row in messages.

    Raises:
        DataError: the row has no column for a placeholder, or the chat template refuses the turns.
        ModelError: the tokenizer has no chat template.
    """
    if not chats:
        assert context.template is not None, "no chat template writes the teacher's prompt, so context.template must be set"
        return context.filled(_columns(context, example, prompt, where))
    if not chat.template_for(tokenizer, example.tools):
        raise ModelError(
            f"{where}: the `context` needs a chat template, but the tokenizer has none; set `tokenizer:` of the models to one that has a "
            "chat template, or set context.chat: false"
        )
    return chat.render(messages(example, context, where, prompt), tokenizer, where, example.tools, settings)


def messages(example: Example, context: TeacherContext | None, where: str = "data", prompt: str | None = None) -> list[dict[str, Any]]:
    """Return the messages before the teacher's answer. An instruction, or a whole prompt, becomes one message of a user.

    Args:
        where: the name of the row in messages.
        prompt: the whole prompt of the student. None for a teacher behind an API.

    Raises:
        DataError: the row has no column for a placeholder of the context.
    """
    turns = before_answer(example)
    if context and context.template is not None:
        turns[-1] = turns[-1] | {"content": context.filled(_columns(context, example, prompt, where))}
    if context and context.system is not None:
        turns = [{"role": "system", "content": context.system}, *(turn for turn in turns if turn["role"] != "system")]
    return turns


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
