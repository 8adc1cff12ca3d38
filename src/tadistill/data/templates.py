"""Prompt templates and length rules: from an `Example` to prompt ids and response ids.

Departures from MiniLLM's preprocessing: where a tokenizer merges the end of the prompt with the start of the response,
the response is encoded by itself (MiniLLM cuts the joint encoding at the prompt's length); prompts that are too long are
left out of test sets too (MiniLLM cuts them on the right, which loses "### Response:").
"""

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


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; `response` ends with EOS unless it was cut. `row` is the example's place in its split."""

    row: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]


def render(example: Example, template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt as text, in the alpaca, chat or plain template."""
    if example.verbatim:
        return example.instruction
    if template == "chat" or example.messages:
        if not tokenizer.chat_template:
            raise ModelError("template `chat` needs a tokenizer with a chat template; use data.template=alpaca or plain")
        user = "\n\n".join(filter(None, (example.instruction, example.input)))
        messages = list(example.messages) or [{"role": "user", "content": user}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if template == "plain":
        return "\n".join(filter(None, (example.instruction, example.input))) + "\n"
    if example.input:
        body = f"### Instruction:\n{example.instruction}\n\n### Input:\n{example.input}\n\n"
        return f"{_WITH_INPUT}\n\n{body}### Response:\n"
    return f"{_NO_INPUT}\n\n### Instruction:\n{example.instruction}\n\n### Response:\n"


def encode(
    examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", *, template: str, max_prompt: int, max_length: int, name: str = "data"
) -> list[Encoded]:
    """Encode examples with their first reference; rows whose prompt exceeds `max_prompt` tokens are left out.

    Raises:
        DataError: no row is left.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("the tokenizer has no EOS token, so a response could never end; set eos_token in its configuration")
    prompts = [render(e, template, tokenizer) for e in examples]
    full = _ids(tokenizer, [p + e.references[0] for p, e in zip(prompts, examples, strict=True)])
    encoded = []
    for row, (prompt, whole) in enumerate(zip(_ids(tokenizer, prompts), full, strict=True)):
        if not 0 < len(prompt) <= max_prompt or len(prompt) >= max_length:
            continue
        joint = whole[: len(prompt)] == prompt
        response = whole[len(prompt) :] if joint else _ids(tokenizer, [examples[row].references[0]])[0]
        encoded.append(Encoded(row, tuple(prompt), tuple([*response, eos][: max_length - len(prompt)])))
    if not encoded:
        shortest = min(map(len, _ids(tokenizer, prompts)))
        raise DataError(
            f"no row of {name} has a prompt of at most {max_prompt} tokens (the shortest has {shortest}); raise data.max_prompt"
        )
    return encoded


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]
