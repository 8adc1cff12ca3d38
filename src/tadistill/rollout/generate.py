"""Batched sampling from a model, or from a per-token mixture of student and teacher, on stock transformers.

One loop serves SeqKD, evaluation and MiniLLM. Each model keeps its own KV cache; a sequence's random numbers are given by
the caller, so its text does not depend on what else is in the batch; finished sequences leave the batch.
Axes: B sequences, T positions, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tadistill.objectives import log_probs

_COMPACT_BELOW = 0.6  # share of unfinished rows under which copying the caches pays for itself


@dataclass(frozen=True)
class Rollout:
    """A sampled response (EOS included when it was reached) and, per token, log-probabilities in nats.

    `behaviour` is the distribution sampled from, `student` the first model, `teacher` the second if there is one.
    """

    tokens: tuple[int, ...]
    values: dict[str, np.ndarray]


class _Decoder:
    """One model with its cache: next-token logits for the rows that are still running."""

    def __init__(self, model: PreTrainedModel, vocab: int):
        self.model, self.vocab = model, vocab
        self.cache = DynamicCache(config=model.config)

    def logits(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1, : self.vocab].float()

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)


@torch.no_grad()
def sample(
    student: PreTrainedModel,
    prompts: list[tuple[int, ...]],
    uniforms_BT: np.ndarray,
    *,
    eos: int,
    vocab: int,
    teacher: PreTrainedModel | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Rollout]:
    """Sample one response per prompt, up to `uniforms_BT.shape[1]` tokens, ending at `eos`.

    Args:
        prompts: token ids; padded on the left inside.
        uniforms_BT: (B, max_new_tokens) numbers in [0, 1): token t of row b is the inverse CDF at uniforms_BT[b, t].
        teacher, alpha: sample from (1 - alpha) student + alpha teacher, mixed as distributions (MiniLLM, Eq. 4).
        temperature: 0 is greedy decoding.
        top_p: nucleus of each model's distribution.

    Returns:
        Rollouts in the order of the prompts.
    """
    device, rows, width = student.device, len(prompts), max(map(len, prompts))
    total = width + uniforms_BT.shape[1]
    ids, attention = _left_padded(prompts, total, width, eos, device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    uniforms = torch.from_numpy(uniforms_BT).to(device)
    training = student.training
    student.eval()
    models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    decoders = {name: _Decoder(model, vocab) for name, model in models.items()}
    values = {name: torch.zeros(rows, total - width, device=device) for name in ("behaviour", *models)}
    lengths = torch.full((rows,), total - width, device=device)
    running = torch.arange(rows, device=device)  # rows in the caches; some of them may have finished
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    start = 0
    for t in range(width, total):
        at = slice(start, t)
        inputs = (ids[running, at], attention[running, :t], positions[running, at])
        logits = {name: d.logits(*inputs) for name, d in decoders.items()}
        tokens, log_p = _draw(logits, uniforms[running, t - width], alpha, temperature, top_p)
        ids[running, t] = tokens
        for name, log_p_B in log_p.items():
            values[name][running, t - width] = log_p_B
        ended = (tokens == eos) & ~finished[running]
        lengths[running[ended]] = t - width + 1
        finished[running[ended]] = True
        kept = (~finished[running]).nonzero().squeeze(1)
        if len(kept) == 0:
            break
        if len(kept) < _COMPACT_BELOW * len(running):
            for decoder in decoders.values():
                decoder.keep(kept)
            running = running[kept]
        start = t
    student.train(training)
    return _rollouts(ids[:, width:], values, lengths)


def _left_padded(prompts: list[tuple[int, ...]], total: int, width: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, total) ids with every prompt ending at `width`, and the attention mask with the places to come switched on."""
    ids = torch.full((len(prompts), total), pad, device=device)
    attention = torch.zeros((len(prompts), total), dtype=torch.long, device=device)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) : width] = torch.tensor(prompt, device=device)
        attention[b, width - len(prompt) :] = 1
    return ids, attention


def _rollouts(ids_BT: Tensor, values: dict[str, Tensor], lengths_B: Tensor) -> list[Rollout]:
    ids, arrays = ids_BT.tolist(), {name: v.cpu().numpy() for name, v in values.items()}
    return [Rollout(tuple(ids[b][:n]), {k: v[b, :n].copy() for k, v in arrays.items()}) for b, n in enumerate(lengths_B.tolist())]


def _draw(
    logits: dict[str, Tensor], uniforms_B: Tensor, alpha: float, temperature: float, top_p: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The next token of every row and its log-probabilities under the mixture and under each model."""
    log_p = {name: _nucleus(log_probs(z, temperature or 1.0), top_p) for name, z in logits.items()}
    mixed = log_p["student"].exp()
    if "teacher" in log_p:
        mixed = torch.lerp(mixed, log_p["teacher"].exp(), alpha)
    if temperature == 0:
        tokens = logits["student"].argmax(-1)
    else:
        # float64: over a large vocabulary a float32 running sum drifts by more than a rare token's mass
        cumulative = mixed.cumsum(-1, dtype=torch.float64)
        point = uniforms_B.unsqueeze(1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=mixed.shape[1] - 1)
    # gathered in log space: a probability that underflows would make a reward infinite
    picked = {name: values.gather(1, tokens.unsqueeze(1)).squeeze(1) for name, values in log_p.items()}
    return tokens, picked | {"behaviour": mixed.gather(1, tokens.unsqueeze(1)).squeeze(1).log()}


def _nucleus(log_p_BV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens with mass >= top_p, renormalised; log-probabilities in and out."""
    if top_p >= 1:
        return log_p_BV
    ordered, order = log_p_BV.sort(-1, descending=True)
    p = ordered.exp()
    kept = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.full_like(log_p_BV, -torch.inf).scatter_(-1, order, kept.log_softmax(-1))
