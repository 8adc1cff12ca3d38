"""Convert an `Example` into a prompt text, and into token ids of the prompt and the response.

Two rules differ from MiniLLM's preprocessing:
- Prompt and response are encoded together. If this changes the tokens of the prompt, the response is encoded alone. MiniLLM always encodes
  both together, and cuts the token ids at the length of the prompt.
- Prompts that are too long are left out, in test sets too, unless `long_prompts` is `cut`. MiniLLM leaves them out of training sets. In
  test sets, MiniLLM cuts them on the right, which removes "### Response:".
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tadistill.config.context import TeacherContext
from tadistill.config.data import LongPrompts
from tadistill.data import chat, contexts
from tadistill.data.rows import Example
from tadistill.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_PART = 1000  # number of rows that are tokenised in one call
_WORDS = r"\s+".join
_ALPACA = re.compile(
    rf"(?:{_WORDS(map(re.escape, _NO_INPUT.split()))}|{_WORDS(map(re.escape, _WITH_INPUT.split()))})\s*"
    r"### Instruction:\s*(?P<instruction>.*?)(?:\n\s*### Input:\s*(?P<input>.*?))?\s*### Response:\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Encoded:
    """The token ids of one example."""

    row: int
    """Index of the example in its split, from 0."""
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """The token ids of the first reference. They end with the token that ends an answer, unless the reference was cut to the maximum
    length."""
    choices: tuple[tuple[int, ...], ...] = ()
    """The token ids of each answer choice, as it follows the prompt. A choice has no EOS and is never cut."""
    teacher_prompt: tuple[int, ...] | None = None
    """The token ids of the teacher's own prompt (`context`). None if the teacher reads `prompt`."""


@dataclass(frozen=True)
class Lengths:
    """The settings of a recipe (in `data`) that limit the lengths of prompts and responses."""

    max_prompt: int
    max_length: int
    long_prompts: LongPrompts = "drop"
    bos: bool = False
    """Put BOS before a prompt that does not begin with BOS. Prompts from a chat template are not changed, because the template decides
    about BOS."""
    context: TeacherContext | None = None
    """The teacher's own prompt, which is encoded too. It has its own limit, `max_prompt`, to which `long_prompts` applies."""

    @property
    def limit(self) -> int:
        """Largest number of tokens in a prompt. It is below `max_length`, so that an answer has room for at least one token."""
        return min(self.max_prompt, self.max_length - 1)


@dataclass(frozen=True)
class Counts:
    """The numbers of rows of a split for one tokenizer: all rows, and those that were left out or cut."""

    rows: int
    long: int = 0
    """Number of rows that were left out because their prompt has more than `limit` tokens."""
    empty: int = 0
    """Number of rows that were left out because their prompt has no tokens."""
    cut: int = 0
    """Number of rows whose prompt was cut to `limit` tokens."""
    shortened: int = 0
    """Number of rows whose response was cut, because prompt and response had more than `max_length` tokens. A cut response has no end
    token."""
    long_context: int = 0
    """Number of rows that were left out because the teacher's own prompt has more than `context_limit` tokens."""
    cut_context: int = 0
    """Number of rows whose teacher's prompt was cut to `context_limit` tokens."""
    limit: int = 0
    max_length: int = 0
    context_limit: int = 0
    unknown: int = field(default=0, compare=False)
    """Number of tokens of the kept prompts that are the tokenizer's unknown token, which replaces text that the tokenizer cannot read."""
    tokens: int = field(default=0, compare=False)
    """Number of all tokens of the kept prompts."""

    @property
    def used(self) -> int:
        """The number of rows that are not left out."""
        return self.rows - self.long - self.empty - self.long_context

    def plus(self, **numbers: int) -> "Counts":
        """Return these counts with `numbers` added."""
        return replace(self, **{name: getattr(self, name) + number for name, number in numbers.items()})

    @property
    def text(self) -> str:
        """Return text such as ``476 of 500 rows; 24 longer than data.max_prompt (256)``. The text is empty if no row was left out or
        cut."""
        key = f"data.max_prompt ({self.limit})" if self.limit + 1 < self.max_length else f"data.max_length ({self.max_length})"
        parts = [
            (self.long, f"{self.long} longer than {key}"),
            (self.empty, f"{self.empty} with an empty prompt"),
            (self.cut, f"{self.cut} with a prompt cut at {key}"),
            (self.long_context + self.cut_context, self.of_contexts),
            (self.shortened, f"{self.shortened} with a reference cut at data.max_length ({self.max_length})"),
        ]
        found = [text for count, text in parts if count]
        return "; ".join([f"{self.used} of {self.rows} rows", *found]) if found else ""

    @property
    def of_contexts(self) -> str:
        """Return the part of `text` about the teacher's own prompts, such as ``24 with a teacher's prompt longer than …``."""
        key = f"context.max_prompt ({self.context_limit})"
        if self.long_context:
            return f"{self.long_context} are left out, because the teacher's prompt is longer than {key}"
        return f"{self.cut_context} have a teacher's prompt that is cut at {key}" if self.cut_context else ""

    @property
    def unknown_text(self) -> str:
        """Return text such as ``12 of 345 tokens of the prompts are unknown to the tokenizer``. It is empty if no token is unknown."""
        return f"{self.unknown} of {self.tokens} tokens of the prompts are unknown to the tokenizer" if self.unknown else ""


@dataclass(frozen=True)
class EvalSet:
    """A data set with its name, encoded for one tokenizer. `encoded` has no row that was left out, for example because its prompt is too
    long."""

    name: str
    examples: Seq[Example]
    """All examples of the data set. Empty for a large training set, whose rows stay on the disk."""
    encoded: Seq[Encoded]

    @property
    def rows(self) -> list[Example]:
        """The examples that `encoded` contains, in the same order."""
        return [self.examples[e.row] for e in self.encoded]


def in_chat(example: Example, template: str) -> bool:
    """Return True if the prompt of this example is written by the tokenizer's chat template."""
    return not example.verbatim and (template == "chat" or bool(example.messages))


def render(example: Example, template: str, tokenizer: "PreTrainedTokenizerBase", where: str = "data") -> str:
    """Return the prompt of an example as text. `template` is alpaca, chat or plain. `where` is the name of the row in messages."""
    if example.verbatim:
        return example.instruction
    if in_chat(example, template):
        if not tokenizer.chat_template:
            why = "its rows are conversations" if example.messages else "data.template is chat"
            raise ModelError(
                f"{where}: {why}, but the tokenizer has no chat template; set `tokenizer:` of the models to one that has a chat template"
                + ("" if example.messages else ", or use data.template=alpaca or plain")
            )
        user = "\n\n".join(filter(None, (example.instruction, example.input)))
        return chat.render(example.messages or [{"role": "user", "content": user}], tokenizer, where)
    if template == "plain":
        return "\n".join(filter(None, (example.instruction, example.input))) + "\n"
    if example.input:
        body = f"### Instruction:\n{example.instruction}\n\n### Input:\n{example.input}\n\n"
        return f"{_WITH_INPUT}\n\n{body}### Response:\n"
    return f"{_NO_INPUT}\n\n### Instruction:\n{example.instruction}\n\n### Response:\n"


def task_of(example: Example) -> tuple[str, str]:
    """Return the instruction and the input of an example as text for people, without a template.

    For a conversation, the instruction has one line `role: content` per message, and the input is empty.
    """
    if example.messages:
        return "\n\n".join(f"{m['role']}: {m.get('content') or ''}" for m in example.messages), ""
    return example.instruction, example.input


def split_prompt(text: str) -> tuple[str, str]:
    """Return the instruction and the input that a prompt in the Alpaca template contains. For any other prompt, return (prompt, "")."""
    match = _ALPACA.fullmatch(text.strip())
    if match is None:
        return text.strip(), ""
    return match["instruction"].strip(), (match["input"] or "").strip()


def encode(
    examples: Seq[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: str,
    max_prompt: int,
    max_length: int,
    bos: bool = False,
    name: str = "data",
) -> list[Encoded]:
    """Return the token ids of the examples: prompts, first references and choices. Rows whose prompt is too long or empty are left out.

    Each reference ends with a token that ends an answer. This is the chat template's own token if the template writes the prompt, and EOS
    otherwise.

    Args:
        bos: put BOS before a prompt that does not begin with BOS. Prompts from a chat template are not changed.

    Raises:
        DataError: no row is left, a choice is too long, two choices of a row have the same tokens, or a chat template refuses a row.
        ModelError: the tokenizer has no EOS token, or it has no chat template but a prompt needs one.
    """
    return encode_counted(examples, tokenizer, Lengths(max_prompt, max_length, bos=bos), template=template, name=name)[0]


def encode_counted(
    examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", lengths: Lengths, *, template: str, name: str = "data"
) -> tuple[list[Encoded], Counts]:
    """Return what `encode` returns, and the counts of the rows that were left out or cut.

    Raises:
        DataError, ModelError: as in `encode`.
    """
    encoded, counts = list[Encoded](), Counts(0)
    for part in encode_parts(examples, tokenizer, lengths, template=template, name=name):
        encoded += part[0]
        counts = part[1]
    return encoded, counts


def encode_parts(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", lengths: Lengths, *, template: str, name: str = "data"
) -> Iterator[tuple[list[Encoded], Counts]]:
    """Yield the examples in parts, encoded as by `encode`. Each part comes with the counts of all rows so far.

    Raises:
        DataError, ModelError: as in `encode`. The check that at least one row is left comes after the last part.
    """
    rows, shortest = iter(examples), 0
    counts = Counts(
        0, limit=lengths.limit, max_length=lengths.max_length, context_limit=lengths.context.max_prompt if lengths.context else 0
    )
    turn, unknown = chat.closing(tokenizer), _unknown(tokenizer)
    while part := list(itertools.islice(rows, _PART)):
        start = counts.rows
        prompts = [render(e, template, tokenizer, f"{name}, row {i}") for i, e in enumerate(part, start + 1)]
        plain = _ids(tokenizer, prompts)
        responses = _after(tokenizer, prompts, plain, [e.references[0] for e in part])
        ids = [with_bos(p, tokenizer) if lengths.bos and not in_chat(e, template) else p for p, e in zip(plain, part, strict=True)]
        encoded: list[Encoded] = []
        long = cut = shortened = unread = 0
        for i, (prompt, response) in enumerate(zip(ids, responses, strict=True)):
            if not prompt or (len(prompt) > lengths.limit and lengths.long_prompts == "drop"):
                long += bool(prompt)
                continue
            labels = part[i].choices
            choices = _after(tokenizer, [prompts[i]] * len(labels), [plain[i]] * len(labels), list(labels))
            end = turn if in_chat(part[i], template) else tokenizer.eos_token_id
            cut += len(prompt) > lengths.limit
            prompt = prompt[: lengths.limit]
            unread += prompt.count(unknown)
            room = lengths.max_length - len(prompt)
            if choices:
                _check_choices(choices, labels, room, f"{name}, row {start + i + 1}")
            shortened += len(response) + 1 > room
            encoded.append(Encoded(start + i, tuple(prompt), tuple([*response, end][:room]), tuple(map(tuple, choices))))
        empty, tokens = len(part) - long - len(encoded), sum(len(e.prompt) for e in encoded)
        counts = counts.plus(rows=len(part), long=long, empty=empty, cut=cut, shortened=shortened, unknown=unread, tokens=tokens)
        if lengths.context:
            rows_of = ((e, part[e.row - start], prompts[e.row - start]) for e in encoded)
            given = [contexts.Row(e, example, prompt, in_chat(example, template)) for e, example, prompt in rows_of]
            tokens = partial(_tokens, tokenizer, bos=lengths.bos)
            encoded, numbers = contexts.behind(given, lengths.context, tokenizer, tokens, cut=lengths.long_prompts == "cut", name=name)
            counts = counts.plus(**numbers)
        shortest = min(filter(None, [shortest, *map(len, ids)]), default=0)
        yield encoded, counts
    if not counts.used:
        raise DataError(_nothing_left(counts, shortest, name))


def _unknown(tokenizer: "PreTrainedTokenizerBase") -> Any:
    unknown: Any = tokenizer.unk_token_id
    # GPT-2 names its EOS here, although it can read every byte
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def _nothing_left(counts: Counts, shortest: int, name: str) -> str:
    if counts.long_context:
        return (
            f"no row of {name} has a teacher's prompt of at most {counts.context_limit} tokens; raise context.max_prompt, or set "
            "data.long_prompts: cut"
        )
    if not counts.long:
        return f"every row of {name} has an empty prompt; give the rows an instruction or a prompt, or set data.template: alpaca"
    key = "data.max_prompt" if counts.limit + 1 < counts.max_length else "data.max_length"
    return (
        f"no row of {name} has a prompt of at most {counts.limit} tokens (the shortest has {shortest}); raise {key}, or set "
        "data.long_prompts: cut"
    )


def with_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids with BOS at the start. Ids that already begin with BOS are not changed, and an empty list stays empty."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] in ([], [bos]) else [bos, *ids]  # type: ignore[list-item]


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: list[str], chats: list[bool], *, bos: bool) -> list[list[int]]:
    return [with_bos(p, tokenizer) if bos and not chat else p for p, chat in zip(_ids(tokenizer, texts), chats, strict=True)]


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return True if the tokenizer itself puts BOS before each text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]  # type: ignore[index]


def _after(tokenizer: "PreTrainedTokenizerBase", prompts: list[str], ids: list[list[int]], texts: list[str]) -> list[list[int]]:
    # a text's tokens are those after the prompt in the joint encoding; if that changes the prompt's tokens, the text is encoded alone
    whole = _ids(tokenizer, [p + t for p, t in zip(prompts, texts, strict=True)])
    joint = [w[: len(p)] == p for w, p in zip(whole, ids, strict=True)]
    return [w[len(p) :] if j else _ids(tokenizer, [t])[0] for w, p, j, t in zip(whole, ids, joint, texts, strict=True)]


def _check_choices(choices: list[list[int]], labels: Seq[str], room: int, where: str) -> None:
    for ids, label in zip(choices, labels, strict=True):
        if not 0 < len(ids) <= room:
            raise DataError(
                f"{where}: choice `{label}` has {len(ids)} tokens, but the prompt leaves room for 1 to {room} (data.max_length); "
                "reword the choice, or raise data.max_length"
            )
        if choices.count(ids) > 1:
            raise DataError(
                f"{where}: choice `{label}` has the same tokens as another choice, so no model can tell them apart; reword one of the two"
            )


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # type: ignore[return-value]
