"""Bits per byte: how well a model predicts a text. It can be compared between models with different tokenizers.

A loss per token cannot be compared, because each tokenizer cuts a text into another number of tokens. The number of bytes is the same:

    bits per byte = -log2 p(tokens of the text, end) / bytes of the text in UTF-8

`p` is the probability of the model's own tokens, after its own prompt. The end is the model's own end token. As in the metric `loss`, the
probability of the end token counts, because a model that cannot end an answer does not predict the answer. The end token has no bytes. An
empty text counts as one byte. A text that was cut has no end token. Other tokens can spell the same text, so p is at most the probability
of the text.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from tadistill.data.answers_as_text import Answer, Retokenised, retokenised, said
from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import Encoded, EvalSet, unknown_token
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.token_bytes import token_bytes
from tadistill.evaluation.scoring import Subject, likelihood


def bits_per_byte(nats: Seq[np.ndarray], sizes: Seq[int]) -> np.ndarray:
    """Return the bits per byte of each text. `nats` has, for each text, -log p of each token, and `sizes` has its number of bytes."""
    return np.array([values.sum() / np.log(2) / max(size, 1) for values, size in zip(nats, sizes, strict=True)])


def reference_sizes(data: EvalSet, tokenizer: PreTrainedTokenizerBase, ends: Seq[int]) -> list[int]:
    """Return the number of bytes of each first reference. Parts of a reference that were cut, or do not count in the loss, are left out.

    Raises:
        DataError: a reference was cut, but the tokenizer is not a fast one, so the bytes of its tokens are not known.
    """
    known = None
    sizes = []
    for row, encoded in zip(data.rows, data.encoded, strict=True):
        if encoded.response[-1:] and encoded.response[-1] in ends and not encoded.spans:
            sizes.append(len(row.references[0].encode()))
            continue
        known = known or token_bytes(tokenizer, ends)
        whole = (*encoded.prompt, *encoded.response)
        counted = [i for start, end in encoded.spans for i in whole[start:end]] or [*encoded.response]
        sizes.append(sum(len(piece) for piece in known.spell(counted).pieces if isinstance(piece, bytes)))
    return sizes


def unknown_tokens(data: EvalSet, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of unknown tokens in the references. An unknown token can stand for any text, so bits per byte are then too low."""
    unknown = unknown_token(tokenizer)
    return sum(e.response.count(unknown) for e in data.encoded)


# --- answers of a model with another tokenizer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossReading:
    """The bits per byte of N answers for two models: the writer, which sampled the answers, and the reader, which has another tokenizer."""

    writer: np.ndarray
    """(N,) the bits per byte for the writer, of the tokens that it sampled."""
    reader: np.ndarray
    """(N,) the bits per byte for the reader. The text of each answer is encoded with its own tokenizer, after its own prompt."""
    early: int
    """Number of answers that contain something other than text: a special token before the end, or bytes that are not UTF-8, such as half a
    character. The reader gets only the text before this place."""
    unknown: int
    """Number of the reader's tokens of the answers that are its unknown token."""


def cross_read(
    writer: Subject, reader: Subject, data: EvalSet, rules: Rules, answers: Mapping[int, Sequence], *, batch: int
) -> CrossReading:
    """Compute the bits per byte of a model's answers for this model, the writer, and for another model, the reader.

    Args:
        data: the test set, encoded for the reader.
        rules: the rules for encoding text for the reader.
        answers: maps a row number to the prompt and the sampled answer, in the writer's tokens. The rows are in ascending order, and
            `data.encoded` contains all of them.
    """
    own = token_bytes(writer.tokenizer, writer.eos)
    texts = [said(row, answer.response, own) for row, answer in answers.items()]
    written = likelihood(writer, [*answers.values()], batch=batch)["loss"]
    rules, found = replace(rules, long_responses="cut"), Retokenised((), Counts(0), 0, 0)
    encoded: dict[int, Encoded] = {}
    for found in retokenised(data.examples, [answer for answer, _ in texts], reader.tokenizer, rules, name=f"data set `{data.name}`"):
        encoded |= {e.row: e for e in found.encoded}
    read = dict(zip(encoded, likelihood(reader, references([*encoded.values()]), batch=batch)["loss"], strict=True))
    assert all(answer.row in encoded or not (answer.text or answer.ended) for answer, _ in texts)
    sizes = [len(answer.text.encode()) for answer, _ in texts]
    theirs = [_kept(answer, encoded.get(answer.row), reader, rules) for answer, _ in texts]
    nats = [read.get(answer.row, np.zeros(0)) for answer, _ in texts]
    return CrossReading(bits_per_byte(written, sizes), bits_per_byte(nats, theirs), sum(bool(why) for _, why in texts), found.unknown)


def _kept(answer: Answer, encoded: Encoded | None, reader: Subject, rules: Rules) -> int:
    # the number of bytes of an answer in the reader's tokens, because a long answer is cut
    if encoded is None or len(encoded.prompt) + len(encoded.response) < rules.max_length or encoded.response[-1] in reader.eos:
        return len(answer.text.encode())
    pieces = token_bytes(reader.tokenizer, reader.eos).spell(encoded.response).pieces
    return sum(len(piece) for piece in pieces if isinstance(piece, bytes))
