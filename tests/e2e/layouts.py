"""Training stages under every layout of student and teacher over processes: what `test_layouts` compares with one process."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from tests.e2e.inprocess import tried_once
from tests.e2e.on_policy import BATCH, ROUNDS, STEPS, _sampler, model, rows
from tests.families import tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tadistill.config.method import Method
from tadistill.config.method_parts import Optim, Select
from tadistill.config.method_rules import check_pairing
from tadistill.errors import Interrupted
from tadistill.models.loading import save_model
from tadistill.models.modify import recompute_layers
from tadistill.models.sharding import offload, shard, weights
from tadistill.models.teachers import MovingAverage, frozen_copy
from tadistill.rollout.samplers import Shard
from tadistill.train.checkpoint import Checkpoints
from tadistill.train.loop import Hooks, train_stage
from tadistill.train.step import make_step

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({"type": "cross_entropy"}, {"type": "dataset"}),
    "kd": ({"type": "forward_kl"}, {"type": "dataset"}),
    "on-policy": ({"type": "reverse_kl"}, {"type": "student", **ROUNDS}),
    "ema": ({"type": "forward_kl", "kd_ratio": 0.5}, {"type": "dataset"}),
    "minillm": ({"type": "minillm", "preset": "official"}, {"type": "teacher_mixed", **ROUNDS}),  # two forward passes a backward pass
}


@dataclass(frozen=True)
class Case:
    """One training stage."""

    method: str
    fsdp: bool = False
    teacher: str = "replicated"
    tied: bool = False
    recompute: bool = False
    precision: str = "fp32"
    kind: str = ""
    """Type of the student. By default, it is GPT-2 if `tied`, and llama otherwise."""

    @property
    def name(self) -> str:
        """Name for folders and test ids."""
        extra = ["tied"] * self.tied + ["recompute"] * self.recompute + ["bf16"] * (self.precision == "bf16")
        extra += [self.kind] * bool(self.kind)
        return "-".join([self.method, "fsdp" if self.fsdp else "ddp", self.teacher, *extra])

    @property
    def alone(self) -> "Case":
        """The same case for one process."""
        return Case(self.method, tied=self.tied, recompute=self.recompute, precision=self.precision, kind=self.kind)


CASES = [
    *(Case(method, fsdp) for method in METHODS for fsdp in (False, True) if fsdp or method != "ema"),
    Case("kd", True, tied=True),
    Case("on-policy", True, tied=True),
    Case("kd", True, recompute=True),
    Case("kd", True, "sharded"),
    Case("on-policy", False, "sharded"),
    Case("kd", False, "offloaded"),
    Case("minillm", True, "offloaded"),
    Case("minillm", True, "sharded"),
    *(Case("kd", fsdp, kind="gemma3") for fsdp in (False, True)),  # a vision encoder that no text passes, as deep as the decoder
    Case("minillm", kind="gemma3"),
    Case("kd", True, kind="hrm_text"),  # two stacks, which each token passes several times
]
HALF = [Case("on-policy", fsdp, precision="bf16") for fsdp in (False, True)]


@dataclass
class Found:
    """Losses of all updates, final weights, the dev loss of each evaluation, and what was metered."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    dev: list[float] = field(default_factory=list)
    heads: float = 0.0
    """Number of tokens of the loss in all updates and processes, as metered."""


def _losses(directory: Path) -> list[float]:
    log = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["train/loss"] for row in rows if "train/loss" in row]


@tried_once()
def train(directory: Path, case: Case, *, stop: Callable[[], bool] = lambda: False) -> Found:
    """Train; the state stays in `directory`, and the model as a Hugging Face directory in `directory`/model."""
    objective, sampling = METHODS[case.method]
    how = {"gradient_checkpointing": case.recompute, "precision": case.precision}
    optim = Optim(steps=STEPS, batch=BATCH, micro_batch=2, lr=1e-3, eps=1e-4, **how)
    ema = 0.8 if case.method == "ema" else None
    method = Method.model_validate({"objective": objective, "sampler": sampling, "optim": optim, "ema": ema})
    check_pairing(method)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if case.precision == "bf16" else "no")
    tokenizer, _ = rows()
    student = _of_kind(case.kind, tokenizer) if case.kind else _model(1, 16, tokenizer, case.tied)
    teacher = _model(2, 24, tokenizer, False).requires_grad_(False)
    if case.recompute:
        recompute_layers(student)
        student.train()
    average = None
    if case.fsdp and accelerator.num_processes > 1:
        shard(student, torch.device("cpu"))
    if ema is not None:
        sharded = _model(1, 16, tokenizer, case.tied).requires_grad_(False)
        teacher = shard(sharded, torch.device("cpu")) if case.fsdp and accelerator.num_processes > 1 else frozen_copy(student)
        average = MovingAverage(student, teacher, ema)
    if case.teacher != "replicated":
        {"sharded": shard, "offloaded": offload}[case.teacher](teacher, torch.device("cpu"))
    sampler = _sampler(method, student, (teacher,), tokenizer, Shard(accelerator.process_index, accelerator.num_processes), None)
    directory.mkdir(parents=True, exist_ok=True)
    found, before = Found(), len(_losses(directory))

    def evaluate() -> dict[str, float]:
        """Run more forward passes on one process than on another, in inference mode, as sampling does."""
        ids = torch.arange(20, 30).unsqueeze(0)
        with torch.inference_mode():
            for _ in range(accelerator.process_index + 1):
                loss = student(input_ids=ids, labels=ids).loss
        found.dev.append(float(loss))
        return {"loss": float(loss)}

    try:
        with mock.patch.object(Checkpoints, "due", side_effect=[update == 4 for update in range(STEPS)]):  # one state, half-way
            state = train_stage(
                student,
                replace(make_step(method, student, () if case.method == "sft" else (teacher,), len(tokenizer)), average=average),
                sampler,
                optim=optim,
                select=Select(metric="loss", every=2),
                seed=1,
                accelerator=accelerator,
                directory=directory,
                hooks=Hooks(evaluate=evaluate, progress=lambda done, text: None, stop=stop),
            )
    except Interrupted:
        return found
    finally:
        found.losses = _losses(directory)[before:]
    found.heads = state.ledger["parts"]["training/student"]["heads"]
    found.weights = weights(student)
    if accelerator.is_main_process:
        save_model(student, tokenizer, directory / "model", found.weights)
    return found


def _model(seed: int, hidden: int, tokenizer: Any, tied: bool) -> PreTrainedModel:
    """Build a model of two layers: GPT-2 if the head shares the embedding's weight, else llama."""
    torch.manual_seed(seed)
    if tied:
        sizes = {"n_embd": hidden, "n_layer": 2, "n_head": 2, "n_positions": 64}
        config = GPT2Config(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, **sizes)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # other processes see other dropout
        return GPT2LMHeadModel(config).eval()
    return model(seed, hidden, tokenizer, num_hidden_layers=2, initializer_range=0.3, intermediate_size=2 * hidden + 1)  # odd: cut unevenly


def _of_kind(kind: str, tokenizer: Any) -> PreTrainedModel:
    config = tiny_config(kind)
    config.get_text_config().update({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None})
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def interrupted(directory: Path, case: Case) -> Found:
    """Train, and stop after five updates."""
    asked = iter([False] * 5)
    return train(directory, case, stop=lambda: next(asked, True))


RESUMED = Case("on-policy", True)


def train_all(out: Path) -> None:
    """Train all cases as one of several processes, leave one stage unfinished, and finish one that a single process has begun."""
    everything = {case.name: vars(train(out / case.name, case)) for case in (*CASES, *HALF)}
    interrupted(out / "two-then-one", RESUMED)
    everything["one-then-two"] = vars(train(out / "one-then-two", RESUMED))
    if PartialState().is_main_process:
        torch.save(everything, out / "found.pt")
    PartialState().wait_for_everyone()
