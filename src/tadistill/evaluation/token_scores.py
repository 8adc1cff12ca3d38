"""Compute scores from the probabilities that a model gives to tokens: loss, entropy, KL, calibration, bits per byte.

To save memory, logits exist only for a few tokens at a time. Axes: N tokens, V vocabulary. q is the student, and p_T is the teacher.

Calibration shows how well a model's confidence agrees with the share of its correct predictions. The result is the expected calibration
error (ECE):

    probabilities = label_probabilities(subject, prompts, choices, batch=…)
    ece(bins(*likeliest(probabilities, labels, references)))

For tasks with a few answer choices, the prediction is the choice with the highest probability. MiniLLM evaluates SST-2 and BoolQ this way
(arXiv:2306.08543).

Bits per byte show how well a model predicts a text. They can be compared between models with different tokenizers. A loss per token cannot
be compared, because each tokenizer cuts a text into another number of tokens. The number of bytes is the same:

    bits per byte = -log2 p(tokens of the text, end) / bytes of the text in UTF-8

`p` is the probability of the model's own tokens, after its own prompt. The end is the model's own end token. As in the metric `loss`, the
probability of the end token counts, because a model that cannot end an answer does not predict the answer. The end token has no bytes. An
empty text counts as one byte. A text that was cut has no end token. Other tokens can spell the same text, so p is at most the probability
of the text.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill.data.batch import Sequence, by_length, collate
from tadistill.data.encoding import EvalSet, unknown_token
from tadistill.data.encoding_rules import Rules
from tadistill.data.token_bytes import token_bytes
from tadistill.data.turns import TurnReader
from tadistill.errors import DataError
from tadistill.models.forward import Reader
from tadistill.models.teachers import Teacher, teacher_of
from tadistill.objectives import cross_entropy, forward_kl, fused_head, log_probs, reverse_kl
from tadistill.objectives.fused_loss import fused_log_probs
from tadistill.text import counted

Answers = Mapping[int, Seq[Sequence]]
"""Maps a decoding seed to one answer per prompt."""
PerToken = dict[str, list[np.ndarray]]
"""Maps a metric to one array per sequence. An array has one value per response token."""


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, with its tokenizer, vocabulary size and end tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab: int
    eos: tuple[int, ...]
    """Ids of the tokens that end an answer."""

    @property
    def pad(self) -> int:
        """A token id for padding. Any id works, because padded positions are never read."""
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos

    @cached_property
    def reader(self) -> Reader:
        """The forward pass of the model, which is checked once for all metrics."""
        return Reader(self.model)


def likelihood(subject: Subject, sequences: Seq[Sequence], *, batch: int) -> PerToken:
    """Return three values at each response token: `loss`, `confidence` and `correct`.

    `loss` is -log q of the token, in nats. `confidence` is the largest probability of any token. `correct` is 1 if the token is the most
    probable one, else 0.
    """

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        best, token = log_probs(logits).max(-1)
        return torch.stack([cross_entropy(logits, tokens), best.exp(), (token == tokens).float()])

    return per_token(subject, sequences, ("loss", "confidence", "correct"), values, batch=batch)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy (N,) of softmax(logits / temperature) in nats. The logits have the shape (N, V)."""
    log_q = log_probs(logits, temperature)
    return -(log_q.exp() * log_q).sum(-1)


def entropy(subject: Subject, sequences: Seq[Sequence], *, batch: int, temperature: float) -> list[np.ndarray]:
    """Return the entropy (nats) of the model's distribution at each token of the answers. It is 0 at temperature 0."""
    if temperature == 0:
        return [np.zeros(len(s.response)) for s in sequences]

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        return token_entropy(logits, temperature).unsqueeze(0)

    return per_token(subject, sequences, ("entropy",), values, batch=batch)["entropy"]


def divergences(
    subject: Subject,
    sequences: Seq[Sequence],
    others: Seq[PreTrainedModel | Teacher],
    *,
    batch: int,
    tick: Callable[[int], None] = lambda n: None,
) -> list[PerToken]:
    """Return `forward_kl` and `reverse_kl` at each response token, for each model in `others`.

    forward_kl = KL(p ‖ q) and reverse_kl = KL(q ‖ p), in nats. q is the subject and p is the other model. Both are exact sums over the
    vocabulary. After each batch, `tick` is called with the number of sequences in the batch.
    """
    names = tuple(f"{name} {i}" for i in range(len(others)) for name in ("forward_kl", "reverse_kl"))

    def values(logits: Tensor, targets: tuple, tokens: Tensor) -> Tensor:
        return torch.stack([kl(logits, target) for target in targets for kl in (forward_kl, reverse_kl)])

    found = per_token(subject, sequences, names, values, batch=batch, others=others, tick=tick)
    return [{name: found[f"{name} {i}"] for name in ("forward_kl", "reverse_kl")} for i in range(len(others))]


def means(per_token: list[np.ndarray]) -> np.ndarray:
    """Return one number per sequence: the mean over its tokens."""
    return np.array([values.mean() for values in per_token])


@torch.no_grad()
def per_token(
    subject: Subject,
    sequences: Seq[Sequence],
    names: tuple[str, ...],
    values: Callable[[Tensor, tuple, Tensor], Tensor],
    *,
    batch: int,
    others: Seq[PreTrainedModel | Teacher] = (),
    tick: Callable[[int], None] = lambda n: None,
) -> PerToken:
    """Compute several metrics at every token of the answers.

    `names` are the metrics. `values` computes them for a few tokens at a time. It is called with the subject's logits (N, V), a tuple of
    the other models' logits, and the token ids (N,). It returns a tensor (metrics, N). After each batch, `tick` is called with the number
    of sequences in the batch.
    """
    found: PerToken = {name: [np.empty(0)] * len(sequences) for name in names}
    reader, teachers = subject.reader, [*map(teacher_of, others)]
    for part in by_length(sequences, batch):
        rows = collate([sequences[i] for i in part], pad=subject.pad).to(subject.model.device)
        targets = [teacher.target(rows) for teacher in teachers]
        tokens = rows.counted(rows.targets_BT)

        def of_tile(logits: Tensor, teachers: tuple, at: slice, tokens: Tensor = tokens) -> Tensor:
            return values(logits, teachers, tokens[at])

        hidden, weights = reader.hidden(subject.model, rows), torch.ones(len(names), 1)
        _, tiles = fused_head(hidden, reader.head, of_tile, weights.to(hidden.device), teachers=targets, vocab=subject.vocab)
        ends = rows.mask_BT.sum(1).cumsum(0)[:-1].tolist()
        for name, row in zip(names, tiles.double().cpu().numpy(), strict=True):
            for i, of_sequence in zip(part, np.split(row, ends), strict=True):
                found[name][i] = of_sequence
        tick(len(part))
    return found


# --- calibration ---------------------------------------------------------------------------------------------------------

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
        return {name: values.tolist() for name, values in vars(self).items()}


def bins(confidence: Seq[float] | np.ndarray, correct: Seq[bool] | np.ndarray, count: int = 15) -> Bins:
    """Sort predictions by confidence into `count` bins of equal width. Bin k has confidences in [k / count, (k + 1) / count).

    A confidence of 1 goes into the last bin.

    Args:
        confidence: the model's probability of each prediction, 0-1.
        correct: True for each correct prediction.

    Raises:
        DataError: a confidence is not in [0, 1].
    """
    sure, right = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
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
    """
    return float(100 * (of.count * np.abs(of.correct - of.confidence)).sum() / of.count.sum())


@torch.no_grad()
def label_probabilities(
    subject: Subject, prompts: Seq[tuple[int, ...]], choices: Seq[Seq[tuple[int, ...]]], *, batch: int
) -> list[np.ndarray]:
    """Return the model's probability of each answer choice. The probabilities of one prompt's choices sum to 1.

    They are a softmax over the values log p(choice | prompt). Each value is a sum over the tokens of the choice, without the end token.

    Args:
        prompts: token ids of each prompt.
        choices: for each prompt, the token ids of each of its choices (`Encoded.choices`). A choice has at least one token.
        batch: sequences per forward pass.

    Returns:
        One float64 array per prompt, with one probability per choice.
    """
    stems: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, labels in enumerate(choices):
        for k, label in enumerate(labels):
            stems.setdefault((i, label[:-1]), []).append(k)
    groups = [(i, members) for (i, _), members in stems.items()]  # choices that differ only in their last token need one sequence
    sequences = [Sequence(tuple(prompts[i]), tuple(choices[i][members[0]])) for i, members in groups]
    found = [np.zeros(len(labels)) for labels in choices]
    for part in by_length(sequences, batch):
        rows, start = collate([sequences[g] for g in part], pad=subject.pad).to(subject.model.device), 0
        at, tokens, owners = [], [], []
        for i, members in (groups[g] for g in part):
            length = len(choices[i][members[0]])
            for k in members:
                at += range(start, start + length)
                tokens += choices[i][k]
                owners += [(i, k)] * length
            start += length
        hidden = subject.reader.hidden(subject.model, rows)
        chosen = hidden[torch.tensor(at, device=hidden.device)]
        log_q = fused_log_probs(chosen, subject.reader.head, torch.tensor(tokens, device=hidden.device), vocab=subject.vocab)
        for (i, k), of_token in zip(owners, log_q.double().cpu().numpy(), strict=True):
            found[i][k] += of_token
    return [softmax(scores) for scores in found]


def likeliest(probabilities: Seq[np.ndarray], choices: Seq[Seq[str]], references: Seq[Seq[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays with one entry per prompt: the probability of its most likely choice, and whether this choice is right."""
    best = [int(p.argmax()) for p in probabilities]
    confidence = np.array([p[k] for p, k in zip(probabilities, best, strict=True)], np.float64)
    right = [labels[k] in refs for k, labels, refs in zip(best, choices, references, strict=True)]
    return confidence, np.array(right, bool)


# --- bits per byte -----------------------------------------------------------------------------------------------------------


def bits_per_byte(nats: Seq[np.ndarray], sizes: Seq[int]) -> np.ndarray:
    """Return the bits per byte of each text. `nats` has, for each text, -log p of each token, and `sizes` has its number of bytes."""
    return np.array([values.sum() / np.log(2) / max(size, 1) for values, size in zip(nats, sizes, strict=True)])


def reference_sizes(data: EvalSet, tokenizer: PreTrainedTokenizerBase, ends: Seq[int], rules: Rules) -> list[int]:
    """Return the number of bytes of each first reference. Parts of a reference that were cut, or do not count in the loss, are left out.

    With `data.turns: last`, a reference is the whole last message as the chat template writes it, with thinking and tool calls.

    Args:
        rules: the rules with which the set was encoded.

    Raises:
        DataError: a reference was cut, but the tokenizer is not a fast one, so the bytes of its tokens are not known.
    """
    known, reader = None, TurnReader(rules, tokenizer)
    sizes = []
    for row, encoded in zip(data.rows, data.encoded, strict=True):
        if encoded.response[-1:] and encoded.response[-1] in ends and not encoded.spans:
            (turn,) = reader.turns(row, f"{data.name}, row {encoded.row + 1}")
            sizes.append(len(turn.answer.encode()))
            continue
        known = known or token_bytes(tokenizer, ends)
        whole = (*encoded.prompt, *encoded.response)
        counted = [i for start, end in encoded.spans for i in whole[start:end]] or [*encoded.response]
        sizes.append(sum(len(piece) for piece in known.spell(counted).pieces if isinstance(piece, bytes)))
    return sizes


def unknown_text(data: EvalSet, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a warning if the references have unknown tokens, else an empty text. An unknown token can stand for any text."""
    unknown = unknown_token(tokenizer)
    if not (count := sum(e.response.count(unknown) for e in data.encoded)):
        return ""
    tokens = counted(count, "token of the references is", "tokens of the references are")
    return f"{data.name}: {tokens} unknown to the tokenizer, so bits_per_byte is too low"
