"""The importance of each channel, neuron, head and layer of a model, measured by activations on a small calibration set.

    measured = importance(model, sequences)          # one list of token ids per sequence; runs forward passes only

The importance of channels, neurons and heads is computed in two steps: the mean of absolute values over the tokens of a sequence, and then
the L2 norm over the sequences (Muralidharan et al. 2024, Minitron, arXiv 2407.14679, section 2.2). The importance of layers is the block
influence (Men et al. 2024, ShortGPT, arXiv 2403.03853).

Axes: B sequences, T tokens, H channels, I neurons, A heads, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tadistill.errors import ConfigError, DataError, ModelError
from tadistill.models.counting.shapes import shape_of
from tadistill.models.pruning.weight_names import FAMILIES


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance scores of the parts of a model, in float64 on the CPU. Neurons and heads can be compared only within a layer."""

    hidden: Tensor
    """Scores of the channels, of shape (H,): absolute outputs of the norms, summed over both norms of all layers."""
    neurons: Tensor
    """Scores of the neurons, of shape (L, I): absolute inputs of the last projection of each MLP."""
    heads: Tensor
    """Scores of the heads, of shape (L, A): L2 norms of the outputs of the heads, before the output projection."""
    layers: Tensor
    """Scores of the layers, of shape (L,): the block influence, from 0 to 2. It is 1 - cos(input of the layer, output of the layer),
    averaged over tokens."""


def importance(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 8) -> Importance:
    """Return the importance of the parts of a model, measured on `sequences` of token ids. `batch_size` changes only rounding errors.

    Raises:
        ModelError: the model's family cannot be pruned in width, or its activations are not finite.
        DataError: there are no sequences, or a sequence is empty, too long, or has ids outside the vocabulary.
    """
    shape = shape_of(model.config)
    _check_sequences(model, sequences)
    ordered = sorted(sequences, key=len)  # puts sequences of similar length into one batch
    sums = _Sums(shape.layers, shape.heads)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _recorded(model, sums):
            for start in range(0, len(ordered), batch_size):
                rows = [torch.tensor(row) for row in ordered[start : start + batch_size]]
                mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
                sums.mask_BT = mask_BT.bool()
                # padding is on the right, where no token of a causal model reads it
                model.base_model(input_ids=pad_sequence(rows, batch_first=True).to(model.device), attention_mask=mask_BT, use_cache=False)
    finally:
        model.train(training)
    measured = sums.result()
    if not all(torch.isfinite(scores).all() for scores in (measured.hidden, measured.neurons, measured.heads, measured.layers)):
        raise ModelError(
            "the model's activations on the calibration set are not finite, so its parts cannot be ranked for pruning; check the model's "
            "weights"
        )
    return measured


def keep_important(count: int, scores: Tensor) -> tuple[int, ...]:
    """Return the indices of the `count` highest of the n scores, in ascending order. Among equal scores, lower indices are kept.

    Raises:
        ConfigError: `count` is not between 1 and n.
    """
    if not 1 <= count <= len(scores):
        raise ConfigError(f"pruning cannot keep {count} of {len(scores)} parts; write a number from 1 to {len(scores)}")
    return tuple(sorted(torch.sort(scores.cpu(), descending=True, stable=True).indices[:count].tolist()))


class _Sums:
    def __init__(self, layers: int, heads: int):
        self.mask_BT = torch.ones(0, 0, dtype=torch.bool)
        self._heads = heads
        self._squares: dict[tuple[str, int], Tensor] = {}  # sums over sequences of squared means
        self._cosines = torch.zeros(layers, dtype=torch.float64)
        self._tokens = [0] * layers

    def widths(self, kind: str, place: int, values: Tensor) -> None:
        # values: (B, T, n), or (B T, n) from OPT
        values_BTn = values.detach().float().reshape(*self.mask_BT.shape, -1)
        if kind == "heads":
            values_BTn = values_BTn.unflatten(-1, (self._heads, -1)).norm(dim=-1)
        counts_B1 = self.mask_BT.sum(1, keepdim=True)
        means_Bn = values_BTn.abs().masked_fill(~self.mask_BT.unsqueeze(-1), 0).sum(1) / counts_B1
        squares = means_Bn.double().square().sum(0).cpu()
        self._squares[kind, place] = self._squares.get((kind, place), torch.zeros(())) + squares

    def block(self, layer: int, before: Tensor, after: Tensor) -> None:
        # before, after: (B, T, H)
        cosines = cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)[self.mask_BT]
        self._cosines[layer] += cosines.double().sum().cpu()
        self._tokens[layer] += len(cosines)

    def result(self) -> Importance:
        def rows(kind: str) -> Tensor:
            return torch.stack([s for (k, _), s in sorted(self._squares.items(), key=lambda item: item[0]) if k == kind]).sqrt()

        influence = 1 - self._cosines / torch.tensor(self._tokens)
        return Importance(rows("norms").sum(0), rows("neurons"), rows("heads"), influence)


@contextmanager
def _recorded(model: PreTrainedModel, sums: _Sums) -> Iterator[None]:
    family = FAMILIES[model.config.model_type]

    def reads(kind: str, place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: sums.widths(kind, place, inputs[0])

    def makes(kind: str, place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: sums.widths(kind, place, output)

    def passes(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, inputs, output: sums.block(layer, inputs[0], output)

    with ExitStack() as hooks:
        for i, layer in enumerate(model.get_submodule(family.stack).children()):
            for j, norm in enumerate(family.norms):
                hooks.callback(layer.get_submodule(norm).register_forward_hook(makes("norms", 2 * i + j)).remove)
            hooks.callback(layer.get_submodule(family.mlp).register_forward_pre_hook(reads("neurons", i)).remove)
            hooks.callback(layer.get_submodule(family.attention).register_forward_pre_hook(reads("heads", i)).remove)
            hooks.callback(layer.register_forward_hook(passes(i)).remove)
        yield


def _check_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
    if not sequences:
        raise DataError("the calibration set has no sequences; give at least one sequence, or some hundreds for a stable ranking")
    positions, words = model.config.max_position_embeddings, model.config.vocab_size
    for number, row in enumerate(sequences):
        if not 1 <= len(row) <= positions:
            raise DataError(f"sequence {number} of the calibration set has {len(row)} tokens; give it 1 to {positions} tokens")
        if min(row) < 0 or max(row) >= words:
            raise DataError(
                f"sequence {number} of the calibration set has token ids outside 0 to {words - 1}; use the model's own tokenizer"
            )
