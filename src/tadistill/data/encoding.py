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
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tadistill.data import contexts
from tadistill.data.prompts import Rules, in_chat, limit_key
from tadistill.data.row_counts import Counts, nothing_left
from tadistill.data.rows import Example
from tadistill.data.turns import Turn, TurnReader, unlearnt, without_thinking
from tadistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART = 1000  # number of rows that are tokenised in one call


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


def encode(examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str = "data") -> list[Encoded]:
    """Return the token ids of the examples: prompts, first references and choices. Rows whose prompt is too long or empty are left out.

    Each reference ends with a token that ends an answer. This is the chat template's own token if the template writes the prompt, and EOS
    otherwise.

    Raises:
        DataError: no row is left, a choice is too long, two choices of a row have the same tokens, a chat template refuses a row, or a text
            is too long and `long_prompts` or `long_responses` is `refuse`.
        ModelError: the tokenizer has no EOS token, or it has no chat template but a prompt needs one.
    """
    return encode_counted(examples, tokenizer, rules, name=name)[0]


def encode_counted(
    examples: Seq[Example], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str = "data", rows: Seq[int] | None = None
) -> tuple[list[Encoded], Counts]:
    """Return what `encode` returns, and the counts of the rows that were left out or cut. `rows` are the indices of the examples in their
    split. The default is 0, 1, 2, …

    Raises:
        DataError, ModelError: as in `encode`.
    """
    encoded, counts = list[Encoded](), Counts(0)
    for part in encode_parts(examples, tokenizer, rules, name=name, places=rows):
        encoded += part[0]
        counts = part[1]
    return encoded, counts


def encode_parts(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str = "data", places: Seq[int] | None = None
) -> Iterator[tuple[list[Encoded], Counts]]:
    """Encode the examples as `encode` does, in parts. Yield each part with the counts of all rows so far.

    Args:
        places: the indices of the examples in their split. The default is 0, 1, 2, …

    Raises:
        DataError, ModelError: as in `encode`. The check that at least one row is left comes after the last part.
    """
    rows, encoder = zip(itertools.count() if places is None else places, examples, strict=False), Encoder(tokenizer, rules, name)
    shortest, own = 0, rules.context.max_prompt if rules.context else 0
    counts = Counts(0, limit=rules.limit, max_length=rules.max_length, context_limit=own)
    while part := list(itertools.islice(rows, _PART)):
        encoded, numbers, lengths = encoder.part(dict(part))
        counts = counts.plus(**numbers)
        shortest = min(filter(None, [shortest, *lengths]), default=0)
        yield encoded, counts
    if not counts.used:
        raise DataError(nothing_left(counts, shortest, name))


@dataclass(frozen=True)
class _Ids:
    # the token ids of a turn
    plain: list[int]  # the prompt without the BOS of `Rules.bos`
    prompt: list[int]
    response: list[int]  # without `end`
    hidden: int  # number of tokens at the start of the response that do not count in the loss
    end: int  # the token that ends the response


class Encoder:
    """Encodes the examples of one split with one tokenizer, part by part."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", rules: Rules, name: str):
        self.tokenizer, self.rules, self.name = tokenizer, rules, name
        self.reader, self.unknown = TurnReader(rules, tokenizer), unknown_token(tokenizer)

    def part(self, examples: dict[int, Example]) -> tuple[list[Encoded], Counter[str], list[int]]:
        """Encode examples, given by their row numbers. Return the encoded examples, the numbers to add to the fields of `Counts`, and the
        length of each prompt in tokens."""
        if self.rules.thinking == "drop":
            examples = {row: without_thinking(example) for row, example in examples.items()}
        turns = [self.reader.turns(example, self._where(row)) for row, example in examples.items()]
        plain = _ids(self.tokenizer, [turn.prompt for of_row in turns for turn in of_row])
        ids = iter(self._turns(turns, plain, [in_chat(example, self.rules.template) for example in examples.values()]))
        numbers, encoded, lengths = Counter[str](), list[Encoded](), list[int]()
        for (row, example), of_row in zip(examples.items(), turns, strict=True):
            of_ids = list(itertools.islice(ids, len(of_row)))
            lengths += [len(turn.prompt) for turn in of_ids]
            found, left = self._row(of_ids, row)
            numbers.update(left)
            if found and example.choices and len(of_row) == 1:
                found = [self._with_choices(found[0], example.choices, of_row[0].prompt, of_ids[0].plain)]
            numbers["unopened"] += bool(left["cut"]) and in_chat(example, self.rules.template)
            numbers["unlearnt"] += bool(found) and unlearnt(example, self.rules)
            encoded += found
        numbers.update(rows=len(examples), tokens=sum(len(e.prompt) for e in encoded))
        numbers["unknown"] = sum(e.prompt.count(self.unknown) for e in encoded)
        if self.rules.context:
            texts = {row: of_row[-1].prompt for row, of_row in zip(examples, turns, strict=True)}
            chats = {row: in_chat(example, self.rules.template) for row, example in examples.items()}
            given = [contexts.Row(e, examples[e.row], texts[e.row], chats[e.row]) for e in encoded]
            encoded, left = contexts.behind(given, self.rules, self.tokenizer, self._prompts, name=self.name)
            numbers.update(left)
        return encoded, numbers, lengths

    def _with_choices(self, encoded: Encoded, labels: Seq[str], prompt: str, plain: list[int]) -> Encoded:
        choices = _after(self.tokenizer, [prompt] * len(labels), [plain] * len(labels), list(labels))
        _check_choices(choices, labels, self.rules.max_length - len(encoded.prompt), self._where(encoded.row))
        return replace(encoded, choices=tuple(map(tuple, choices)))

    def _where(self, row: int) -> str:
        return f"{self.name}, row {row + 1}"

    def _turns(self, turns: list[list[Turn]], plain: list[list[int]], chats: list[bool]) -> list[_Ids]:
        flat = [turn for of_row in turns for turn in of_row]
        responses = _after(self.tokenizer, [turn.prompt for turn in flat], plain, [turn.hidden + turn.answer for turn in flat])
        hidden = [self._hidden(turn, prompt, ids) for turn, prompt, ids in zip(flat, plain, responses, strict=True)]
        by_turn = [chat for chat, of_row in zip(chats, turns, strict=True) for _ in of_row]
        parts = zip(plain, self._begun(plain, by_turn), responses, hidden, flat, strict=True)
        return [_Ids(own, prompt, response, unread, turn.end) for own, prompt, response, unread, turn in parts]

    def _prompts(self, texts: list[str], chats: list[bool]) -> list[list[int]]:
        return self._begun(_ids(self.tokenizer, texts), chats)

    def _begun(self, prompts: list[list[int]], chats: list[bool]) -> list[list[int]]:
        # a chat template writes BOS itself, if the model needs it
        return [with_bos(p, self.tokenizer) if self.rules.bos and not chat else p for p, chat in zip(prompts, chats, strict=True)]

    def _hidden(self, turn: Turn, prompt: list[int], response: list[int]) -> int:
        # the number of a response's tokens before its answer; a token with the end of `hidden` and the start of the answer is an answer's
        if not turn.hidden:
            return 0
        (answer,) = _ids(self.tokenizer, [turn.answer])
        if answer and response[-len(answer) :] == answer:
            return len(response) - len(answer)
        (hidden,) = _after(self.tokenizer, [turn.prompt], [prompt], [turn.hidden])
        return next((i for i, (a, b) in enumerate(zip(hidden, response, strict=False)) if a != b), min(len(hidden), len(response)))

    def _row(self, turns: list[_Ids], row: int) -> tuple[list[Encoded], Counter[str]]:
        # the sequences of a row, and what was left out or cut
        rules, found, counts = self.rules, list[Encoded](), Counter[str]()
        for turn in turns:
            why = self._left_out(turn, row)
            if why:
                counts[why] += 1
                continue
            prompt = turn.prompt[: rules.limit]
            response = [*turn.response, turn.end][: rules.max_length - len(prompt)]
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


def _after(tokenizer: "PreTrainedTokenizerBase", prompts: list[str], ids: list[list[int]], texts: list[str]) -> list[list[int]]:
    # prompt and text are encoded together; if this changes the prompt's tokens, the text is encoded alone
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
