"""Sample responses in batches from a transformers model, alone or together with a teacher.

`Native` is an engine: an object that samples responses to prompts. `rollout.vllm` has the engine that uses vLLM. `sample` is the loop over
positions. `teacher_mixed_fast` samples faster from a mixture of two models, and `static_cache` samples faster on a GPU. Both give the same
result, but do not support all models and settings. `decoder` chooses how each model keeps earlier tokens, usually in a KV cache. The caller
gives the random numbers of each sequence, so a sequence does not depend on the other sequences in its batch. Finished sequences are removed
from the batch.

Axes: B sequences, T positions, V vocabulary size, H hidden size.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.constants import COMPACT_BELOW
from tadistill.models.forward import evaluating
from tadistill.models.modify import in_bfloat16
from tadistill.objectives.tiles import free_bytes
from tadistill.rollout import static_cache, teacher_mixed_fast
from tadistill.rollout.decoder import WAYS, Decoder, groups, left_padded, way_of
from tadistill.rollout.draw import Guide, Mixture, Record, Rollout, next_tokens, processors, teacher_tap


class _Batch:
    def __init__(self, models: dict[str, PreTrainedModel], prompts: list[tuple[int, ...]], uniforms_BT: np.ndarray, vocab: int):
        self.width = max(map(len, prompts))
        device, total = models["student"].device, self.width + uniforms_BT.shape[1]
        self.vocab, self.start, self.end = vocab, 0, self.width  # the models have not processed the columns from start to end - 1
        ids, attention, positions = left_padded(prompts, total)
        self.ids, self.positions = (torch.from_numpy(a).to(device) for a in (ids, positions))
        # without padding no mask is needed, and attention is faster without one
        self.attention = None if attention.all() else torch.from_numpy(attention).to(device)
        self.uniforms = torch.from_numpy(uniforms_BT).to(device)
        self.drops = all(way_of(model).drops for model in models.values())
        self.decoders = {name: Decoder(model, vocab, total - 1, way_of(model)) for name, model in models.items()}

    def logits(self) -> dict[str, Tensor]:
        attention = None if self.attention is None else self.attention[:, : self.end]
        inputs = self.ids[:, : self.end], attention, self.positions[:, : self.end], self.start
        return {name: decoder.logits(*inputs) for name, decoder in self.decoders.items()}

    def history(self) -> torch.LongTensor:
        """Return all tokens so far (B, T), for the search for repeated n-grams. Padding has the id `vocab`, which no token has."""
        ids = self.ids[:, : self.end]
        if self.attention is not None:
            ids = ids.masked_fill(self.attention[:, : self.end] == 0, self.vocab)
        return cast(torch.LongTensor, ids)

    def next_uniforms(self) -> Tensor:
        return self.uniforms[:, self.end - self.width]

    def append(self, tokens_B: Tensor) -> None:
        self.ids[:, self.end] = tokens_B
        self.start, self.end = self.end, self.end + 1

    def keep(self, places: np.ndarray) -> None:
        index = torch.from_numpy(places).to(self.ids.device)
        self.ids, self.positions, self.uniforms = self.ids[index], self.positions[index], self.uniforms[index]
        if self.attention is not None:
            self.attention = self.attention[index]
        for decoder in self.decoders.values():
            decoder.keep(index)


def sample(
    student: PreTrainedModel,
    prompts: list[tuple[int, ...]],
    uniforms_BT: np.ndarray,
    *,
    eos: tuple[int, ...],
    vocab: int,
    decoding: Decoding = Decoding(),
    guide: Guide | None = None,
) -> list[Rollout]:
    """Sample one response per prompt. A response ends with a token of `eos`, or after `uniforms_BT.shape[1]` tokens.

    Args:
        prompts: token ids without padding.
        uniforms_BT: (B, max_new_tokens) random numbers in [0, 1). Token t of response b is drawn with the number [b, t]. In a mixture, the
            number first selects the model (`Mixture.switch`).
        vocab: size of the vocabulary that the models share. Token ids beyond it are never sampled.
        decoding: the settings that change each model's logits before mixing. Its `max_new_tokens` is ignored.
        guide: how a teacher helps to sample; None if the student samples alone.

    Returns:
        Rollouts in the order of the prompts.
    """
    models = {"student": student} | ({"teacher": guide.teacher} if guide else {})
    record = Record(len(prompts), uniforms_BT.shape[1], eos, models)
    with evaluating(student):
        capacity = max(map(len, prompts)) + uniforms_BT.shape[1]
        fit = (teacher_mixed_fast.possible(model, capacity) for model in models.values())
        packed = guide if isinstance(guide, Mixture) and decoding.plain and all(fit) else None
        # without CUDA graphs, `teacher_mixed_fast` starts fewer kernels than `static_cache`, where both models process every token
        in_step = student.device.type in static_cache.DEVICES and not packed
        if in_step and all(static_cache.possible(model, capacity, decoding) for model in models.values()):
            static_cache.fill(record, models, prompts, uniforms_BT, vocab, decoding, guide)
        elif packed:
            teacher_mixed_fast.fill(record, student, prompts, uniforms_BT, vocab, packed)
        else:
            for rows in groups(prompts, all(way_of(model).padded for model in models.values())):
                batch = _Batch(models, [prompts[row] for row in rows], uniforms_BT[rows], vocab)
                _fill(record, rows, batch, decoding, guide)
    # copied outside of inference mode, because tensors made in inference mode cannot be part of a loss
    return record.rollouts()


@torch.inference_mode()
def _fill(record: Record, rows: np.ndarray, batch: _Batch, decoding: Decoding, guide: Guide | None) -> None:
    steps = record.tokens.shape[1]
    warping, greedy = processors(decoding), decoding.temperature == 0
    with teacher_tap(guide) as seen:
        for t in range(steps):
            logits = batch.logits()
            scores = {name: warping(batch.history(), z) for name, z in logits.items()} if warping else logits
            tokens, log_p = next_tokens(logits, scores, batch.next_uniforms(), guide, greedy=greedy)
            record.say(rows, t, tokens.cpu().numpy())
            # the teacher is called last, so its states are the last in the list, also if student and teacher are the same model
            record.score(rows, t, log_p, seen[-1][:, -1] if seen else None)
            seen.clear()
            going = (record.lengths[rows] > t + 1).nonzero()[0]
            if len(going) == 0:
                break
            batch.append(tokens)
            if batch.drops and len(going) < COMPACT_BELOW * len(rows):
                batch.keep(going)
                rows = rows[going]
    record.settle()


_SHARE = 0.6  # share of the GPU's free memory that a batch of rows may use
_ROWS = 512  # most rows in a batch; with more rows, a GPU computes longer than the host needs to start a step
_TRIED = 4  # number of tokens whose keys and values are measured
_STATES = 12  # states of a token in memory at once in a layer, in units of the hidden size; most of them are the MLP's
_LOGITS = 8  # float32 numbers per vocabulary entry and model: logits, probabilities, and sorted copies for top-p


Prompt = tuple[int, ...]
"""The token ids of a prompt, without padding."""
Tick = Callable[[int], None]
"""A function that is called with the number of responses that have finished since its last call."""


class Engine(Protocol):
    """The interface of an engine, which samples responses with the student's current weights."""

    student: PreTrainedModel
    decoding: Decoding

    def respond(
        self, prompts: Seq[Prompt], uniforms_BT: np.ndarray, guide: Guide | None = None, tick: Tick = lambda _: None
    ) -> list[Rollout]:
        """Return one response per prompt, in order. Response b depends on the random numbers `uniforms_BT[b]`, and has at most
        `uniforms_BT.shape[1]` tokens."""
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
        self, prompts: Seq[Prompt], uniforms_BT: np.ndarray, guide: Guide | None = None, tick: Tick = lambda _: None
    ) -> list[Rollout]:
        """Return responses like `Engine.respond`. After each batch, call `tick` with the number of prompts in the batch."""
        order = np.argsort([len(p) for p in prompts], kind="stable")
        found: dict[int, Rollout] = {}
        with in_bfloat16(self.student) if self.half else nullcontext():
            for part in self._batches(prompts, order, uniforms_BT.shape[1], guide):
                texts = [prompts[i] for i in part]
                out = sample(self.student, texts, uniforms_BT[part], eos=self.eos, vocab=self.vocab, decoding=self.decoding, guide=guide)
                found |= dict(zip(part.tolist(), out, strict=True))
                tick(len(part))
        return [found[i] for i in range(len(prompts))]

    def _batches(self, prompts: Seq[Prompt], order: np.ndarray, steps: int, guide: Guide | None) -> list[np.ndarray]:
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
