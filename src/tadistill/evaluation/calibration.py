"""Measure the calibration of a model: how well its confidence agrees with the share of its correct predictions. The result is the expected
calibration error (ECE).

    probabilities = label_probabilities(model, prompts, choices, pad=…, vocab=…, batch=…)
    ece(bins(*likeliest(probabilities, labels, references)))

For tasks with a few answer choices, the prediction is the choice with the highest probability. MiniLLM evaluates SST-2 and BoolQ this way
(arXiv:2306.08543).
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.data.batch import Sequence, by_length, collate
from tadistill.errors import DataError
from tadistill.models.forward import Reader
from tadistill.objectives import cross_entropy, fused_head

_ROUNDING = 1e-5


@dataclass(frozen=True)
class Bins:
    """Predictions, sorted by confidence into bins of equal width on [0, 1]. Each array has one value per bin.

    A reliability diagram shows `correct` over `confidence`.
    """

    count: np.ndarray
    confidence: np.ndarray
    """Mean confidence of the predictions in the bin, 0-1. It is 0 in an empty bin."""
    correct: np.ndarray
    """Share of correct predictions in the bin, 0-1. It is 0 in an empty bin."""

    def as_json(self) -> dict[str, list]:
        return {"count": self.count.tolist(), "confidence": self.confidence.tolist(), "correct": self.correct.tolist()}


def bins(confidence: Seq[float] | np.ndarray, correct: Seq[bool] | np.ndarray, count: int = 15) -> Bins:
    """Sort predictions by confidence into `count` bins of equal width. Bin k has confidences in [k / count, (k + 1) / count).

    A confidence of 1 goes into the last bin.

    Args:
        confidence: the model's probability of each prediction, 0-1.
        correct: True for each correct prediction.

    Raises:
        DataError: the lengths differ, or a confidence is not in [0, 1].
    """
    sure, right = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if sure.shape != right.shape or sure.ndim != 1:
        raise DataError(
            f"`confidence` has shape {sure.shape} and `correct` has shape {right.shape}; each must be a list with one number per prediction"
        )
    outside = ~((sure >= -_ROUNDING) & (sure <= 1 + _ROUNDING))
    if outside.any():
        raise DataError(f"the confidence {sure[outside][0]} is not a probability; every confidence must be in [0, 1]")
    bin_of = np.searchsorted(np.linspace(0, 1, count + 1)[1:-1], sure, side="right")
    sizes, total_sure, total_right = (np.bincount(bin_of, weights, count) for weights in (None, sure, right))
    return Bins(sizes, total_sure / np.maximum(sizes, 1), total_right / np.maximum(sizes, 1))


def ece(of: Bins) -> float:
    """Return the expected calibration error in percentage points (Naeini et al. 2015; Guo et al., arXiv:1706.04599).

    For each bin, take the absolute difference between the share of correct predictions and the mean confidence. The result is the mean
    over the bins, weighted by their numbers of predictions.

    Raises:
        DataError: there is no prediction.
    """
    total = of.count.sum()
    if total == 0:
        raise DataError("the calibration error cannot be computed without predictions; give at least one prediction")
    return float(100 * (of.count * np.abs(of.correct - of.confidence)).sum() / total)


@torch.no_grad()
def label_probabilities(
    model: PreTrainedModel, prompts: Seq[tuple[int, ...]], choices: Seq[Seq[tuple[int, ...]]], *, pad: int, vocab: int, batch: int
) -> list[np.ndarray]:
    """Return the model's probability of each answer choice. The probabilities of one prompt's choices sum to 1.

    They are a softmax over the values log p(choice | prompt). Each value is a sum over the tokens of the choice, without the end token.

    Args:
        prompts: token ids of each prompt.
        choices: for each prompt, the token ids of each of its choices (`Encoded.choices`). A choice has at least one token.
        pad: the token id for padding; any id works.
        vocab: the vocabulary size. The model's logits of larger ids are left out.
        batch: sequences per forward pass.

    Returns:
        One float64 array per prompt, with one probability per choice.
    """
    reader = Reader(model)
    stems: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, labels in enumerate(choices):
        for k, label in enumerate(labels):
            stems.setdefault((i, label[:-1]), []).append(k)
    groups = [(i, members) for (i, _), members in stems.items()]  # choices that differ only in their last token need one sequence
    sequences = [Sequence(tuple(prompts[i]), tuple(choices[i][members[0]])) for i, members in groups]
    found = [np.zeros(len(labels)) for labels in choices]
    for part in by_length(sequences, batch):
        rows, start = collate([sequences[g] for g in part], pad=pad).to(model.device), 0
        at, tokens, owners = [], [], []
        for i, members in (groups[g] for g in part):
            length = len(choices[i][members[0]])
            for k in members:
                at += range(start, start + length)
                tokens += choices[i][k]
                owners += [(i, k)] * length
            start += length
        hidden = reader.hidden(model, rows)[torch.tensor(at, device=model.device)]
        for (i, k), loss in zip(owners, _losses(reader, hidden, torch.tensor(tokens), vocab), strict=True):
            found[i][k] -= loss
    return [_softmax(scores) for scores in found]


def likeliest(probabilities: Seq[np.ndarray], choices: Seq[Seq[str]], references: Seq[Seq[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays with one entry per prompt: the probability of its most likely choice, and whether this choice is right."""
    best = [int(p.argmax()) for p in probabilities]
    confidence = np.array([p[k] for p, k in zip(probabilities, best, strict=True)], np.float64)
    right = [labels[k] in refs for k, labels, refs in zip(best, choices, references, strict=True)]
    return confidence, np.array(right, bool)


def _losses(reader: Reader, hidden: Tensor, tokens: Tensor, vocab: int) -> np.ndarray:
    targets = tokens.to(hidden.device)

    def values(logits: Tensor, _: tuple, at: slice) -> Tensor:
        return cross_entropy(logits, targets[at]).unsqueeze(0)

    _, (loss,) = fused_head(hidden, reader.head, values, torch.ones(1, 1, device=hidden.device), vocab=vocab)
    return loss.double().cpu().numpy()


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
