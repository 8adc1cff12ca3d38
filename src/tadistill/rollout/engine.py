"""Engines, which sample responses from a model. `Native` is the built-in loop. `rollout.vllm` has the engine that uses vLLM."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.models.forward import evaluating, in_bfloat16
from tadistill.objectives.tiles import free_bytes
from tadistill.rollout.decoder import WAYS, Decoder, way_of
from tadistill.rollout.generate import Mixture, Rollout, Speculation, sample

_SHARE = 0.6  # share of the GPU's free memory that a batch of rows may use
_ROWS = 512  # most rows in a batch; with more rows, a GPU computes longer than the host needs to start a step
_TRIED = 4  # number of tokens whose keys and values are measured
_STATES = 12  # states of a token in memory at once in a layer, in units of the hidden size; most of them are the MLP's
_LOGITS = 8  # float32 numbers per vocabulary entry and model: logits, probabilities, and sorted copies for top-p


class Engine(Protocol):
    """The interface of an engine, which samples responses with the student's current weights."""

    student: PreTrainedModel
    decoding: Decoding

    def respond(
        self,
        prompts: Seq[tuple[int, ...]],
        uniforms_BT: np.ndarray,
        guide: Mixture | Speculation | None = None,
        tick: Callable[[int], None] = lambda answered: None,
    ) -> list[Rollout]:
        """Return one response per prompt, in order. Response b depends on the random numbers `uniforms_BT[b]`, and has at most
        `uniforms_BT.shape[1]` tokens. `tick` is called with the number of responses that have finished since its last call."""
        ...


class Native:
    """The built-in sampling loop for transformers models. It samples `chunk` prompts of similar length in one batch. Token t of response b
    is drawn with the random number `uniforms_BT[b, t]`.

    Args:
        adapts: on a GPU, a batch has as many prompts as the free memory allows, instead of `chunk`. A batch of any size starts about the
            same number of kernels, and these starts take most of the time. Up to rounding, a response does not depend on its batch.
        half: sample with a bfloat16 copy of the student's weights, which is made once per call of `respond`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        decoding: Decoding,
        *,
        eos: tuple[int, ...],
        vocab: int,
        chunk: int = 64,
        adapts: bool = False,
        half: bool = False,
    ):
        self.student, self.decoding, self.eos, self.vocab, self.chunk = student, decoding, eos, vocab, chunk
        self.adapts, self.half = adapts, half
        self._caches: dict[PreTrainedModel, float] = {}  # bytes per token

    def respond(
        self,
        prompts: Seq[tuple[int, ...]],
        uniforms_BT: np.ndarray,
        guide: Mixture | Speculation | None = None,
        tick: Callable[[int], None] = lambda answered: None,
    ) -> list[Rollout]:
        """Return responses like `Engine.respond`. After each batch, call `tick` with the number of prompts in the batch."""
        order = np.argsort([len(p) for p in prompts], kind="stable")
        found: dict[int, Rollout] = {}
        with in_bfloat16(self.student) if self.half else nullcontext():
            for part in self._batches(prompts, order, uniforms_BT.shape[1], guide):
                out = sample(
                    self.student,
                    [prompts[i] for i in part],
                    uniforms_BT[part],
                    eos=self.eos,
                    vocab=self.vocab,
                    decoding=self.decoding,
                    guide=guide,
                )
                found |= dict(zip(part.tolist(), out, strict=True))
                tick(len(part))
        return [found[i] for i in range(len(prompts))]

    def _batches(
        self, prompts: Seq[tuple[int, ...]], order: np.ndarray, steps: int, guide: Mixture | Speculation | None
    ) -> list[np.ndarray]:
        size, models = self.chunk, [self.student] if guide is None else [self.student, guide.teacher]
        free = free_bytes(self.student.device) if self.adapts and len(prompts) else None
        with evaluating(self.student):
            if free is not None and all(way_of(model).memory == "ours" for model in models):
                self._caches |= {model: cache_bytes(model) for model in models if model not in self._caches}
                needs = row_bytes(models, [self._caches[model] for model in models], max(map(len, prompts)), steps, self.vocab)
                most = max(1, min(int(_SHARE * free / needs), _ROWS))
                size = -(-len(prompts) // -(-len(prompts) // most))  # batches of equal size
        return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def cache_bytes(model: PreTrainedModel) -> float:
    """Return the number of bytes of a model's keys and values for one token, measured in a forward pass."""
    ids = torch.zeros(1, _TRIED, dtype=torch.long, device=model.device)
    decoder = Decoder(model, 1, _TRIED, WAYS[0])
    decoder.logits(ids, None, torch.arange(_TRIED, device=ids.device).unsqueeze(0), 0)
    tensors = [value for layer in decoder.memory.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / _TRIED


def row_bytes(models: Seq[PreTrainedModel], caches: Seq[float], longest: int, steps: int, vocab: int) -> float:
    """Return about how many bytes one row of a batch needs.

    Args:
        models: the models that sample together, the student first.
        caches: their `cache_bytes`.
        longest: number of tokens of the longest prompt.
        steps: largest number of new tokens.
    """
    tokens = longest + steps
    states = [model.config.get_text_config().hidden_size * torch.finfo(model.dtype).bits // 8 for model in models]
    total = steps * states[-1] if len(models) > 1 else 0  # the teacher's states are kept
    for cache, state in zip(caches, states, strict=True):
        # for one layer at a time: the prompt's states, and keys and values repeated for every query head
        total += cache * tokens + (_STATES * longest + 2 * tokens) * state + _LOGITS * vocab * 4
    return total
