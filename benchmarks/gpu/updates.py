"""Part of the kit about whole updates, from sampling to AdamW: on-policy distillation and MiniLLM beside TRL's distillation trainer.

Both sides train the same models on the same prompts, with one sampled response per prompt and one update per batch, in bf16 with float32
weights. Responses end with EOS or after the same number of tokens; with random weights almost none ends early. The first update is left
out of the times. The peak memory is compared with what `tadistill plan` predicts for the same sizes.
"""

import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import Kit, Pair, as_in_a_stage, pairs
from training import fresh_accelerator, train

from tadistill.config.method import Method
from tadistill.data.encoding import Encoded
from tadistill.models.forward import attention_for_any_shape
from tadistill.models.modify import column_major
from tadistill.objectives.tiles import tile_bytes
from tadistill.rollout.engine import Native
from tadistill.rollout.rounds import on_policy
from tadistill.train.step import make_step

METHODS: dict[str, dict[str, Any]] = {
    "reverse KL": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student"}},
    "JSD": {"objective": {"type": "jensen_shannon", "beta": 0.5}, "sampler": {"type": "student"}},
    "MiniLLM": {"objective": {"type": "minillm", "pt_weight": 0}, "sampler": {"type": "teacher_mixed", "alpha": 0.2, "inner_epochs": 1}},
}
PEERS = {"reverse KL": 1.0, "JSD": 0.5, "MiniLLM": 1.0}
"""TRL's beta. It has no MiniLLM, so MiniLLM stands beside the reverse KL, which needs as many passes of both models."""


NEEDED = {("qwen2", "MiniLLM"): 80}
"""Seconds that must be left for a comparison, if it takes more than 40: it took 60 to 75."""


@dataclass(frozen=True)
class Work:
    """The work of an update: numbers of sequences and tokens."""

    batch: int
    prompt: int
    new: int
    updates: int

    def prompts(self, vocab: int) -> list[tuple[int, ...]]:
        """Return the random prompts of all updates."""
        rows = np.random.default_rng(0).integers(1, vocab, (self.batch * self.updates, self.prompt))
        return [tuple(row) for row in rows.tolist()]


def updates(kit: Kit) -> None:
    """Seconds and peak memory of an update, ours and TRL's, and the memory that the plan predicts."""
    work = Work(4, 6, 4, 2) if kit.tiny else Work(32, 128, 128, 3)
    for pair in pairs(kit):
        for name in METHODS:
            if kit.left() < (5 if kit.tiny else NEEDED.get((pair.kind, name), 40)):
                kit.note(f"{pair.name}, {name}", "no time left")
                continue
            mine = _measured(kit, f"{pair.name}, {name}, ours", lambda pair=pair, name=name: run_ours(kit, pair, name, work))
            predicted = planned(kit, pair, METHODS[name], work) / 1e9
            kit.note(f"{pair.name}, {name}: predicted GB", predicted)
            if mine and mine[1] is not None:
                kit.at_most(f"{pair.name}, {name}: predicted memory, distance from the measured", abs(predicted / mine[1] - 1), 0.15)
            if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
                theirs = _measured(kit, f"{pair.name}, {name}, TRL", lambda pair=pair, name=name: run_trl(kit, pair, PEERS[name], work))
                if mine and theirs and not kit.tiny:
                    kit.at_most(f"{pair.name}, {name}: time as a part of TRL's", mine[0] / theirs[0], 1.0)
                    kit.at_most(f"{pair.name}, {name}: peak memory as a part of TRL's", (mine[1] or 0) / (theirs[1] or 1), 1.0)


def _measured(kit: Kit, name: str, run: Callable[[], list[float]]) -> tuple[float, float | None] | None:
    with kit.attempt(name):
        kit.free()
        ends = run()
        seconds, peak = statistics.median(b - a for a, b in itertools.pairwise(ends)), kit.peak()
        kit.note(f"{name}: s an update", seconds)
        if peak is not None:
            kit.note(f"{name}: peak GB", peak)
        return seconds, peak
    return None


def method_of(settings: dict[str, Any], work: Work) -> Method:
    """Return the method with one round of sampling for every update."""
    sampler = settings["sampler"] | {"max_new_tokens": work.new}
    if "inner_epochs" in sampler:
        sampler |= {"rollouts": work.batch}
    optim = {"steps": work.updates, "batch": work.batch, "lr": 1e-6, "precision": "bf16", "schedule": "constant"}
    return Method.model_validate({"objective": settings["objective"], "sampler": sampler, "optim": optim})


def run_ours(kit: Kit, pair: Pair, name: str, work: Work) -> list[float]:
    """Train with `train_stage`. Returns the times at the ends of updates."""
    method, accelerator = method_of(METHODS[name], work), fresh_accelerator(kit.device, "bf16")
    student, teacher = as_in_a_stage(pair.make_student(kit.device)), column_major(as_in_a_stage(pair.make_teacher(kit.device)))
    prompts = [Encoded(row, tokens, ()) for row, tokens in enumerate(work.prompts(pair.vocab))]
    sizes: dict[str, Any] = {"chunk": work.batch, "adapts": True, "half": kit.cuda}  # as a stage does it
    engine = Native(student, method.sampler, eos=(0,), vocab=pair.vocab, **sizes)  # type: ignore[arg-type]
    source = on_policy(method, [], prompts, teachers=(teacher,), vocab=pair.vocab, engine=engine, pad=0, seed=0)
    ends: list[float] = []

    def stop() -> bool:
        """Note the time: the loop asks before every update."""
        kit.wait()
        ends.append(time.perf_counter())
        return False

    with tempfile.TemporaryDirectory() as folder, attention_for_any_shape():
        train(Path(folder), accelerator, student, make_step(method, student, (teacher,), pair.vocab), source, method.optim, stop=stop)
        kit.wait()
    return [*ends[1:], time.perf_counter()]


def run_trl(kit: Kit, pair: Pair, beta: float, work: Work) -> list[float]:
    """Train with TRL's `DistillationTrainer`. Returns the times at the ends of updates."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kit.wait()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            beta=beta,
            max_completion_length=work.new,
            per_device_train_batch_size=work.batch,
            max_steps=work.updates,
            learning_rate=1e-6,
            bf16=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not kit.cuda,
            seed=0,
        )
        DistillationTrainer(
            model=pair.make_student(kit.device),
            teacher_model=pair.make_teacher(kit.device),
            args=config,
            processing_class=words(pair.vocab),
            train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{t}" for t in row) for row in work.prompts(pair.vocab)]}),
            callbacks=[Clock()],
        ).train()
    return ends


def words(vocab: int) -> Any:
    """Return a tokenizer of whole words. `w5` is token 5, and token 0 is EOS and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, vocab)}, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def planned(kit: Kit, pair: Pair, settings: dict[str, Any], work: Work) -> float:
    """Return the bytes that `tadistill plan` predicts for this training."""
    from tadistill.config import parse
    from tadistill.plan.arms import make_plan

    with tempfile.TemporaryDirectory() as folder:
        words(pair.vocab).save_pretrained(folder)
        rows = [{"prompt": " ".join(["w1"] * work.prompt), "completion": " ".join(["w1"] * (work.new - 1))}] * work.batch
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        method = method_of(settings, work).model_dump(mode="json", exclude_unset=True)
        method["sampler"] |= {"chunk": work.batch}
        common, file = {"load": f"scratch:{pair.kind}", "tokenizer": folder}, f"{folder}/rows.jsonl"
        models = {name: common | {"config": sizes} for name, sizes in (("teacher", pair.teacher), ("student", pair.student))}
        data = {
            "train": file,
            "dev": file,
            "test": [file],
            "template": "plain",
            "max_prompt": work.prompt,
            "max_length": work.prompt + work.new,
        }
        recipe = {"study": "updates", "seeds": [1], "models": models, "data": data, "method": method, "arms": {"arm": "teacher > student"}}
        plan = make_plan(parse(recipe, source="the kit"))
    needs: Any
    (needs,) = (stage.cost.memory for stage in plan.stages.values() if stage.spec.kind == "distill" and stage.cost)
    assert needs is not None
    return needs.peak(cuda=kit.cuda, tile=tile_bytes(kit.device))
