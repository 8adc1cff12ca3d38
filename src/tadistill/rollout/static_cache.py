"""Sampling at fixed shapes, for GPUs. Each step (one new token per row) is the same sequence of operations on the same memory.

The usual loop of `sample` copies the tokens to the host after each step, removes finished rows, and attends only to the columns in use. It
is best on a CPU. A GPU computes a step faster than the host can start it, so here the host has less to do. Caches, masks and results have
their full size from the start. Finished rows stay in the batch, and their further tokens are ignored. Student and teacher process a token
in the same step. A step copies no value to the host. Only before every eighth token, the host asks the device if a row is unfinished. So a
step can also be recorded once and repeated, as CUDA graphs require (tests/unit/rollout/test_static_cache.py does that on a CPU).

Tokens and probabilities equal those of the usual loop of `sample`, up to rounding.

Axes: B sequences, W columns of the longest prompt, L columns of the caches, T positions of the response, V vocabulary size, H hidden size.
"""

import sys
from collections.abc import Iterator
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.models.architectures import is_full
from tadistill.models.forward import evaluating
from tadistill.models.shapes import positions_of
from tadistill.rollout.decoder import WAYS, Decoder, InPlaceLayer, Trial, aligned, keeps_all, left_padded, way_of
from tadistill.rollout.draw import ASK_EVERY, Guide, Record, next_tokens, processors, teacher_tap

DEVICES = {"cuda"}
"""Types of devices on which text is sampled at fixed shapes. Tests add the CPU."""
_RIGHT: WeakKeyDictionary[PreTrainedModel, tuple[int, int]] = WeakKeyDictionary()
"""Maps a model to the largest number of columns that gave correct logits, and to the smallest one that did not."""


def possible(model: PreTrainedModel, capacity: int, decoding: Decoding) -> bool:
    """Return True if `fill` supports the model and the settings.

    The model must keep keys and values of `capacity` tokens, and accept a mask with one entry per column of the cache. This is tried on the
    loaded model, and tried again for a larger cache: GPT-Neo computes its window from the size of the cache. `decoding` must not
    forbid repeated n-grams, because the search for them runs on the host.
    """
    if decoding.no_repeat_ngram is not None or not keeps_all(model.config, capacity):
        return False
    right, wrong = _RIGHT.get(model, (0, sys.maxsize))
    if right < capacity < wrong and (tried := _tried(model, capacity)) < wrong:
        try:
            with evaluating(model), torch.inference_mode():
                found = way_of(model) == WAYS[0] and Trial(model).agrees(partial(_read, model, tried), WAYS[0])
        except Exception as error:
            if is_full(error):
                return False  # the trial may need more memory than the batch, which then decides
            raise
        right, wrong = _RIGHT[model] = (tried, wrong) if found else (right, tried)
    return capacity <= right


def _tried(model: PreTrainedModel, capacity: int) -> int:
    # a power of two, so that batches of rising lengths need few trials
    positions = positions_of(model.config.get_text_config(decoder=True).to_dict()) or sys.maxsize
    return max(capacity, min(1 << (capacity - 1).bit_length(), positions))


@torch.inference_mode()
def fill(
    record: Record,
    models: dict[str, PreTrainedModel],
    prompts: list[tuple[int, ...]],
    uniforms_BT: np.ndarray,
    vocab: int,
    decoding: Decoding,
    guide: Guide | None,
) -> None:
    """Sample a response to every prompt, and write the responses into `record`."""
    steps = uniforms_BT.shape[1]
    with teacher_tap(guide) as seen:
        columns = Columns(models, prompts, steps, vocab)
        said = Said(uniforms_BT, record.eos, models, columns.device)
        step = Step(columns, said, decoding, guide, seen)
        step.say(columns.prompts())
        for t in range(1, steps):
            if t % ASK_EVERY == 0 and not said.going_B.any():
                break
            step()
    record.take(said.tokens_BT, said.values, said.hidden_BTH)


class Step:
    """A step of sampling: the models process the last token of every row, and the next token is drawn. Nothing is copied from the host."""

    def __init__(self, columns: "Columns", said: "Said", decoding: Decoding, guide: Guide | None, seen: list[Tensor]):
        self.columns, self.said, self.guide, self.seen = columns, said, guide, seen
        self.warping, self.greedy = processors(decoding), decoding.temperature == 0

    def __call__(self) -> None:
        self.say(self.columns.next(self.said.last_B1))

    def say(self, logits: dict[str, Tensor]) -> None:
        """Draw the next token of every row from the models' logits (B, V), and store it."""
        # no setting that `possible` accepts depends on the tokens so far, so any tokens can be the argument
        scores = {name: self.warping(self.said.last_B1, z) for name, z in logits.items()} if self.warping else logits  # type: ignore[arg-type]
        tokens_B, log_p = next_tokens(logits, scores, self.said.next_uniforms(), self.guide, greedy=self.greedy)
        # the teacher is called last, so its states are the last in the list, also if student and teacher are the same model
        self.said.add(tokens_B, log_p, self.seen[-1][:, -1] if self.seen else None)
        self.seen.clear()


class Columns:
    """The inputs of the models for one batch: first the prompts, then one new token of every row per step. `Columns` also keeps the
    models' caches, which are allocated once at full size."""

    def __init__(self, models: dict[str, PreTrainedModel], prompts: list[tuple[int, ...]], steps: int, vocab: int):
        self.width, self.device = max(map(len, prompts)), models["student"].device
        capacity = aligned(self.width + steps - 1)  # no model processes the last token
        ids, attention, positions = (torch.from_numpy(a).to(self.device) for a in left_padded(prompts, self.width))
        self.ids_BW, self.attention_BW, self.positions_BW = ids, attention, positions
        self.padded = len({len(prompt) for prompt in prompts}) > 1
        self.at_1 = torch.full((1,), self.width, device=self.device)
        """The cache column (1,) of the tokens that the next call of `next` processes."""
        self.next_B1 = positions[:, -1:] + 1
        """The position (B, 1), in each row, of the token that the next call of `next` processes. Padding is not counted."""
        self.decoders, self.masks = {}, {}
        for name, model in models.items():
            decoder = self.decoders[name] = Decoder(model, vocab, capacity, WAYS[0])
            decoder.memory = DynamicCache(config=model.config)
            decoder.memory.layers[:] = [_Layer(capacity, self.at_1) for _ in decoder.memory.layers]
            mask = attention.new_full((len(prompts), 1, 1, capacity), torch.finfo(model.dtype).min, dtype=model.dtype)
            mask[..., : self.width].masked_fill_(attention[:, None, None] == 1, 0)
            self.masks[name] = mask

    def prompts(self) -> dict[str, Tensor]:
        """Run each model over the prompts. Return each model's logits (B, V) of the next token."""
        attention_BW = self.attention_BW if self.padded else None
        return {name: d.logits(self.ids_BW, attention_BW, self.positions_BW, 0) for name, d in self.decoders.items()}

    def next(self, tokens_B1: Tensor) -> dict[str, Tensor]:
        """Run each model over one more token of every row. Return each model's logits (B, V) of the next token."""
        found = {}
        for name, decoder in self.decoders.items():
            self.masks[name].index_fill_(3, self.at_1, 0)
            found[name] = decoder.logits(tokens_B1, self.masks[name], self.next_B1, 0)
        self.at_1.add_(1)
        self.next_B1.add_(1)
        return found


class Said:
    """The responses of a batch so far, on the models' device."""

    def __init__(self, uniforms_BT: np.ndarray, eos: np.ndarray, models: dict[str, PreTrainedModel], device: torch.device):
        self.uniforms_BT, self.eos = torch.from_numpy(uniforms_BT).to(device), torch.from_numpy(eos).to(device)
        rows = len(uniforms_BT)
        self.tokens_BT = torch.zeros(uniforms_BT.shape, dtype=torch.long, device=device)
        self.values = {name: torch.zeros(uniforms_BT.shape, device=device) for name in ("behaviour", *models)}
        self.hidden_BTH: Tensor | None = None  # allocated when its size is known
        self.going_B = torch.ones(rows, dtype=torch.bool, device=device)
        """True (B,) for the rows that have no EOS yet."""
        self.last_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.t_1 = torch.zeros(1, dtype=torch.long, device=device)

    def next_uniforms(self) -> Tensor:
        return self.uniforms_BT.index_select(1, self.t_1).squeeze(1)

    def add(self, tokens_B: Tensor, log_p: dict[str, Tensor], hidden_BH: Tensor | None) -> None:
        """Store the next token of every row, its log-probabilities, and the inputs of the teacher's output head."""
        self.last_B1.copy_(tokens_B.unsqueeze(1))
        self.tokens_BT.index_copy_(1, self.t_1, self.last_B1)
        for name, log_p_B in log_p.items():
            self.values[name].index_copy_(1, self.t_1, log_p_B.unsqueeze(1))
        if hidden_BH is not None:
            if self.hidden_BTH is None:
                self.hidden_BTH = hidden_BH.new_zeros(*self.tokens_BT.shape, hidden_BH.shape[1])
            self.hidden_BTH.index_copy_(1, self.t_1, hidden_BH.unsqueeze(1))
        self.going_B.logical_and_((self.last_B1 != self.eos).all(1))
        self.t_1.add_(1)


class _Layer(InPlaceLayer):
    # the first call writes the first columns, like its base class; later calls write the column `at_1`, and return all columns
    def __init__(self, capacity: int, at_1: Tensor):
        super().__init__(capacity)
        self.at_1 = at_1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for states in (self.keys, self.values):
            assert states is not None
            states.zero_()  # hidden columns are still multiplied by a weight of 0, and NaN times 0 is NaN

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys.index_copy_(2, self.at_1, key_states), self.values.index_copy_(2, self.at_1, value_states)


def _read(model: PreTrainedModel, capacity: int, texts: list[Tensor], steps: int) -> Iterator[tuple[int, int, Tensor]]:
    tokens = [text.tolist() for text in texts]
    prompts = [tuple(t[: len(t) - steps + 1]) for t in tokens]
    columns = Columns({"student": model}, prompts, max(steps, capacity - max(map(len, prompts))), 10**9)
    logits = columns.prompts()["student"]
    for step in range(steps):
        yield from ((row, step, z) for row, z in enumerate(logits))
        if step + 1 < steps:
            last = torch.tensor([[t[len(t) - steps + 1 + step]] for t in tokens], device=model.device)
            logits = columns.next(last)["student"]
