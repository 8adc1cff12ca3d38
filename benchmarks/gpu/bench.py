"""What the parts of the kit share: the device, the clock, the lines of the result, and models with random weights."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedModel, Qwen2Config

from tadistill.data.batch import Sequence
from tadistill.models.architectures import fuse_gelu

CONFIGS = {"gpt2": GPT2Config, "llama": LlamaConfig, "opt": OPTConfig, "qwen2": Qwen2Config}
VOCAB = 97
"""Vocabulary of the small models."""
ENOUGH = 5.0
"""A repeated measurement ends if fewer seconds than this are left."""


@dataclass
class Kit:
    """A run of the kit. Its methods write lines of the part that is running now."""

    device: torch.device
    tiny: bool
    budget: float
    started: float = field(default_factory=time.monotonic)
    lines: list[dict[str, Any]] = field(default_factory=list)
    said: Callable[[dict[str, Any]], None] = lambda line: None
    """Called with every line when it is added, so that a run that is killed keeps it."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.budget - (time.monotonic() - self.started)

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Add a line with a rule: the value is at most `bound`. NaN breaks the rule."""
        self._line(name, value, f"at most {bound:g}", bool(value <= bound))

    def at_least(self, name: str, value: float, bound: float) -> None:
        """Add a line with a rule: the value is at least `bound`."""
        self._line(name, value, f"at least {bound:g}", bool(value >= bound))

    def note(self, name: str, value: Any) -> None:
        """Add a line without a rule."""
        self._line(name, value, "", None)

    def _line(self, name: str, value: Any, rule: str, ok: bool | None) -> None:
        self.lines.append({"name": name, "value": value, "rule": rule, "ok": ok})
        self.said(self.lines[-1])

    # --- the device -----------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait for the device, so that the clock includes its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Free unused memory, and start to measure the peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """Return the largest number of allocated GB since `free`. None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def allocated(self) -> float | None:
        """Return the number of allocated GB. None on a CPU."""
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else None

    def milliseconds(self, work: Callable[[], Any], repeat: int = 3, warm: int = 1) -> float:
        """Return the median time of `work`."""
        for _ in range(warm):
            work()
        found: list[float] = []
        while len(found) < repeat and (not found or self.left() > ENOUGH):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(1e3 * (time.perf_counter() - start))
        return statistics.median(found)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Add the error of an optional measurement as a line, and go on. Out of memory is such an error."""
        try:
            yield
        except Exception as error:
            self.note(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
            self.free()


# --- numbers ------------------------------------------------------------------------------------------------------------


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by the norm of `expected`."""
    a, b = (x.detach().double().cpu().flatten() for x in (got, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def cosine(got: Tensor, expected: Tensor) -> float:
    """Return the cosine of the angle between two gradients."""
    a, b = (x.detach().double().cpu().flatten() for x in (got, expected))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


# --- models and texts ---------------------------------------------------------------------------------------------------


def build(kind: str, *, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Return a model with random weights, made on its device. Token 0 is BOS, EOS and padding."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes), dtype=dtype)
    return model.eval()


def small(kind: str, *, seed: int = 0, layers: int = 2, vocab: int = VOCAB) -> PreTrainedModel:
    """Return a model of a few thousand weights on the CPU. Its predictions are far from uniform."""
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 128}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    elif kind == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": layers, "dropout": 0.0}
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 128}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "max_position_embeddings": 128}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = build(kind, device=torch.device("cpu"), seed=seed, vocab_size=vocab, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def moved(model: PreTrainedModel, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a copy of a model on a device, with weights of `dtype`."""
    return copy.deepcopy(model).to(device=device, dtype=dtype)  # type: ignore[arg-type]


def as_in_a_stage(model: PreTrainedModel) -> PreTrainedModel:
    """Change a model as a stage does that loads it: on a GPU, GELU is one kernel."""
    if model.device.type == "cuda":
        fuse_gelu(model)
    return model


def texts(rows: int, prompt: int, response: int, vocab: int, seed: int = 0) -> list[Sequence]:
    """Return random token sequences. Lengths are between half of the given lengths and the whole."""
    draw = np.random.default_rng(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.integers(1, vocab, most - int(draw.integers(most // 2 + 1))).tolist())

    return [Sequence(tokens(prompt), tokens(response)) for _ in range(rows)]


@dataclass(frozen=True)
class Pair:
    """The sizes of a student and a teacher whose speed is measured."""

    name: str
    kind: str
    student: dict[str, Any]
    teacher: dict[str, Any]
    vocab: int

    def make_student(self, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return build(self.kind, device=device, dtype=dtype, vocab_size=self.vocab, **self.student)

    def make_teacher(self, device: torch.device) -> PreTrainedModel:
        return build(self.kind, device=device, dtype=torch.bfloat16, seed=1, vocab_size=self.vocab, **self.teacher).requires_grad_(False)


def pairs(kit: Kit) -> list[Pair]:
    """Return the pairs: GPT-2 and Qwen2.5 in their published sizes, or one of a few thousand weights."""
    if kit.tiny:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
        return [Pair("tiny", "qwen2", size, size | {"num_hidden_layers": 2}, VOCAB)]
    gpt2 = {"n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base, xl = {"n_embd": 768, "n_layer": 12, "n_head": 12}, {"n_embd": 1600, "n_layer": 48, "n_head": 25}
    half = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    seven = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    return [
        Pair("GPT-2 124M from 1.5B", "gpt2", gpt2 | base, gpt2 | xl, 50257),
        Pair("Qwen2.5 0.5B from 7B", "qwen2", half | {"tie_word_embeddings": True}, seven, 151936),
    ]
