"""A plain-text corpus as fixed-length chunks: documents joined by EOS, as MiniLLM prepares D_PT."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tadistill.data.batch import Sequence
from tadistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chunks(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", length: int, limit: int) -> list[Sequence]:
    """Up to `limit` chunks of `length` tokens; the last, shorter piece is dropped unless it is the only one."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= limit * length:
            break
    if len(ids) < 2:
        raise DataError("the corpus holds no text; give a file with at least one document")
    whole = range(0, min(len(ids) - length, (limit - 1) * length) + 1, length) or [0]
    return [Sequence((), tuple(ids[i : i + length])) for i in whole]
