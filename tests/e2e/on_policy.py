"""One training stage for any sampler and objective on tinyworld, run in one process or in several: what `test_on_policy` compares.

Models have random weights; the training loop, samplers, objectives and data are the product's own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from tests.e2e.inprocess import tried_once
from transformers import LlamaConfig, LlamaForCausalLM

from tadistill.config import DataRef
from tadistill.config.data import World
from tadistill.config.method import Method
from tadistill.config.method_parts import Optim, Select
from tadistill.config.method_rules import check_pairing, over_spans
from tadistill.config.sampling import DatasetSampler, OnPolicy, TeacherSampler
from tadistill.data import datasets, tinyworld
from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import Encoded, encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.other_tokenizer import Behind, Rereader
from tadistill.data.token_bytes import token_bytes
from tadistill.data.token_cache import row_numbers
from tadistill.data.training_sets import TrainingSets
from tadistill.rollout.engine import Native
from tadistill.rollout.rounds import on_policy
from tadistill.rollout.samplers import FixedSequences, Shard
from tadistill.train.checkpoint import Checkpoints
from tadistill.train.loop import Hooks, train_stage
from tadistill.train.step import make_step

LENGTH = 6
ROUNDS = {"rollouts": 16, "inner_epochs": 2, "max_new_tokens": LENGTH}
SAMPLERS: dict[str, dict[str, Any]] = {
    "dataset": {},
    "teacher": {"max_new_tokens": LENGTH},
    "student": ROUNDS,
    "mix": {"max_new_tokens": LENGTH},
    "teacher_mixed": ROUNDS,
    "replay": {"max_new_tokens": LENGTH, "tolerance": 0.0, "increment": 0.9, "capacity": 16},
    "speculative": ROUNDS | {"k": 5},
    "pair": {"max_new_tokens": LENGTH},
}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "pair": [{"type": "contrastive", "alpha": a} for a in (0.1, 0.3, 0.5)],
    **{name: [{"type": "minillm", "pt_weight": 0}, {"type": "reverse_kl"}, {"type": "taid"}] for name in ("teacher_mixed", "speculative")},
    "student": [{"type": "minillm", "preset": "official"}, {"type": "sampled_kl"}, {"type": "jensen_shannon"}],  # with a corpus term
}
DEFAULT = [{"type": "reverse_kl"}, {"type": "jensen_shannon"}, {"type": "taid"}]
MINILLM = {"objective": {"type": "minillm", "pt_weight": 0}, "sampler": {"type": "teacher_mixed", "alpha": 0} | ROUNDS}
STEPS, BATCH = 8, 8  # two rounds of 16 rollouts, each for two epochs of two updates
SAVED = (1, 4, STEPS - 1)
"""Updates before which the state is saved: within an epoch, before a round, and before the last update."""
SPANS, ROUTED = " over spans", " routed"
"""The ends of the names of cases: the teacher has another tokenizer; or two training sets have a teacher each."""
TWO_TOKENIZERS = {
    "dataset": [{"type": "forward_kl", "kd_ratio": 0.6}],
    "student": [{"type": "jensen_shannon"}],
    "teacher_mixed": [over_spans(Method.model_validate(MINILLM)).objective.model_dump()],
    "replay": [{"type": "taid"}],
}
CASES = [(sampler, i) for sampler in SAMPLERS for i in range(3)] + [(name + SPANS, 0) for name in TWO_TOKENIZERS]
CASES += [(f"student{ROUTED}", 2), (f"replay{ROUTED}", 2)]
SETS = TrainingSets((15, 25), (0.3, 0.7), (0, 1))


def model(seed: int, hidden: int, tokenizer, **changes: Any) -> LlamaForCausalLM:
    """Build a small model with sharp predictions, some of which end early. `changes` go into its configuration."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.4,
        "max_position_embeddings": 64,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


@tried_once()
def train(
    directory: Path, case: tuple[str, int], *, stop: Callable[[], bool] = lambda: False, interrupt: int | None = None
) -> torch.Tensor:
    """Train and return all weights. `interrupt` is the number of the engine's call in which it raises half-way."""
    (name, number), across, routed = case, case[0].endswith(SPANS), case[0].endswith(ROUTED)
    name = name.removesuffix(SPANS).removesuffix(ROUTED)
    method = Method.model_validate(
        {
            "objective": TWO_TOKENIZERS[name][number] if across else OBJECTIVES.get(name, DEFAULT)[number],
            "sampler": {"type": name} | SAMPLERS[name] | ({"alpha": 0} if across and name == "teacher_mixed" else {}),
            "optim": Optim(steps=STEPS, batch=BATCH, micro_batch=4, lr=2e-3, eps=1e-4),
            "select": Select(metric="loss", every=2),
        }
    )
    check_pairing(method)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    tokenizer, _ = rows()
    other = tinyworld.tokenizer("tinyworld-bpe", seed=0, people=20) if across else None
    student, teachers = model(1, 16, tokenizer), [model(2, 24, other or tokenizer).requires_grad_(False)]
    teachers += [model(3, 20, tokenizer).requires_grad_(False)] if routed else []
    shard, again = Shard(accelerator.process_index, accelerator.num_processes), _again(tokenizer, other) if other else None
    sampler = _sampler(method, student, teachers, tokenizer, shard, interrupt, again=again)
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "metrics.jsonl"

    def evaluate() -> dict[str, float]:
        """Return a loss that rises from one evaluation to the next, so that a replay buffer is used."""
        return {"loss": 1.0 + (log.read_text().count("dev/loss") if log.is_file() else 0)}

    updates = [0]
    with mock.patch.object(Checkpoints, "due", side_effect=lambda: updates[-1] in SAVED):
        train_stage(
            student,
            make_step(method, student, (*teachers,), again or len(tokenizer)),
            sampler,
            optim=method.optim,
            select=Select(metric="loss", every=2),
            seed=1,
            accelerator=accelerator,
            directory=directory,
            hooks=Hooks(evaluate=evaluate, progress=lambda done, text: updates.append(done), stop=stop),
        )
    last = torch.load(directory / "state.pt", weights_only=True)["model"]  # before the last update; selection keeps an early one
    return torch.cat([value.flatten() for value in last.values()])


@cache
def rows() -> tuple[Any, list[Encoded]]:
    """Return a tokenizer and a few encoded rows."""
    tokenizer = tinyworld.tokenizer(seed=0, people=20)
    examples = datasets.SplitRows(DataRef(load="tinyworld"), "train", World(people=20), limit=40).read()
    return tokenizer, encode(examples, tokenizer, Rules(24, 40, template="plain"), name="tinyworld")[0]


def _again(tokenizer, other) -> Rereader:
    return Rereader(token_bytes(tokenizer), token_bytes(other), (len(tokenizer), len(other)), most=64)


def _sampler(method: Method, student, teachers, tokenizer, shard: Shard, interrupt: int | None, again: Rereader | None = None):
    _, encoded = rows()
    if again:
        examples = datasets.SplitRows(DataRef(load="tinyworld"), "train", World(people=20), limit=40).read()
        of_teacher = encode(examples, again.teacher.tokenizer, Rules(50, 63, template="plain"), name="tinyworld")[0]
        encoded = Behind(encoded, row_numbers(encoded), of_teacher)
        assert len(encoded) > 16
    sets = SETS if len(teachers) > 1 else TrainingSets((len(encoded),))
    texts = [replace(text, teacher=sets.teacher(i)) for i, text in enumerate(references(encoded))]
    eos, config = tokenizer.eos_token_id, method.sampler
    common: dict[str, Any] = {"pad": eos, "seed": 3, "shard": shard, "sets": sets}
    if isinstance(config, DatasetSampler | TeacherSampler):
        return FixedSequences(again.each(texts) if again else texts, method.optim, **common)
    common["again"] = again
    assert isinstance(config, OnPolicy)
    common["engine"] = _Interrupted(Native(student, config, eos=(eos,), vocab=len(tokenizer), chunk=6), interrupt)
    corpus = [Sequence((), s.prompt + s.response) for s in texts] if getattr(method.objective, "pt_weight", 0) else []
    return on_policy(method, texts, encoded, teachers=(*teachers,), vocab=len(tokenizer), corpus=corpus, **common)


class _Interrupted:
    """An engine that dies inside one of its calls, after half of the sequences were sampled."""

    def __init__(self, engine: Native, at: int | None):
        self.engine, self.at, self.calls, self.decoding = engine, at, 0, engine.decoding

    def respond(self, prompts, uniforms, guide=None):
        if self.calls == self.at:
            half = len(prompts) // 2
            self.engine.respond(prompts[:half], uniforms[:half], guide)
            raise KeyboardInterrupt
        self.calls += 1
        return self.engine.respond(prompts, uniforms, guide)


def train_all(out: Path) -> None:
    """Train all cases as one of several processes; rank 0 writes the weights."""
    weights = {f"{name}-{number}": train(out / f"{name}-{number}", (name, number)) for name, number in CASES}
    if PartialState().is_main_process:
        torch.save(weights, out / "weights.pt")
    PartialState().destroy_process_group()
