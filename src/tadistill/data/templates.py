"""Convert an `Example` into a prompt text, and into token ids of the prompt and the response.

Two rules differ from MiniLLM's preprocessing:
- If the tokenizer would merge the end of the prompt with the start of the response, the response is encoded alone. MiniLLM cuts the
  joint token ids at the prompt's length.
- Prompts that are too long are left out, in test sets too. MiniLLM cuts them on the right, which removes "### Response:".
"""

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tadistill.data.datasets import Example
from tadistill.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WORDS = r"\s+".join
_ALPACA = re.compile(
    rf"(?:{_WORDS(map(re.escape, _NO_INPUT.split()))}|{_WORDS(map(re.escape, _WITH_INPUT.split()))})\s*"
    r"### Instruction:\s*(?P<instruction>.*?)(?:\n\s*### Input:\s*(?P<input>.*?))?\s*### Response:\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    row: int
    """The example's index in its split, from 0."""
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """The first reference. It ends with EOS, unless it was cut to fit the maximum length."""
    choices: tuple[tuple[int, ...], ...] = ()
    """The tokens of each answer choice, as they follow the prompt. A choice has no EOS and is never cut."""


@dataclass(frozen=True)
class EvalSet:
    """A named data set, encoded for one tokenizer. `encoded` does not contain prompts that are too long."""

    name: str
    examples: Seq[Example]
    encoded: Seq[Encoded]

    @property
    def rows(self) -> list[Example]:
        """The examples of `encoded`, in the same order."""
        return [self.examples[e.row] for e in self.encoded]


def render(example: Example, template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the prompt of an example as text. The template is alpaca, chat or plain."""
    if example.verbatim:
        return example.instruction
    if template == "chat" or example.messages:
        if not tokenizer.chat_template:
            raise ModelError("data.template is `chat`, but the tokenizer has no chat template; use data.template=alpaca or plain")
        user = "\n\n".join(filter(None, (example.instruction, example.input)))
        messages = list(example.messages) or [{"role": "user", "content": user}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if template == "plain":
        return "\n".join(filter(None, (example.instruction, example.input))) + "\n"
    if example.input:
        body = f"### Instruction:\n{example.instruction}\n\n### Input:\n{example.input}\n\n"
        return f"{_WITH_INPUT}\n\n{body}### Response:\n"
    return f"{_NO_INPUT}\n\n### Instruction:\n{example.instruction}\n\n### Response:\n"


def task_of(example: Example) -> tuple[str, str]:
    """Return the instruction and the input of an example, without a template, for a human reader.

    The instruction of a conversation contains one line `role: content` per message. Its input is empty.
    """
    if example.messages:
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in example.messages), ""
    return example.instruction, example.input


def split_prompt(text: str) -> tuple[str, str]:
    """Return the instruction and the input of a prompt in the alpaca template. For any other prompt, return (prompt, "")."""
    match = _ALPACA.fullmatch(text.strip())
    if match is None:
        return text.strip(), ""
    return match["instruction"].strip(), (match["input"] or "").strip()


def encode(
    examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", *, template: str, max_prompt: int, max_length: int, name: str = "data"
) -> list[Encoded]:
    """Encode the prompts, first references and choices of examples. Rows with a prompt longer than `max_prompt` tokens are left out.

    Raises:
        DataError: no row is left, a choice is too long, or two choices of a row have the same tokens.
        ModelError: the tokenizer has no EOS token, or it has no chat template but a prompt needs one.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("the tokenizer has no EOS token, which must end every response; set eos_token in the tokenizer's configuration")
    prompts = [render(e, template, tokenizer) for e in examples]
    ids = _ids(tokenizer, prompts)
    responses = _after(tokenizer, prompts, ids, [e.references[0] for e in examples])
    encoded = []
    for row, (prompt, response) in enumerate(zip(ids, responses, strict=True)):
        if not 0 < len(prompt) <= max_prompt or len(prompt) >= max_length:
            continue
        labels = examples[row].choices
        choices = _after(tokenizer, [prompts[row]] * len(labels), [prompt] * len(labels), list(labels))
        if choices:
            _check_choices(choices, labels, max_length - len(prompt), f"{name}, row {row + 1}")
        encoded.append(Encoded(row, tuple(prompt), tuple([*response, eos][: max_length - len(prompt)]), tuple(map(tuple, choices))))
    if not encoded:
        shortest = min(map(len, ids))
        raise DataError(
            f"no row of {name} has a prompt of at most {max_prompt} tokens (the shortest has {shortest}); raise data.max_prompt"
        )
    return encoded


def _after(tokenizer: "PreTrainedTokenizerBase", prompts: list[str], ids: list[list[int]], texts: list[str]) -> list[list[int]]:
    # a text's tokens are those after the prompt in the joint encoding; if that changes the prompt's tokens, the text is encoded alone
    whole = _ids(tokenizer, [p + t for p, t in zip(prompts, texts, strict=True)])
    joint = [w[: len(p)] == p for w, p in zip(whole, ids, strict=True)]
    return [w[len(p) :] if j else _ids(tokenizer, [t])[0] for w, p, j, t in zip(whole, ids, joint, texts, strict=True)]


def _check_choices(choices: list[list[int]], labels: Seq[str], room: int, where: str) -> None:
    for ids, label in zip(choices, labels, strict=True):
        if not 0 < len(ids) <= room:
            raise DataError(f"{where}: choice `{label}` has {len(ids)} tokens; it must have 1 to {room} (data.max_length minus the prompt)")
        if choices.count(ids) > 1:
            raise DataError(f"{where}: choice `{label}` has the same tokens as another choice, so no model can tell them apart; reword it")


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # type: ignore[return-value]
