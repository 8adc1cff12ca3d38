"""Bits per byte: how well a model predicts a text. It can be compared between models with different tokenizers.

A loss per token cannot, because each tokenizer cuts a text into another number of tokens. Every model predicts the same bytes:

    bits per byte = -log2 p(tokens of the text, end) / bytes of the text in UTF-8

`p` is the probability of the model's own tokens, after its own prompt. The end is the model's own end token. It belongs to the text, as in
`loss`, but it has no byte: a model that cannot end an answer does not predict the answer. An empty text counts as one byte. A text
that was cut has no end. Other tokens can spell the same text, so p is at most the probability of the text.
"""

from collections.abc import Sequence as Seq

import numpy as np
from transformers import PreTrainedTokenizerBase

from tadistill.data.templates import EvalSet
from tadistill.data.token_bytes import token_bytes


def bits_per_byte(nats: Seq[np.ndarray], sizes: Seq[int]) -> np.ndarray:
    """Return the bits per byte of each text. `nats` has -log p of each of its tokens, and `sizes` has its number of bytes."""
    return np.array([values.sum() / np.log(2) / max(size, 1) for values, size in zip(nats, sizes, strict=True)])


def reference_sizes(data: EvalSet, tokenizer: PreTrainedTokenizerBase, ends: Seq[int]) -> list[int]:
    """Return the number of bytes of each first reference. Parts of a reference that were cut, or do not count in the loss, are left out.

    Raises:
        DataError: the tokenizer does not say which text its tokens cover, and a reference was cut.
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
    """Return the number of tokens of the references that are the tokenizer's unknown token. Such a token does not predict the bytes of its
    text."""
    unknown = tokenizer.unk_token_id
    # GPT-2 names its EOS here, although it can read every byte
    return 0 if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else sum(e.response.count(unknown) for e in data.encoded)  # type: ignore[arg-type]
