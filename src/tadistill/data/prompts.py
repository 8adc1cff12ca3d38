"""Write the prompt of an example as text, and define the rules with which text becomes token ids.

The template around an instruction is the Alpaca prompt, a line break, or the tokenizer's chat template.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from tadistill.config.data import LongText, Template, Thinking, Turns
from tadistill.config.method_parts import TeacherContext
from tadistill.data import chat
from tadistill.data.rows import Example
from tadistill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WORDS = r"\s+".join
OPEN, CLOSE = "<think>", "</think>"
"""The marks at the beginning and the end of an assistant's thinking in a text."""
_ALPACA = re.compile(
    rf"(?:{_WORDS(map(re.escape, _NO_INPUT.split()))}|{_WORDS(map(re.escape, _WITH_INPUT.split()))})\s*"
    r"### Instruction:\s*(?P<instruction>.*?)(?:\n\s*### Input:\s*(?P<input>.*?))?\s*### Response:\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Rules:
    """The settings of a recipe (in `data`) that decide how a row becomes token ids. `config.data.Data` explains each of them."""

    max_prompt: int
    max_length: int
    long_prompts: LongText = "drop"
    long_responses: LongText = "cut"
    bos: bool = False
    """Put BOS before a prompt that does not begin with BOS. Prompts from a chat template are not changed, because the template decides
    about BOS."""
    template: Template = "alpaca"
    turns: Turns = "answer"
    thinking: Thinking = "keep"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    context: TeacherContext | None = None
    """The teacher's own prompt, which is encoded too. It may have up to `context.max_prompt` tokens. `long_prompts` says what happens to
    a longer prompt."""

    @classmethod
    def of(cls, data: Any, role: str, *, bos: bool, context: TeacherContext | None = None) -> "Rules":
        """Return the rules for one role of data sets: train, dev or test. Only training sets can have more than one learnt turn per row,
        and only without a `context`.

        Args:
            data: the key `data` of a recipe, or the `Encoding` of a stage.
        """
        found = {each.name: getattr(data, each.name) for each in fields(cls) if each.name not in ("bos", "context")}
        if role != "train" or context:
            found["turns"] = of_one_turn(data.turns)
        return cls(**found, bos=bos, context=context)

    @property
    def lenient(self) -> "Rules":
        """These rules with `drop` in place of `refuse`, so that a text that is too long raises no error."""
        prompts, responses = (("drop" if given == "refuse" else given) for given in (self.long_prompts, self.long_responses))
        return replace(self, long_prompts=prompts, long_responses=responses)

    @property
    def limit(self) -> int:
        """Largest number of tokens in a prompt. It is below `max_length`, so that an answer has room for at least one token."""
        return min(self.max_prompt, self.max_length - 1)


def of_one_turn(turns: Turns) -> Turns:
    """Return the value of `turns` for a use that needs exactly one turn of each row, such as evaluation or sampling: `last` in place of
    `all`. Other values are returned unchanged."""
    return "last" if turns == "all" else turns


def limit_key(limit: int, max_length: int) -> str:
    """Return the recipe's key that limits prompts to `limit` tokens, with its value, as in ``data.max_prompt (256)``."""
    return f"data.max_prompt ({limit})" if limit + 1 < max_length else f"data.max_length ({max_length})"


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
    if not tokenizer.chat_template:
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
    thought = str(chat.thinking(message) or thought).strip()
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
