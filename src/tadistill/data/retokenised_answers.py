"""Pass a model's answers as text to a student with another tokenizer, and encode them for this student.

The file `texts.jsonl` in the folder of a stage has one JSON object per answer, in the order of the rows:

    {"row": 12, "text": " Paris is in France.", "ended": true}

`row` is the index of the prompt in its split, from 0. Rows without an answer are missing. `text` is what the model wrote, without special
tokens and without white space added or removed. `ended` is true if the model ended the answer. It is false if the answer was cut, by the
limit of new tokens or by this module. For an answer from an API, `text` is the message content, and `ended` is true for the finish_reason
`stop`.

The bytes of `text` are exactly the bytes that the model wrote. Where this is impossible, the text is cut: before bytes that are not UTF-8,
such as half a character at the limit of new tokens, and before a special token that does not end an answer.

The text is encoded after the student's own prompt, which the student's template and tokenizer make from the row. If the answer has ended,
the student's end token follows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tadistill.data.encoding import PART, Encoded, Encoder
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.rows import Example
from tadistill.data.token_bytes import TokenBytes, valid_runs
from tadistill.data.turns import without_thinking
from tadistill.disk import damaged, stream_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = "texts.jsonl"
"""Name of the file with the answers, in a stage's folder."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to the prompt of one row, as text."""

    row: int
    text: str
    ended: bool


class Said(NamedTuple):
    """The text of a model's sampled tokens."""

    answer: Answer
    why: str | None
    """The reason if the text was cut: `bytes` (not UTF-8) or `token` (a special token). None if it was not cut."""
    tokens: int
    """Number of the first tokens whose text is in the answer. If the answer has ended, the end token is one of them."""
    size: int
    """Number of bytes of these tokens. It is smaller than that of the text if the first token after them is only partly text."""


def said(row: int, ids: Seq[int], writer: TokenBytes) -> Said:
    """Return the text of sampled token ids up to the first place that is not text."""
    ended = bool(ids) and ids[-1] in writer.ends
    body = [*ids[:-1]] if ended else [*ids]
    ordinary = next((k for k, i in enumerate(body) if not _is_text(i, writer)), len(body))
    why = "token" if ordinary < len(body) else None
    if writer.spelled:
        pieces = [piece for i in body[:ordinary] if isinstance(piece := writer.pieces[i], bytes)]
        data = b"".join(pieces)
        first, whole = valid_runs(data)[0] if data else (b"", True)
        text = first if whole else b""
        ends = [end for end in accumulate(map(len, pieces)) if end <= len(text)]
        if len(text) < len(data):
            why = "bytes"
        return Said(Answer(row, text.decode(), ended and why is None), why, len(ends) + (ended and why is None), max(ends, default=0))
    text = str(writer.tokenizer.decode(body[:ordinary], clean_up_tokenization_spaces=False))
    return Said(Answer(row, text, ended and why is None), why, ordinary + (ended and why is None), len(text.encode()))


def _is_text(token: int, writer: TokenBytes) -> bool:
    # a token of WordLevel and similar vocabularies has no bytes of its own, but it is a word
    if token >= len(writer.pieces) or writer.tokens[token] is None:
        return False
    piece = writer.pieces[token]
    return isinstance(piece, bytes) or (piece is None and not writer.spelled)


def read_texts(file: Path) -> Iterator[Answer]:
    """Yield the answers of a file `texts.jsonl`.

    Raises:
        StoreError: the file is missing or damaged, or its rows are not in order.
    """
    last = -1
    for number, (_, found) in enumerate(stream_jsonl(file), 1):
        row, text, ended = (found.get(name) for name in ("row", "text", "ended"))
        if not (isinstance(row, int) and isinstance(text, str) and isinstance(ended, bool)) or row <= last:
            raise damaged(
                file, f"answer {number} in it has no valid `row`, `text` or `ended`, or its `row` is not larger than the one before"
            )
        last = row
        yield Answer(row, text, ended)


@dataclass(frozen=True)
class Retokenised:
    """A part of a model's answers as token ids of a student with another tokenizer, and counts of all parts so far."""

    encoded: tuple[Encoded, ...]
    """The student's prompts and the answers of this part, as token ids of the student."""
    counts: Counts
    """Counts of the rows in all parts so far. Rows without an answer are not counted."""
    unknown: int
    """Number of tokens of the answers in all parts so far that are the student's unknown token."""
    tokens: int
    """Number of all tokens of the answers in all parts so far."""


def retokenised(
    examples: Iterable[Example], answers: Iterable[Answer], tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str
) -> Iterator[Retokenised]:
    """Encode the answers with the student's tokenizer, after the student's own prompts. Yield them in parts.

    An answer that is too long for `max_length` is cut and gets no end token, or is left out with `long_responses: drop`. An empty answer
    that has not ended is left out.

    Args:
        examples: all rows of the split, in order.
        rules: the student's rules. Each answer is always one turn, and keeps its thinking.

    Raises:
        DataError, ModelError: as in `data.encoding.encode`. It is not an error if no row is left.
    """
    prompts = map(without_thinking, examples) if rules.thinking == "drop" else examples
    long = "drop" if rules.long_responses == "drop" else "cut"
    rules = replace(rules, turns="answer", thinking="keep", long_responses=long, context=None)
    # for answers that were cut: the encoder adds an end token, which is removed afterwards, so one more token fits
    open_rules = replace(rules, max_prompt=rules.limit, max_length=rules.max_length + 1)
    encoders = {ended: Encoder(tokenizer, its, name, plain=True) for ended, its in ((True, rules), (False, open_rules))}
    counts, unknown, total = Counts(0, limit=rules.limit, max_length=rules.max_length), 0, 0
    pairs = _joined(prompts, answers)
    while part := list(islice(pairs, PART)):
        found, numbers = list[Encoded](), Counter[str]()
        for ended, encoder in encoders.items():
            written = [(example, a) for example, a in part if a.ended == ended and (ended or a.text)]
            given = {a.row: replace(example, references=(a.text,), last={}, choices=()) for example, a in written}
            encoded, of_ended, _ = encoder.part(given)
            numbers.update(of_ended)
            if not ended:
                whole = len(encoded)
                encoded = [replace(e, response=e.response[:-1]) for e in encoded if len(e.response) > 1]
                dropped = whole - len(encoded)  # white space that the student's tokenizer drops
                numbers.update(empty=dropped, silent=-dropped)
            found += encoded
        silent = sum(not answer.ended and not answer.text for _, answer in part)
        numbers.update(rows=silent, empty=silent)
        counts = counts.plus(**numbers)
        found.sort(key=lambda e: e.row)
        responses = [e.response for e in found]
        total += sum(map(len, responses))
        unknown += sum(response.count(encoders[True].unknown) for response in responses)
        yield Retokenised(tuple(found), counts, unknown, total)


def _joined(examples: Iterable[Example], answers: Iterable[Answer]) -> Iterator[tuple[Example, Answer]]:
    rows = enumerate(examples)
    for answer in answers:
        example = next((example for row, example in rows if row == answer.row), None)
        assert example is not None, f"there is an answer to row {answer.row}, but the split has no such row"
        yield example, answer
