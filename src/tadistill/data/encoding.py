"""Convert an `Example` into token ids of the prompt and the response. `data.turns` writes both as text first.

Two rules differ from MiniLLM's preprocessing:
- Prompt and response are encoded together. If this changes the tokens of the prompt, the response is encoded alone. MiniLLM always encodes
  both together, and cuts the token ids at the length of the prompt.
- Prompts that are too long are left out, in test sets too, unless `long_prompts` is `cut`. MiniLLM leaves them out of training sets. In
  test sets, MiniLLM cuts them on the right, which removes "### Response:".

The turns of an example are joined into one sequence if possible. A turn is appended if its prompt begins with all token ids of the sequence
so far. Otherwise, the turn begins a new sequence.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tadistill.config.method_parts import TeacherContext
from tadistill.data.chat_jinja import thinking
from tadistill.data.encoding_rules import Counts, Rules, limit_key, nothing_left
from tadistill.data.prompts import in_chat, render_for_teacher, written_by_template
from tadistill.data.rows import Example, place
from tadistill.data.turns import Turn, TurnReader, has_unknown_role, unlearnt, without_thinking
from tadistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = 1000
"""Number of rows that are tokenised in one call."""
_MARKS = ("\n", ":", ")")
"""Texts that are put before a text to get its tokens behind a prompt. Several, because a tokenizer may join one with the text."""


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
    """The token ids of each answer choice, encoded after the prompt. A choice has no EOS and is never cut."""
    teacher_prompt: tuple[int, ...] | None = None
    """The token ids of the teacher's own prompt (`context`). None if the teacher gets `prompt`."""
    spans: tuple[tuple[int, int], ...] = ()
    """The parts that count in the loss, as pairs (start, end) of token indices, counted from the start of the prompt; `end` is excluded.
    Empty if the whole response counts."""


@dataclass(frozen=True)
class EvalSet:
    """A data set with its name, encoded for one tokenizer. Rows that were left out, for example because the prompt is too long, are not in
    `encoded`."""

    name: str
    examples: Seq[Example]
    """All examples of the data set. Empty for a large training set, whose rows stay on the disk."""
    encoded: Seq[Encoded]

    @property
    def rows(self) -> list[Example]:
        """The examples that `encoded` contains, in the same order."""
        return [self.examples[e.row] for e in self.encoded]


def as_one(sets: Seq[EvalSet]) -> EvalSet:
    """Return several data sets as one. Its rows are numbered from 0 through all sets, one set after the other. A single set is returned
    unchanged."""
    if len(sets) == 1:
        return sets[0]
    starts = itertools.accumulate((len(each.examples) for each in sets), initial=0)
    encoded = [replace(e, row=e.row + start) for each, start in zip(sets, starts, strict=False) for e in each.encoded]
    return EvalSet(" + ".join(each.name for each in sets), [*itertools.chain(*(each.examples for each in sets))], encoded)


def encoded_set(
    name: str, examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, called: str = ""
) -> tuple[EvalSet, Counts]:
    """Return a data set with its token ids, and the counts of `encode`. With `data.thinking: drop`, its examples have no thinking either,
    because scores compare answers with them. Messages name the set as `called`."""
    encoded, counts = encode(examples, tokenizer, rules, name=called or name)
    return EvalSet(name, [*map(without_thinking, examples)] if rules.thinking == "drop" else examples, encoded), counts


def encode(
    examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str = "data", rows: Seq[int] | None = None
) -> tuple[list[Encoded], Counts]:
    """Return the token ids of the examples (prompts, first references and choices), and counts of the rows that were left out or cut.

    Each reference ends with a token that ends an answer. This is the chat template's own token if the template writes the prompt, and EOS
    otherwise. Rows whose prompt is too long or empty are left out. `rows` are the indices of the examples in their split. The default is
    0, 1, 2, …

    Raises:
        DataError: no row is left, a choice is too long, two choices of a row have the same tokens, a chat template refuses a row, or a text
            is too long and `long_prompts` or `long_responses` is `refuse`.
        ModelError: the tokenizer has no EOS token, or it has no chat template but a prompt needs one.
    """
    parts = list(encode_parts(examples, tokenizer, rules, name=name, rows=rows))
    return [e for part, _ in parts for e in part], parts[-1][1]


def encode_parts(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str, rows: Seq[int] | None = None
) -> Iterator[tuple[list[Encoded], Counts]]:
    """Encode the examples as `encode` does, in parts. Yield each part with the counts of all rows so far.

    Raises:
        DataError, ModelError: as in `encode`. The check that at least one row is left comes after the last part.
    """
    pairs, encoder = zip(itertools.count() if rows is None else rows, examples, strict=False), Encoder(tokenizer, rules, name)
    shortest, own = 0, rules.context.max_prompt if rules.context else 0
    counts = Counts(0, limit=rules.limit, max_length=rules.max_length, context_limit=own)
    while part := dict(itertools.islice(pairs, PART)):
        encoded, numbers, lengths = encoder.part(part)
        counts = counts.plus(**numbers)
        shortest = min(filter(None, [shortest, *lengths]), default=0)
        yield encoded, counts
    if not counts.used:
        raise DataError(nothing_left(counts, shortest, name))


@dataclass(frozen=True)
class _Ids:
    # a turn and its token ids
    turn: Turn
    plain: list[int]  # the prompt without the BOS of `Rules.bos`
    prompt: list[int]
    response: list[int]  # without the token that ends it
    hidden: int  # number of tokens at the start of the response that do not count in the loss


class Encoder:
    """Encodes the examples of one split with one tokenizer, part by part."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", rules: Rules, name: str, *, plain: bool = False):
        """With `plain`, the text of a special token in an answer, such as `</s>`, is encoded as ordinary text. Otherwise it becomes this
        token."""
        self.tokenizer, self.rules, self.name, self.plain = tokenizer, rules, name, plain
        self.reader, self.unknown = TurnReader(rules, tokenizer), unknown_token(tokenizer)
        self.special = re.compile("|".join(map(re.escape, self.reader.specials)) or "(?!)")
        self.lines: dict[int, int | None] = {}
        self.marks = tuple(filter(self._separates, _MARKS))

    def _separates(self, mark: str) -> bool:
        # Llama 2 writes a space before the first word of a text; a text after the mark has no such space
        after, begun, alone = _ids(self.tokenizer, [mark, f"{mark}a", "a"])
        differs = len(begun) > len(after) and begun[: len(after)] == after and begun[len(after) :] != alone
        return differs and self.unknown not in begun

    def part(self, examples: dict[int, Example]) -> tuple[list[Encoded], Counter[str], list[int]]:
        """Encode examples, given by their row numbers. Return the encoded examples, the numbers to add to the fields of `Counts`, and the
        length of each prompt in tokens."""
        self.lines = {row: example.line for row, example in examples.items()}
        if self.rules.thinking == "drop":
            examples = {row: without_thinking(example) for row, example in examples.items()}
        chats = {row: in_chat(example, self.rules.template) for row, example in examples.items()}
        ids = self._turns([(row, turn) for row, e in examples.items() for turn in self.reader.turns(e, self._where(row))], chats)
        numbers, encoded = Counter[str](), list[Encoded]()
        for row, example in examples.items():
            found, left = self._row(ids[row], row)
            numbers.update(left)
            if found and example.choices and len(ids[row]) == 1:
                found = [self._with_choices(found[0], example.choices, ids[row][0])]
            numbers["unopened"] += bool(left["cut"]) and chats[row]
            numbers["unlearnt"] += bool(found) and unlearnt(example, self.rules)
            numbers["silent"] += bool(found) and any(not turn.response for turn in ids[row])
            numbers["marked"] += bool(found) and not self.plain and any(map(self.special.search, _texts(example)))
            numbers["roles"] += bool(found) and has_unknown_role(example, self.tokenizer)
            encoded += found
        numbers.update(rows=len(examples), tokens=sum(len(e.prompt) for e in encoded))
        numbers["unknown"] = sum(e.prompt.count(self.unknown) for e in encoded)
        if self.rules.context:
            prompts = {row: of_row[-1].turn.prompt for row, of_row in ids.items()}
            encoded, over = self._with_teacher_prompts(self.rules.context, encoded, examples, prompts)
            numbers["cut_context" if self.rules.long_prompts == "cut" else "long_context"] += over
        return encoded, numbers, [len(turn.prompt) for of_row in ids.values() for turn in of_row]

    def _with_choices(self, encoded: Encoded, labels: Seq[str], turn: _Ids) -> Encoded:
        choices = self._after([turn.turn.prompt] * len(labels), [turn.plain] * len(labels), list(labels))
        where, room = self._where(encoded.row), self.rules.max_length - len(encoded.prompt)
        for ids, label in zip(choices, labels, strict=True):
            if not 0 < len(ids) <= room:
                raise DataError(
                    f"{where}: choice `{label}` has {len(ids)} tokens, but the prompt leaves room for 1 to {room} (data.max_length); "
                    "reword the choice, or raise data.max_length"
                )
            if choices.count(ids) > 1:
                raise DataError(
                    f"{where}: choice `{label}` has the same tokens as another choice, so no model can tell them apart; reword one of "
                    "the two"
                )
        return replace(encoded, choices=tuple(map(tuple, choices)))

    def _with_teacher_prompts(
        self, context: TeacherContext, encoded: list[Encoded], examples: Mapping[int, Example], prompts: Mapping[int, str]
    ) -> tuple[list[Encoded], int]:
        # adds the teacher's own prompts, and counts those that are too long; `prompts` are the student's
        chats = [written_by_template(context, in_chat(examples[e.row], self.rules.template)) for e in encoded]
        settings, most, found, over = self.rules.chat_template_kwargs, context.max_prompt, list[Encoded](), 0
        texts = [
            render_for_teacher(
                context, examples[e.row], prompts[e.row], self.tokenizer, chats=c, where=self._where(e.row), settings=settings
            )
            for e, c in zip(encoded, chats, strict=True)
        ]
        for e, ids, written in zip(encoded, _ids(self.tokenizer, texts), chats, strict=True):
            prompt = self._begun(ids, written)
            if not prompt:
                raise DataError(f"{self._where(e.row)}: the teacher's prompt is empty; write more than placeholders in context.template")
            if len(prompt) > most and self.rules.long_prompts == "refuse":
                raise DataError(
                    f"{self._where(e.row)}: the teacher's prompt has {len(prompt)} tokens, more than context.max_prompt ({most}); raise "
                    "this limit, or set data.long_prompts to cut or drop"
                )
            over += len(prompt) > most
            if len(prompt) <= most or self.rules.long_prompts == "cut":
                found.append(replace(e, teacher_prompt=tuple(prompt[:most])))
        return found, over

    def _where(self, row: int) -> str:
        return f"{self.name}, {place(row, self.lines.get(row))}"

    def _turns(self, turns: list[tuple[int, Turn]], chats: Mapping[int, bool]) -> dict[int, list[_Ids]]:
        texts = [turn.prompt for _, turn in turns]
        plain = _ids(self.tokenizer, texts)
        responses = self._after(texts, plain, [turn.hidden + turn.answer for _, turn in turns])
        found: dict[int, list[_Ids]] = {row: [] for row in chats}
        for (row, turn), ids, response in zip(turns, plain, responses, strict=True):
            found[row].append(_Ids(turn, ids, self._begun(ids, chats[row]), response, self._hidden(turn, ids, response)))
        return found

    def _begun(self, prompt: list[int], chat: bool) -> list[int]:
        # a chat template writes BOS itself, if the model needs it
        return with_bos(prompt, self.tokenizer) if self.rules.bos and not chat else prompt

    def _hidden(self, turn: Turn, prompt: list[int], response: list[int]) -> int:
        # the number of a response's tokens before its answer; a token with the end of `hidden` and the start of the answer is an answer's
        if not turn.hidden:
            return 0
        (answer,) = _ids(self.tokenizer, [turn.answer])
        if answer and response[-len(answer) :] == answer:
            return len(response) - len(answer)
        (hidden,) = self._after([turn.prompt], [prompt], [turn.hidden])
        return next((i for i, (a, b) in enumerate(zip(hidden, response, strict=False)) if a != b), min(len(hidden), len(response)))

    def _after(self, prompts: list[str], ids: list[list[int]], texts: list[str]) -> list[list[int]]:
        # prompt and text are encoded together; if this changes the prompt's tokens, the text is encoded alone
        whole = _ids(self.tokenizer, [p + t for p, t in zip(prompts, texts, strict=True)])
        joint = [w[: len(p)] == p and not (self.plain and self.special.search(t)) for w, p, t in zip(whole, ids, texts, strict=True)]
        return [w[len(p) :] if j else self._alone(t) for w, p, j, t in zip(whole, ids, joint, texts, strict=True)]

    def _alone(self, text: str) -> list[int]:
        # the token ids of a text that follows a prompt
        for mark in self.marks:
            before, whole = _ids(self.tokenizer, [mark, mark + text], plain=self.plain)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return _ids(self.tokenizer, [text], plain=self.plain)[0]

    def _row(self, turns: list[_Ids], row: int) -> tuple[list[Encoded], Counter[str]]:
        # the sequences of a row, and what was left out or cut
        rules, found, counts = self.rules, list[Encoded](), Counter[str]()
        for turn in turns:
            why = self._left_out(turn, row)
            if why:
                counts[why] += 1
                continue
            prompt = turn.prompt[: rules.limit]
            response = [*turn.response, turn.turn.end][: rules.max_length - len(prompt)]
            counts["cut"] += len(turn.prompt) > rules.limit
            counts["shortened"] += len(response) <= len(turn.response)
            span = len(prompt) + turn.hidden, len(prompt) + len(response)
            before = (*found[-1].prompt, *found[-1].response) if found else ()
            spans = (span,) if turn.hidden else ()
            if before and tuple(prompt[: len(before)]) == before:
                last = found.pop()
                spans = (*(last.spans or ((len(last.prompt), len(before)),)), span)
            found.append(Encoded(row, tuple(prompt), tuple(response), spans=spans))
        if found:  # a row counts once
            left = counts["long"] + counts["answers"]
            once = {name: min(counts[name], 1) for name in ("cut", "shortened")}
            return found, Counter(**once, turns=left, more=len(found) - 1)
        return found, Counter({max(counts, key=lambda name: counts[name]): 1})

    def _left_out(self, turn: _Ids, row: int) -> str | None:
        rules = self.rules
        prompt = min(len(turn.prompt), rules.limit)
        length = prompt + len(turn.response) + 1
        if not turn.prompt:
            return "empty"
        if len(turn.prompt) > rules.limit and rules.long_prompts != "cut":
            if rules.long_prompts == "refuse":
                raise self._too_long(row, "prompt has", len(turn.prompt), limit_key(rules.limit, rules.max_length), "long_prompts")
            return "long"
        if length > rules.max_length and rules.long_responses != "cut":
            if rules.long_responses == "refuse":
                key = f"data.max_length ({rules.max_length})"
                raise self._too_long(row, "prompt and response have", length, key, "long_responses")
            return "answers"
        return "answers" if prompt + turn.hidden >= rules.max_length else None

    def _too_long(self, row: int, what: str, length: int, key: str, setting: str) -> DataError:
        return DataError(
            f"{self._where(row)}: its {what} {length} tokens, more than {key}; shorten the row, raise the limit, or set data.{setting} to "
            "cut or drop"
        )


def unknown_token(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the id of the token for text that the tokenizer cannot encode. Return None if there is no such token."""
    unknown: Any = tokenizer.unk_token_id
    # GPT-2 names its EOS as the unknown token, although it can encode every byte
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def with_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids with BOS at the start. Ids that already begin with BOS are not changed, and an empty list stays empty."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] in ([], [bos]) else [bos, *ids]  # type: ignore[list-item]


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return True if the tokenizer itself puts BOS before each text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]  # type: ignore[index]


def _texts(example: Example) -> Iterator[str]:
    # the texts of an example that are not a whole prompt, which can contain special tokens on purpose
    yield from () if example.verbatim else (example.instruction, example.input)
    yield from example.references[:1]
    for message in (*example.messages, example.last):
        yield str(message.get("content") or "")
        yield thinking(message) or ""


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, plain: bool = False) -> list[list[int]]:
    split: dict[str, Any] = {"split_special_tokens": True} if plain else {}
    return tokenizer(texts, add_special_tokens=False, **split)["input_ids"] if texts else []  # type: ignore[return-value]
