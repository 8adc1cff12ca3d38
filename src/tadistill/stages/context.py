"""What every stage's work reads: the task, its models, its data, and the ways to report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill import rng
from tadistill.config import Data, DataRef
from tadistill.data import corpus, datasets
from tadistill.data.batch import Sequence, references
from tadistill.data.templates import encode
from tadistill.errors import Interrupted
from tadistill.evaluation.run import EvalSet
from tadistill.evaluation.scoring import Subject
from tadistill.models.counting.shapes import resized
from tadistill.models.loading import column_major, end_tokens, load_model, load_tokenizer, shared_vocabulary
from tadistill.models.pruning import importance, keep_list, prune, prune_depth, shape_of
from tadistill.models.tempering import temper
from tadistill.plan.task import Task
from tadistill.stages.ranks import own_device
from tadistill.store import Store
from tadistill.train.sharding import offload, shard

SIGNAL = "signal"  # the sub-folder of a signal stage with the teacher's outputs
MODEL = "model"  # the sub-folder of a training stage that is an ordinary Hugging Face directory
RESPONSES = "responses.jsonl"  # of a generate stage
ANSWERS = "answers.jsonl"  # of an evaluate stage: token ids
_CORPUS_CHUNKS = 20_000
_CALIBRATION = 256  # training texts that decide what pruning keeps (Minitron used 1,024 of a web corpus)

Progress = Callable[[int, int, str], None]


class Context:
    """A task with the helpers that read its spec."""

    def __init__(self, task: Task, store: Store, folder: Path, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]):
        self.task, self.spec, self.store, self.folder = task, task.spec, store, folder
        self.progress, self.alarm, self.stop = progress, alarm, stop
        self.device = own_device()

    def model(
        self, handle: dict[str, Any], dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer behind a handle, on the stage's device unless another is given."""
        world = self.spec["data"]["world"]
        if "stage" in handle:
            directory = str(self.store.folder(handle["stage"]) / (f"{MODEL}-{handle['checkpoint']}" if "checkpoint" in handle else MODEL))
            tokenizer = load_tokenizer(directory, world=world)
            model = load_model(directory, dtype=dtype)
        elif "prune" in handle:
            parent, tokenizer = self.model(handle["of"])  # in float32, so that the same is kept whatever the model is used in
            model = self._pruned(parent, tokenizer, handle).to(dtype)  # type: ignore[arg-type]
        elif "temper" in handle:
            model, tokenizer = self.model(handle["of"], dtype, device)
            temper(model, handle["temper"])
        else:
            tokenizer = load_tokenizer(handle["tokenizer"] or handle["load"], revision=handle["revision"], world=world)
            model = load_model(
                handle["load"],
                revision=handle["revision"],
                config=handle["config"],
                dtype=dtype,
                seed=rng.torch_seed(handle.get("seed", 0), "initial weights"),
                tokenizer=tokenizer,
            )
        return model.to(device or self.device), tokenizer  # type: ignore[arg-type]

    def _pruned(self, parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, handle: dict[str, Any]) -> PreTrainedModel:
        """A model cut in depth, or to a shape by what is active on training text."""
        total = parent.config.num_hidden_layers
        if not isinstance(handle["prune"], dict):
            return prune_depth(parent, keep_list(handle["prune"], total))
        train = references(self.split("train", handle["train"]["ref"], handle["train_limit"], tokenizer).encoded)
        measured = importance(parent, [[*s.prompt, *s.response] for s in train[:_CALIBRATION]])
        shape = resized(shape_of(parent.config), **handle["prune"])
        which = handle["layers"]
        layers = None if which == "influence" else keep_list(shape.layers if which == "spacing" else tuple(which), total)
        return prune(parent, shape, measured, layers)

    def teacher(self, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The frozen teacher of the stage."""
        return self.frozen(self.spec["teacher"], dtype)

    def frozen(self, handle: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model that only answers, placed as the stage's resources say."""
        where = self.task.resources.teacher
        model, tokenizer = self.model(handle, dtype, None if where == "replicated" else torch.device("cpu"))
        model.eval().requires_grad_(False)
        place = {"replicated": lambda model, _: column_major(model), "sharded": shard, "offloaded": offload}[where]
        return place(model, self.device), tokenizer

    def split(self, role: str, ref: dict, limit: int | None, tokenizer: PreTrainedTokenizerBase) -> EvalSet:
        """A data set, read and encoded."""
        settings, name = self.spec["data"], DataRef.model_validate(ref).name
        everywhere = {"train": ref, "dev": ref, "test": [ref], "limit": {role: limit}, "root": self.task.data_root}
        data = Data.model_validate(settings | everywhere)
        examples = datasets.load(DataRef.model_validate(ref), role, data)
        lengths = {"template": data.template, "max_prompt": data.max_prompt, "max_length": data.max_length}
        return EvalSet(name, examples, encode(examples, tokenizer, name=f"data set `{name}`", **lengths))

    def test_sets(self, tokenizer: PreTrainedTokenizerBase) -> list[EvalSet]:
        """The test sets of the stage."""
        return [self.split("test", s["ref"], self.spec["limit"], tokenizer) for s in self.spec["sets"]]

    def corpus(self, tokenizer: PreTrainedTokenizerBase) -> list[Sequence]:
        """Chunks of plain text for the language-modelling term, if the stage has one."""
        if "corpus" not in self.spec:
            return []
        ref = self.spec["corpus"]["ref"]
        data = Data.model_validate(self.spec["data"] | {"train": ref, "dev": ref, "test": [ref], "root": self.task.data_root})
        return corpus.chunks(datasets.texts(DataRef.model_validate(ref), data), tokenizer, data.max_length, _CORPUS_CHUNKS)


def stop_if_asked(context: Context) -> None:
    """Between two parts of a stage's work: leave when the study is interrupted; finished parts stay."""
    if context.stop():
        raise Interrupted("stopped between two parts")


def make_subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *others: PreTrainedModel) -> Subject:
    """A model under evaluation, on the vocabulary that it shares with the others."""
    return Subject(model, tokenizer, shared_vocabulary(tokenizer, model, *others), end_tokens(model, tokenizer))


def teacher_dtype(precision: str) -> torch.dtype:
    """The dtype of a frozen teacher beside a student trained in this precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
