"""Parts of the kit about training: every objective's update on the device, resuming, memory after a stage, and a whole study."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bench import VOCAB, Kit, as_in_a_stage, cosine, moved, relative, small, texts
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config.common import ObjectiveBase
from tadistill.config.method import Method
from tadistill.config.method_parts import Optim, Select
from tadistill.config.method_rules import check_pairing, over_spans
from tadistill.config.objective import Custom, ForwardKL, Gold, JensenShannon, MiniLLM, Objective, ReverseKL
from tadistill.data.batch import Sequence
from tadistill.data.encoding import Encoded
from tadistill.data.other_tokenizer import Rereader
from tadistill.data.tinyworld import PIECES, WORDS, tokenizer, world_rows
from tadistill.data.token_bytes import token_bytes
from tadistill.errors import Interrupted
from tadistill.rollout.draw import Mixture, Rollout
from tadistill.rollout.engine import Native, sample
from tadistill.rollout.rounds import on_policy
from tadistill.rollout.samplers import FixedSequences, Sampler
from tadistill.train.loop import Hooks, train_stage
from tadistill.train.step import make_step

CPU, ROWS, NEW = torch.device("cpu"), 8, 12
PEOPLE = 20  # of tinyworld
BF16_COSINE = 0.98
BF16_LOSS = 5e-3
"""Largest difference of a bf16 loss from the float32 one, as a part of it. A number in bfloat16 is wrong by up to 0.004 of it."""


def fresh_accelerator(device: torch.device, precision: str) -> Accelerator:
    """Return an accelerator for this device and precision. accelerate keeps those of the first one for the whole process."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=1, mixed_precision="bf16" if precision == "bf16" else "no")


def weights_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


# --- every objective ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method: its objective, with a sampler that the objective allows."""

    name: str
    objective: ObjectiveBase
    own: Callable[..., Tensor] | None = None
    between: bool = False
    """True for models with different tokenizers."""

    @property
    def method(self) -> Method:
        """The method, with one update on all sequences."""
        needs, of = self.objective, {"max_new_tokens": NEW}
        sampler: dict[str, Any] = {"type": "dataset"}
        if needs.needs_pairs:
            sampler = {"type": "pair", **of}
        elif needs.needs_rounds:
            sampler = {"type": "teacher_mixed", "alpha": 0.0 if self.between else 0.2, "rollouts": ROWS, "inner_epochs": 1, **of}
        elif needs.needs_own_samples:
            sampler = {"type": "student", **of}
        found = Method.model_validate({"objective": self.objective, "sampler": sampler, "optim": {"batch": ROWS}})
        check_pairing(found)
        return over_spans(found) if self.between else found


def cases() -> list[Case]:
    """Return every objective of a recipe for models with one tokenizer, and both presets of MiniLLM."""
    found = []
    for kind in typing.get_args(typing.get_args(Objective)[0]):
        if kind is Gold:
            continue
        if kind is Custom:
            found.append(Case("custom", Custom(function="own:squared"), lambda s, t: (s - t).square().mean(-1)))
        else:
            found.append(Case(kind().label, kind()))
    official = next(case.objective for case in found if case.name == "minillm").model_validate({"preset": "official"})
    return [*found, Case("minillm official", official)]


def cases_over_spans() -> list[Case]:
    """Return the methods whose losses differ for models with different tokenizers, and one in rounds."""
    found = [
        Case(f"{kind.model_fields['type'].default} over spans", kind(), between=True)
        for kind in (ForwardKL, ReverseKL, JensenShannon, Gold)
    ]
    return [*found, Case("minillm over spans", MiniLLM(pt_weight=0), between=True)]


class Replayed:
    """An engine that gives the same responses on every device and in every precision."""

    def __init__(self, student: PreTrainedModel, decoding: Any, known: dict[tuple[int, ...], Rollout]):
        self.student, self.decoding, self.known = student, decoding, known

    def respond(self, prompts: Any, uniforms: Any, guide: Any = None) -> list[Rollout]:
        return [self.known[tuple(prompt)] for prompt in prompts]


@dataclass
class Problem:
    """Two models with random weights, sequences, and the student's responses to their prompts, with and without the teacher's help."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    sequences: list[Sequence]
    alone: dict[tuple[int, ...], Rollout]
    mixed: dict[tuple[int, ...], Rollout]
    again: Rereader | None = None
    """Set if the teacher has a tokenizer of its own. It has both vocabularies."""

    @classmethod
    def of(cls, kind: str) -> "Problem":
        """Make the problem on the CPU in float32."""
        student, teacher = small(kind), small(kind, seed=3, layers=3)
        sequences = texts(ROWS, 10, NEW, VOCAB)
        prompts, uniforms = [s.prompt for s in sequences], rng.uniforms([*range(ROWS)], NEW, 0, "kit")

        def answers(guide: Mixture | None) -> dict[tuple[int, ...], Rollout]:
            out = sample(student, prompts, uniforms, eos=(0,), vocab=VOCAB, guide=guide)
            kept = [Rollout(r.tokens, {name: r.values[name] for name in ("student", "behaviour")}) for r in out]
            return dict(zip(prompts, kept, strict=True))

        return cls(student, teacher, sequences, answers(None), answers(Mixture(teacher, 0.2)))

    @classmethod
    def between(cls, kind: str) -> "Problem":
        """Make the problem for two models with different tokenizers: bytes and pieces of words for the student, words for the teacher."""
        mine, theirs = (tokenizer(name, people=PEOPLE) for name in (PIECES, WORDS))
        student, teacher = small(kind, vocab=len(mine)), small(kind, seed=3, layers=3, vocab=len(theirs))
        again = Rereader(token_bytes(mine), token_bytes(theirs), (len(mine), len(theirs)))

        def ids(reader: Any, text: str) -> tuple[int, ...]:
            return tuple(reader(text)["input_ids"])

        sequences = []
        for row in world_rows("tinyworld", "train", people=PEOPLE)[:ROWS]:
            asked, end = row["instruction"], mine.eos_token_id
            sequences.append(Sequence(ids(mine, asked), (*ids(mine, row["outputs"][0]), end), teacher_prompt=ids(theirs, asked)))
        prompts, uniforms = [s.prompt for s in sequences], rng.uniforms([*range(ROWS)], NEW, 0, "kit")
        out = sample(student, prompts, uniforms, eos=(mine.eos_token_id,), vocab=len(mine))
        alone = {
            p: Rollout(r.tokens, {name: r.values[name] for name in ("student", "behaviour")}) for p, r in zip(prompts, out, strict=True)
        }
        return cls(student, teacher, sequences, alone, alone, again)

    def update(self, case: Case, device: torch.device, precision: str, steps: int = 1) -> tuple[float, Tensor]:
        """Do updates by the training loop. Returns the loss of the first, and the gradient that AdamW got from it."""
        accelerator, method = fresh_accelerator(device, precision), case.method
        optim = Optim(steps=steps, batch=ROWS, micro_batch=ROWS // 2, lr=1e-4, clip=1e9, precision=precision)  # type: ignore[arg-type]
        method = method.model_copy(update={"optim": optim})
        student = as_in_a_stage(moved(self.student, device))
        teacher = as_in_a_stage(moved(self.teacher, device, weights_of(precision))).requires_grad_(False)
        teachers = (teacher,) if method.objective.needs_teacher else ()
        found: list[Tensor] = []

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if not found:
                found.append(torch.cat([p.grad.detach().float().cpu().flatten() for p in student.parameters()]))  # type: ignore[union-attr]

        handle = register_optimizer_step_pre_hook(look)
        try:
            with tempfile.TemporaryDirectory() as folder:
                step = make_step(method, student, teachers, self.again or VOCAB, own=case.own)
                train(Path(folder), accelerator, student, step, self.sampler(method, student, teachers), optim)
                row = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[0])
        finally:
            handle.remove()
        return row["train/loss"], found[0]

    def sampler(self, method: Method, student: PreTrainedModel, teachers: tuple[PreTrainedModel, ...]) -> Sampler:
        """Return the method's own sampler. Its engine repeats the known responses."""
        if not method.sampler.on_policy:
            return FixedSequences(self.sequences, method.optim, pad=0, seed=0, again=self.again)
        known = self.mixed if method.objective.needs_rounds else self.alone
        engine = Replayed(student, method.sampler, known)
        prompts = [Encoded(i, s.prompt, s.response, teacher_prompt=s.teacher_prompt) for i, s in enumerate(self.sequences)]
        corpus = [Sequence((), s.response) for s in self.sequences] if method.objective.needs_corpus else []
        common: dict[str, Any] = {"engine": engine, "pad": 0, "seed": 0, "again": self.again}
        vocab = self.again.sizes[0] if self.again else VOCAB
        return on_policy(method, self.sequences, prompts, teachers=teachers, vocab=vocab, corpus=corpus, **common)


def train(folder: Path, accelerator: Accelerator, student: PreTrainedModel, step: Any, sampler: Sampler, optim: Optim, **more: Any) -> Any:
    """Run the training loop without a dev set."""
    hooks = Hooks(evaluate=dict, progress=lambda done, text: None, **more)
    common: dict[str, Any] = {"optim": optim, "select": Select(metric="last"), "seed": 0, "hooks": hooks, "checkpoint_seconds": 1e9}
    return train_stage(student, step, sampler, accelerator=accelerator, directory=folder, **common)


def losses(kit: Kit) -> None:
    """Every objective's update, with one tokenizer and with two: the device's float32 against the CPU's, and bf16 against float32."""
    kinds = ("qwen2",) if kit.tiny else ("gpt2", "llama", "opt", "qwen2")
    for kind in kinds:
        problem, between = Problem.of(kind), Problem.between(kind)
        for problem, case in [*((problem, case) for case in cases()), *((between, case) for case in cases_over_spans())]:
            expected, gradient = problem.update(case, CPU, "fp32")
            here, own = problem.update(case, kit.device, "fp32") if kit.cuda else (expected, gradient)
            half, rounded = problem.update(case, kit.device, "bf16")
            size = max(abs(expected), 0.1)
            kit.at_most(f"{kind} {case.name}: loss, device against CPU", abs(here - expected) / size, 1e-4)
            kit.at_most(f"{kind} {case.name}: gradient, device against CPU", relative(own, gradient), 1e-3)
            kit.at_most(f"{kind} {case.name}: loss, bf16 against float32", abs(half - expected) / size, BF16_LOSS)
            kit.at_least(f"{kind} {case.name}: cosine of gradients, bf16 and float32", cosine(rounded, gradient), BF16_COSINE)


# --- resuming -----------------------------------------------------------------------------------------------------------


def minillm_run(folder: Path, device: torch.device, precision: str, *, steps: int, stop: Callable[[], bool] = lambda: False) -> Tensor:
    """Train with MiniLLM in two rounds, and return all weights."""
    rollout = {"type": "teacher_mixed", "alpha": 0.2, "rollouts": ROWS, "inner_epochs": 2, "max_new_tokens": NEW}
    optim = Optim(steps=steps, batch=ROWS // 2, lr=1e-3, precision=precision)  # type: ignore[arg-type]
    method = Method.model_validate({"objective": {"type": "minillm", "pt_weight": 0}, "sampler": rollout, "optim": optim})
    accelerator = fresh_accelerator(device, precision)
    student = moved(small("gpt2"), device)
    teachers = (moved(small("gpt2", seed=3, layers=3), device, weights_of(precision)).requires_grad_(False),)
    prompts = [Encoded(i, s.prompt, s.response) for i, s in enumerate(texts(2 * ROWS, 8, 4, VOCAB, seed=5))]
    engine = Native(student, method.sampler, eos=(0,), vocab=VOCAB)  # type: ignore[arg-type]
    sampler = on_policy(method, [], prompts, teachers=teachers, vocab=VOCAB, engine=engine, pad=0, seed=3)
    folder.mkdir(exist_ok=True)
    train(folder, accelerator, student, make_step(method, student, teachers, VOCAB), sampler, optim, stop=stop)
    return torch.cat([p.detach().float().cpu().flatten() for p in student.parameters()])


def resume(kit: Kit) -> None:
    """MiniLLM, stopped within a round and resumed, against the same run without a stop; and against a second run."""
    steps = 8
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as name:
            folder, calls = Path(name), iter(range(100))
            whole = minillm_run(folder / "whole", kit.device, precision, steps=steps)
            with contextlib.suppress(Interrupted):
                minillm_run(folder / "cut", kit.device, precision, steps=steps, stop=lambda calls=calls: next(calls) == 3)
            kit.at_least(f"{precision}: updates done at the stop", torch.load(folder / "cut" / "state.pt", weights_only=True)["step"], 3)
            resumed = minillm_run(folder / "cut", kit.device, precision, steps=steps)
            kit.at_most(f"{precision}: largest difference of a weight, resumed against whole", float((whole - resumed).abs().max()), 1e-3)
            if not kit.tiny:
                again = minillm_run(folder / "again", kit.device, precision, steps=steps)
                kit.note(f"{precision}: largest difference of a weight, a second run", float((whole - again).abs().max()))


# --- stages and studies -------------------------------------------------------------------------------------------------

RECIPE = """
study: kit
seeds: [1]
models:
  xl: {load: "scratch:qwen2", tokenizer: tinyworld, config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 64}, sft: {optim: {steps: 4, lr: 3e-3, batch: 8, precision: PRECISION}, select: {every: 4}}}
  s: {load: "scratch:gpt2", tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_length: 48, world: {people: 20}, limit: {train: 32, dev: 4, test: 4}}
method:
  objective: {type: minillm, pt_weight: 0}
  sampler: {type: teacher_mixed, rollouts: 16, inner_epochs: 2, max_new_tokens: 8}
  optim: {steps: 4, batch: 8, lr: 1e-3, precision: PRECISION}
  select: {metric: rouge_l, every: 4}
evaluate: {seeds: [1], max_new_tokens: 8, precision: PRECISION, also: {}}
arms:
  minillm: xl > s
  kd: {path: xl > s, objective: {type: forward_kl, kd_ratio: 0.5}, sampler: {type: dataset, signal: {type: hidden}}}
"""  # noqa: E501


def freed(kit: Kit) -> None:
    """What the stages of a study leave behind in their process: models, and memory of the device."""
    from tadistill.config import parse
    from tadistill.plan.arms import make_plan
    from tadistill.plan.task import make_task
    from tadistill.stages.execute import run_stage
    from tadistill.store import store_of

    plan = make_plan(parse(RECIPE.replace("PRECISION", "bf16"), source="the kit"))
    kinds: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder))
        _use_libraries(kit)
        kit.free()
        before, models = torch.cuda.memory_allocated() if kit.cuda else 0, alive()
        if kit.cuda:
            kit.note("MB of the device before the first stage", before / 1e6)
        first: float | None = None  # MB that are kept after the first stage alone
        gc.disable()  # what is freed is freed by the stage, not by chance
        try:
            for stage in plan.stages.values():
                AcceleratorState._reset_state(True)
                run_stage(make_task(plan, stage, store), progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)
                if kit.cuda and first is None:
                    first = (torch.cuda.memory_allocated() - before) / 1e6
                    kit.note("MB of the device kept after the first stage alone", first)
                if stage.spec.kind not in kinds:
                    kinds.add(stage.spec.kind)
                    kit.at_most(f"models alive after a stage `{stage.spec.kind}`", alive() - models, 0)
                    if kit.cuda:
                        more = (torch.cuda.memory_allocated() - before) / 1e6
                        kit.at_most(f"MB of the device kept after a stage `{stage.spec.kind}`", more, 1)
            if kit.cuda and first is not None:
                kit.note("MB of the device that all later stages add", (torch.cuda.memory_allocated() - before) / 1e6 - first)
        finally:
            gc.enable()


def _use_libraries(kit: Kit) -> None:
    # cuBLAS and cuBLASLt keep workspaces (32 MiB each on Hopper) from the first product of a thread to the end of the process, and the
    # backward pass has a thread of its own
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, device=kit.device, dtype=dtype, requires_grad=True)
        torch.addmm(square[0], square @ square, square).sum().backward()


def alive() -> int:
    """Count the models of this process."""
    return sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())


def study(kit: Kit) -> None:
    """`tadistill run` in processes of its own, from recipe to report."""
    for precision in ("bf16",) if kit.tiny else ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(RECIPE.replace("PRECISION", precision))
            command = [sys.executable, "-m", "tadistill", "run", str(recipe), "--runs", f"{folder}/runs"]
            seconds = max(30.0, min(150.0, kit.left()))
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=os.environ | {"OMP_NUM_THREADS": "1"})
            kit.at_most(f"{precision}: exit status of `tadistill run`", done.returncode, 0)
            if done.returncode:
                kit.note(f"{precision}: its last words", (done.stdout + done.stderr)[-800:])
            for log in sorted(Path(folder).glob("runs/store/*/*/metrics.jsonl")):
                rows = [json.loads(line) for line in log.read_text().splitlines()]
                kit.note(f"{precision}: last loss of {log.parent.name[:8]}", rows[-1]["train/loss"])
