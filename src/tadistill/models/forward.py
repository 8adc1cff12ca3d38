"""The forward pass of training and scoring: logits only where the mask counts."""

from torch import Tensor, nn

from tadistill.data.batch import Batch


def response_logits(model: nn.Module, batch: Batch, vocab: int) -> Tensor:
    """(N, vocab) float32 logits at the N positions where the mask counts, in row-major order.

    The head runs only on columns that count in some row; logits wider than the tokenizer are cut to `vocab`.
    """
    columns = batch.mask_BT.any(0).nonzero().squeeze(1)
    logits = model(
        input_ids=batch.ids_BT, attention_mask=batch.attention_BT, position_ids=batch.positions_BT, use_cache=False, logits_to_keep=columns
    ).logits
    return logits[batch.mask_BT[:, columns]][:, :vocab].float()
