"""Numbers at every response token, from forward passes over whole sequences; no [tokens, vocabulary] tensor is held.

Each function over sequences returns one array per sequence, with one number per response token. Axes: N tokens, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill.data.batch import Sequence, by_length, collate
from tadistill.models.forward import Reader
from tadistill.objectives import cross_entropy, forward_kl, fused_head, log_probs, reverse_kl

PerToken = dict[str, list[np.ndarray]]
"""Name -> one array per sequence."""


@dataclass(frozen=True)
class Subject:
    """The model under evaluation with what decoding needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab: int
    eos: tuple[int, ...]
    """Tokens that end an answer."""

    @property
    def pad(self) -> int:
        """A token id to pad with. Any id will do, because lengths say what is padding."""
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos


def likelihood(subject: Subject, sequences: Seq[Sequence], *, batch: int) -> PerToken:
    """Return loss (-log q of each token, in nats), confidence (the largest probability) and correct (1 where that token is the text's)."""

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        best, token = log_probs(logits).max(-1)
        return torch.stack([cross_entropy(logits, tokens), best.exp(), (token == tokens).float()])

    return per_token(subject, sequences, ("loss", "confidence", "correct"), values, batch=batch)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of softmax(logits / temperature) in nats: (N, V) -> (N,)."""
    log_q = log_probs(logits, temperature)
    return -(log_q.exp() * log_q).sum(-1)


def entropy(subject: Subject, sequences: Seq[Sequence], *, batch: int, temperature: float) -> list[np.ndarray]:
    """Return the entropy of softmax(logits / temperature) before each token, in nats: 0 at temperature 0."""
    if temperature == 0:
        return [np.zeros(len(s.response)) for s in sequences]

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        return token_entropy(logits, temperature).unsqueeze(0)

    return per_token(subject, sequences, ("entropy",), values, batch=batch)["entropy"]


def divergences(subject: Subject, sequences: Seq[Sequence], others: Seq[PreTrainedModel], *, batch: int) -> list[PerToken]:
    """Return forward_kl, KL(p ‖ q), and reverse_kl, KL(q ‖ p), for each other model p, exact over the vocabulary before each token.

    One forward pass of the subject q serves all.
    """
    names = tuple(f"{name} {i}" for i in range(len(others)) for name in ("forward_kl", "reverse_kl"))

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        return torch.stack([kl(logits, target) for target in targets for kl in (forward_kl, reverse_kl)])

    found = per_token(subject, sequences, names, values, batch=batch, others=others)
    return [{name: found[f"{name} {i}"] for name in ("forward_kl", "reverse_kl")} for i in range(len(others))]


def means(per_token: list[np.ndarray]) -> np.ndarray:
    """Return the mean over each sequence's tokens."""
    return np.array([values.mean() for values in per_token])


@torch.no_grad()
def per_token(
    subject: Subject,
    sequences: Seq[Sequence],
    names: tuple[str, ...],
    values: Callable[[Tensor, tuple, Tensor], Tensor],
    *,
    batch: int,
    others: Seq[PreTrainedModel] = (),
) -> PerToken:
    """Return named numbers at every response token.

    `values` is called on small tiles of tokens with the subject's logits (N, V), the other models' logits and the text's tokens (N,). It
    returns one row per name: (names, N).
    """
    found: PerToken = {name: [np.empty(0)] * len(sequences) for name in names}
    reader, readers = Reader(subject.model), [Reader(model) for model in others]
    for part in by_length(sequences, batch):
        rows = collate([sequences[i] for i in part], pad=subject.pad).to(subject.model.device)
        targets = [r.target(model, rows) for r, model in zip(readers, others, strict=True)]
        tokens = rows.targets_BT[rows.mask_BT]

        def of_tile(logits: Tensor, teachers: tuple, at: slice, tokens: Tensor = tokens) -> Tensor:
            return values(logits, teachers, tokens[at])

        hidden, weights = reader.hidden(subject.model, rows), torch.ones(len(names), 1)
        _, tiles = fused_head(hidden, reader.head, of_tile, weights.to(hidden.device), teachers=targets, vocab=subject.vocab)
        ends = rows.mask_BT.sum(1).cumsum(0)[:-1].tolist()
        for name, row in zip(names, tiles.double().cpu().numpy(), strict=True):
            for i, of_sequence in zip(part, np.split(row, ends), strict=True):
                found[name][i] = of_sequence
    return found
