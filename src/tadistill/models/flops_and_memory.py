"""The cost of a stage: its FLOPs, its disk space, and the memory that it needs; and the free memory of this machine.

    check_memory({"teacher": weight_bytes(1_557_611_200, "float32")}, available_memory(), "use a smaller teacher")
    kept = kept_by_layer({"model_type": "gpt2", "n_embd": 768, ...}, bf16=True, dropout=False)
    kept.position * positions + kept.pair * pairs               # bytes of one layer, until its backward pass

A `Cost` has several parts. Predicted costs (`plan.costs`) and measured costs (`train.monitoring`) have the same parts. A part is named
PHASE/MODEL, where MODEL is student or teacher. There are seven phases:
- training: forward and backward passes on training text
- rollout: sampling
- scoring: forward passes over sampled text before an update
- corpus: MiniLLM's loss on the pre-training corpus
- recording: forward passes that store the teacher's outputs
- selection: evaluations on the dev set
- watching: computing metrics of sampled text

`Memory` also includes activations and logits, which depend on the batch. `plan.costs` computes it. Activations are those of transformers'
modules under autocast, for the model families of `models.parameter_counts`. `tests/unit/models/test_activations.py` compares them with
the tensors that autograd stores.
"""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tadistill.constants import OBJECTIVE, TILE_BYTES, TILE_ROWS
from tadistill.errors import ModelError
from tadistill.models.shapes import shape_of

_BYTES = {"float32": 4, "bfloat16": 2}
_HEAP = 1.15  # memory of a CPU's process / bytes in use: the C library keeps freed blocks that do not fit new tensors
TOKENIZER_BYTES = 1400
"""Bytes of host memory that a loaded tokenizer needs per token. Measured: 560 (GPT-2), 1,290 (SmolLM2) and 1,410 (Gemma 3, whose 262,144
tokens need 0.37 GB). A process has one tokenizer for each of its models."""
_DROPOUTS = {"gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "opt": {"dropout": 0.1, "attention_dropout": 0.0}}
"""Maps a family to the fields of its residual and attention dropout, with the default values of transformers."""


@dataclass(frozen=True)
class Kept:
    """The bytes of memory that the activations of one decoder layer need during training."""

    position: float
    """Bytes per token position that the layer keeps for its backward pass."""
    pair: float
    """Bytes per query-key pair that the layer keeps: its attention mask."""
    on_cpu: float
    """Bytes per token position that only a CPU keeps. A GPU computes the activation function in one kernel."""
    scores: float
    """The value that replaces `pair` on a CPU if attention has dropout, in bytes per query-key pair. A CPU has no fused kernel for
    attention with dropout."""
    running: float
    """Bytes per token position of temporary tensors, while one layer runs forward or backward."""


def kept_by_layer(config: Mapping[str, Any], *, bf16: bool, dropout: bool) -> Kept:
    """Return the memory that the activations of one layer need during training.

    Args:
        bf16: True if autocast computes in bfloat16. Then the residual stream and the inputs of norms stay float32.
        dropout: True if the model trains with the dropout of its configuration.
    """
    shape, family, width = shape_of(config), config["model_type"], 2 if bf16 else 4
    hidden, inner = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    casts = 1 if bf16 else 0  # autocast casts an input again for each matrix that multiplies it
    sums = 4 * shape.heads  # the attention kernel keeps one float32 number per query of each head
    if family in ("gpt2", "opt"):
        # inputs and outputs of two norms; queries, keys, values and the attention's output
        position = 8 * hidden + 6 * width * hidden + sums + 16
        position += 2 * width * inner if family == "gpt2" else width * inner + 2 * casts * width * hidden
        on_cpu = 3 * width * inner if family == "gpt2" else 0  # `models.architectures.fuse_gelu` makes GELU one kernel on a GPU
        residual, attention = (dropout and config.get(name, rate) for name, rate in _DROPOUTS[family].items())
        position += 2 * width * hidden if residual else 0
        scores = 12.0 * shape.heads if attention else 0.0
        return Kept(position, width, on_cpu, scores, (4 if family == "gpt2" else 2) * width * inner + 12 * hidden)
    # inputs of the norms in two forms; outputs of two norms; queries, keys and values after rotation, attention's output; four tensors of
    # the MLP. Keys and values are repeated for the query heads. A single key-value head is repeated without a copy, but autocast copies
    # the rotated keys.
    norms, alone = 4 if family == "gemma3_text" else 2, shape.groups == 1
    read = 2 * queries + (keys if alone and not bf16 else queries) + (keys if alone else queries)
    position = norms * (8 * hidden + 4) + (2 + 3 * casts) * width * hidden + width * read + 4 * width * inner + sums
    if family in ("qwen3", "gemma3_text"):  # norms of queries and keys
        position += (8 if family == "gemma3_text" else 4 + width) * (queries + keys) + 4 * (shape.heads + shape.groups)
    scores = 12.0 * shape.heads if dropout and config.get("attention_dropout") else 0.0
    return Kept(position, width, 0, scores, 3 * width * inner + 12 * hidden)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The bytes that one process of a stage needs, with one field per purpose. Not all of these bytes are needed at the same time.
    `peak` returns the largest number that is needed at one time."""

    weights: float = 0.0
    """Weights of the model that the stage trains or runs."""
    gradients: float = 0.0
    moments: float = 0.0
    """AdamW's two moments."""
    frozen: float = 0.0
    """Weights of all other models, such as teachers."""
    layers: float = 0.0
    """Tensors that a forward pass keeps for the backward pass: activations, and copies of weights in half precision."""
    cpu: float = 0.0
    """Additional tensors that only a CPU needs: the scores of attention with dropout, and the results of matrix products with the
    output head in half precision."""
    running: float = 0.0
    """Temporary tensors of one layer in the backward pass."""
    head: float = 0.0
    """The gradients that the fused head computes in the forward pass."""
    logits: float = 0.0
    """Size that the logits of student and teachers would have at all tokens of the loss of one micro-batch. They are computed in tiles,
    and only one tile is in memory at a time."""
    logit_row: float = 0.0
    """Bytes of `logits` per token."""
    returned: float = 0.0
    """Gradients of the embeddings that the backward pass has computed, but not yet added to `gradients`."""
    several: bool = False
    """True if the gradients are in memory also during a forward pass: if an update has several micro-batches, or with DDP."""
    sampling: float = 0.0
    """Caches and temporary tensors of sampling, or of an evaluation."""
    rollouts: float = 0.0
    """The teachers' last hidden states for all text of one round of sampling. They wait in host memory for the training on this text."""
    gathered: float = 0.0
    """Weights that an update gathers from other processes, if the student is sharded: embeddings, head and two layers."""

    def peak(self, *, cuda: bool, tile: float = TILE_BYTES) -> float:
        """Return the largest number of bytes at one time, in the memory of a GPU (`cuda`) or of a CPU.

        `tile` is the size of a tile of the fused head in bytes. The default is the size on a CPU, or on a GPU with little free memory. On
        other GPUs, the tiles are larger.
        """
        tile = min(self.logits * (1 + OBJECTIVE) if cuda else min(self.logits, TILE_ROWS * self.logit_row), tile)
        before = self.gradients if self.several else 0.0
        forward = before + self.layers + (0.0 if cuda else self.cpu) + self.head + max(tile, self.running)
        update = self.gathered + max(forward, self.gradients + self.returned)
        always = self.weights + self.moments + self.frozen + (0.0 if cuda else self.rollouts)
        return (1.0 if cuda else _HEAP) * (always + max(update, self.sampling))

    def sharded(self, processes: int, gathered: float) -> "Memory":
        """Return the memory of each process if the student is sharded over `processes`. In sampling and evaluation, each process still
        needs the whole student.

        `gathered` is the new value of the field with this name.
        """
        own = {name: getattr(self, name) / processes for name in ("weights", "gradients", "moments")}
        return replace(self, **own, gathered=gathered, sampling=self.sampling + self.weights - own["weights"])


def weight_bytes(parameters: int, dtype: str) -> int:
    """Return the number of bytes of a model's weights. `dtype` is float32 or bfloat16."""
    return parameters * _BYTES[dtype]


# --- the cost of a stage --------------------------------------------------------------------------------------------------

NOT_LEARNING = ("selection", "watching")
"""Phases that only measure the student. The comparison of two arms at equal compute ignores these phases."""


@dataclass(frozen=True)
class CostPart:
    """The FLOPs and the token positions of one part of a cost. Forward passes add to all fields, backward passes only to the FLOPs."""

    flops: float = 0.0
    positions: float = 0.0
    """Token positions that pass through the layers, including padding."""
    heads: float = 0.0
    """Token positions at which logits are computed."""

    def __add__(self, other: "CostPart") -> "CostPart":
        return CostPart(self.flops + other.flops, self.positions + other.positions, self.heads + other.heads)


@dataclass(frozen=True)
class Disk:
    """The disk space that a teacher's recorded outputs need."""

    token: float
    """Bytes per token of the text."""
    total: float
    """Estimated bytes of the whole recording."""
    exact: bool
    """False if the number of bytes differs from token to token. `token` and `total` are then upper limits."""


@dataclass(frozen=True)
class Cost:
    """The cost of a stage (one step of a study, such as a training): its parts by name, and some numbers for the whole stage."""

    parts: Mapping[str, CostPart] = field(default_factory=dict)
    padding: float = 0.0
    """Number of padding positions in the parts training/student and corpus/student."""
    published: float | None = None
    """FLOPs that MiniLLM's released code needs for the same number of sampled sequences. None if the method is not MiniLLM."""
    memory: Memory | None = None
    """Estimated memory of one process."""
    kind: str = ""
    """A key of the settings that determine a stage's speed. The number of updates is not one of them. Stages with equal keys are equally
    fast (FLOP/s)."""
    disk: Disk | None = None
    """Disk space of the outputs that the stage records. None if it records none."""
    asked: float = 0.0
    """Number of tokens that the first teacher samples or scores: those of answers and, with MiniLLM, of the pre-training corpus. They are
    tokens of the teacher's tokenizer (for a teacher behind an API, of the students'). Evaluations on the dev set do not count."""
    elsewhere: bool = False
    """True if a model behind an API does the work. Its FLOPs are not known, and are not counted."""

    @property
    def learning(self) -> float:
        """The FLOPs of all phases except selection and watching. With `compute: as X`, an arm gets as many of these FLOPs as arm X."""
        return self.of(*(name for name in self.parts if phase(name) not in NOT_LEARNING))

    @property
    def total(self) -> float:
        return self.of(*self.parts)

    def of(self, *names: str) -> float:
        """Return the sum of the FLOPs of the named parts."""
        return float(sum(self.parts[name].flops for name in names))

    def phases(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found[phase(name)] = found.get(phase(name), 0.0) + part.flops
        return found


def spans(flops: Mapping[str, float]) -> dict[str, float]:
    """Return the FLOPs of each span. A span is a part of the training loop whose time is measured. `flops` has the FLOPs of each phase.

    The span `sampling` consists of the phases rollout and scoring. The span `training` consists of corpus and training. Every other phase
    is a span of its own.
    """
    found: dict[str, float] = {}
    for name, value in flops.items():
        span = {"rollout": "sampling", "scoring": "sampling", "corpus": "training"}.get(name, name)
        found[span] = found.get(span, 0.0) + value
    return found


def phase(name: str) -> str:
    return name.split("/", 1)[0]


# --- this machine ---------------------------------------------------------------------------------------------------------

_MALLOC = {-3: 2**30, -1: 2**30, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h


def check_memory(needs: Mapping[str, float], available: float, advice: str, where: str = "memory") -> None:
    """Check that the memory is large enough for all `needs` together. `needs` maps names to numbers of bytes.

    `available` is the memory in bytes. `where` is the name of this memory in the message.

    Raises:
        ModelError: the memory is too small. The message lists the `needs`, their sum, the free memory and the `advice`.
    """
    total = sum(needs.values())
    if total > available:
        parts = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.items())
        raise ModelError(f"the models need {total / 1e9:.1f} GB of {where} ({parts}), but only {available / 1e9:.1f} GB are free; {advice}")


def keep_freed_memory() -> None:
    """Let this process keep large blocks of freed memory for later use. This works with the C library glibc only.

    By default, glibc gives large blocks back to the system, and asks for new ones in each update. This costs 3 to 5 % of the time of a
    small student's update. With this function, blocks of many sizes stay in the heap, so the process grows until `give_back_freed_memory`
    is called. It is only for training: small results that are kept between the large logits of a recording split the heap's free blocks,
    and the process grew to 8 GB, of which it needed 0.3 GB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Give the freed memory of this process back to the system. This works with the C library glibc only.

    Without this function, a long training on a CPU grew to 7.4 GB of memory, of which it needed 2.1 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def visible_gpus(count: int) -> list[str]:
    """Return the names of GPUs in CUDA_VISIBLE_DEVICES. If this variable is not set, return the numbers 0 to `count` - 1 as text."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(number) for number in range(count)]


def available_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of bytes that this process can still use. A Slurm job or a container can have less than the free memory of the
    machine."""
    import psutil  # not at the top, because `plan` checks no memory

    free = psutil.virtual_memory().available
    if not own.is_file():
        return free  # not Linux
    lines = own.read_text(encoding="utf-8").splitlines()
    path = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)
    if path is None:
        return free  # cgroup version 1
    here = root / path
    for folder in (here, *here.parents):
        if root not in (folder, *folder.parents):
            break
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            stat = _text(folder / "memory.stat").splitlines()
            # page cache that the kernel frees when memory is short, though memory.current includes it
            cached = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
            free = min(free, max(limit - used + cached, 0))
    return free


def _number(path: Path) -> int | None:
    # a control file contains a number of bytes, or `max`
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
