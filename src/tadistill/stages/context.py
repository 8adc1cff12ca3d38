"""The context of a running stage: methods that load its models and data, and callbacks for progress, alarms and stopping."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill import rng
from tadistill.config.common import DTYPES
from tadistill.data.batch import Sequence, chunks, references
from tadistill.data.datasets import SplitRows
from tadistill.data.encoding import EvalSet, encoded_set
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.rows import Example
from tadistill.data.survey import LARGE, texts
from tadistill.data.token_cache import keep
from tadistill.disk import write_json
from tadistill.errors import Interrupted, check_unchanged, unchanged
from tadistill.evaluation.token_scores import Subject
from tadistill.models import sources
from tadistill.models.architectures import fuse_gelu, scratch_model
from tadistill.models.flops_and_memory import give_back_freed_memory
from tadistill.models.forward import check_reading
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.models.modify import column_major, temper_head
from tadistill.models.prunable_parts import importance
from tadistill.models.pruning import keep_list, prune, prune_depth
from tadistill.models.served_model import served_teacher
from tadistill.models.served_model_requests import Servers
from tadistill.models.shapes import resized, shape_of
from tadistill.models.sharding import offload, shard
from tadistill.models.teachers import Teacher, teacher_of
from tadistill.models.tokens import end_tokens, shared_vocabulary
from tadistill.plan.graph import Spec
from tadistill.plan.inputs import (
    BehindApi,
    Dev,
    Encoding,
    FromStage,
    Handle,
    HashedData,
    Loaded,
    OwnCode,
    Pruned,
    PrunedDepth,
    RandomWeights,
    Split,
    Tempered,
    TokenizerFiles,
)
from tadistill.plan.kinds import TrainingSpec
from tadistill.plan.task import Task
from tadistill.rollout.decoder import slower
from tadistill.rollout.engine import Engine, Native
from tadistill.rollout.vllm import Launch, Vllm
from tadistill.store import Store
from tadistill.user_code import OwnFunction, load_function

MODEL = "model"  # sub-folder of a training stage, in the Hugging Face format
RESPONSES = "responses.jsonl"  # in the folder of a `generate` or `retokenise` stage
VLLM_LOG = "vllm.log"  # what vLLM prints, if it samples the stage's text
ANSWERS = "answers.jsonl"  # in the folder of an `evaluate` or `probe` stage: the token ids of the answers
_CORPUS_CHUNKS = 20_000
_TRIM_EVERY = 30.0  # seconds
_CALIBRATION = 256  # number of training texts that decide what pruning keeps (Minitron used 1,024 texts of a web corpus)

Progress = Callable[[int, int, str], None]
"""Called with the finished and the whole work of the stage, and a text. Until the work begins (rows are tokenised …), 0 is finished."""
AnySpec = TypeVar("AnySpec", bound=Spec)
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Context(Generic[AnySpec]):
    """A running stage. Its methods load the models and the data that the stage needs."""

    def __init__(self, task: Task, store: Store, folder: Path, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]):
        self.task, self.store, self.folder = task, store, folder
        self.spec = cast(AnySpec, task.spec)
        self.progress, self.alarm, self.stop = trimming(progress), alarm, stop
        self.device = own_device()
        self._vllm: Vllm | None = None
        self.versions: dict[str, str] = {}
        """Versions of programs that the stage ran in other processes, such as vLLM."""
        self.counts: dict[tuple[str, str], Counts] = {}
        """Counts of kept, cut and left-out rows of each encoded split, by its role (train, dev, test) and name."""

    def _prepares(self, text: str) -> None:
        self.progress(0, self.spec.steps or 1, text)

    # --- models ---------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the stage's `precision`."""
        spec = cast(Any, self.spec)
        return getattr(torch, DTYPES[spec.optim.precision if isinstance(self.spec, TrainingSpec) else spec.precision])

    def model(self, handle: Handle, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Model:
        """Load a model and its tokenizer. `handle` says where the model comes from: files, an earlier stage, or another model that is
        pruned, gets another temperature, or gets random weights.

        The default device is the device of this process.
        """
        self._prepares("loading model")
        device, world = device or self.device, self.spec.data.world.model_dump()
        match handle:
            case FromStage():
                name = MODEL if handle.checkpoint is None else f"{MODEL}-{handle.checkpoint}"
                directory = str(self.store.folder(handle.stage) / name)
                tokenizer = load_tokenizer(directory, world=world)
                model = load_model(directory, dtype=dtype)
            case Loaded():
                revision = handle.tokenizer_revision or handle.revision
                with _unchanged_files(handle):
                    tokenizer = load_tokenizer(handle.tokenizer_source, revision=revision, world=world)
                    seed, config = rng.torch_seed(handle.seed or 0, "initial weights"), handle.config
                    model = load_model(handle.source, revision=handle.revision, config=config, dtype=dtype, seed=seed, tokenizer=tokenizer)
            case PrunedDepth() | Pruned():
                parent, tokenizer = self.model(handle.of)  # in float32, so that the choice of layers and weights does not depend on `dtype`
                model = self._pruned(parent, tokenizer, handle).to(dtype)  # type: ignore[arg-type]
            case Tempered():
                model, tokenizer = self.model(handle.of, dtype, device)
                temper_head(model, handle.temper)
            case RandomWeights():
                known, tokenizer = self.model(handle.of, dtype, torch.device("cpu"))  # only its configuration is used
                model = scratch_model(known.config, seed=rng.torch_seed(handle.random, "random teacher"), dtype=dtype).eval()
            case BehindApi():
                raise AssertionError(
                    "a model behind an API cannot be loaded, because its weights are not on this machine; only the stage `ask` may use it"
                )
        placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
        if self.device.type == "cuda":  # only there, because results on a CPU stay the same bit for bit
            fuse_gelu(placed)
        check_reading(placed)
        return placed, tokenizer

    def _pruned(self, parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, handle: PrunedDepth | Pruned) -> PreTrainedModel:
        total = parent.config.num_hidden_layers
        if isinstance(handle, PrunedDepth):
            return prune_depth(parent, keep_list(handle.prune, total))
        sets = [references(self.split(split, tokenizer).encoded) for split in (handle.train, *handle.more)]
        texts = [s for train in sets for s in train[: _CALIBRATION // len(sets)]]
        measured = importance(parent, [[*s.prompt, *s.response] for s in texts])
        shape = resized(shape_of(parent.config), **handle.prune)
        if handle.layers == "influence":
            return prune(parent, shape, measured)
        return prune(parent, shape, measured, keep_list(shape.layers if handle.layers == "spacing" else handle.layers, total))

    def say_if_slower(self, *models: PreTrainedModel) -> None:
        """Give an alarm for each model that generates answers more slowly than other models of its size."""
        for sentence in filter(None, map(slower, models)):
            self.alarm(sentence)

    def frozen(self, handle: Handle, dtype: torch.dtype = torch.float32) -> Model:
        """Load a model that is not trained. `resources.teacher` decides where its weights are: `replicated`, `sharded` or `offloaded`."""
        where = self.task.resources.teacher
        model, tokenizer = self.model(handle, dtype, None if where == "replicated" else torch.device("cpu"))
        model.eval().requires_grad_(False)
        place = {"replicated": lambda model, _: column_major(model), "sharded": shard, "offloaded": offload}[where]
        return place(model, self.device), tokenizer

    def teacher(self, handle: Handle) -> tuple[Teacher, PreTrainedTokenizerBase]:
        """Return the model as a teacher in the stage's precision, and its tokenizer. The model runs in this process, or on the servers that
        the recipe names.

        Raises:
            ServerFailed: a server cannot be reached, runs another model, or takes only shorter texts than the stage has.
        """
        if not isinstance(handle, Loaded) or handle.serve is None:
            model, tokenizer = self.frozen(handle, self.dtype)
            return teacher_of(model), tokenizer
        revision, servers = handle.tokenizer_revision or handle.revision, Servers(handle.load, handle.serve)
        where: dict[str, Any] = {"load": handle.source, "revision": handle.revision, "longest": self.spec.longest}
        with _unchanged_files(handle):
            tokenizer = load_tokenizer(handle.tokenizer_source, revision=revision, world=self.spec.data.world.model_dump())
            return served_teacher(servers, tokenizer, dtype=self.dtype, device=self.device, **where), tokenizer

    def tokenizer(self, files: TokenizerFiles) -> PreTrainedTokenizerBase:
        """Load a tokenizer without its model."""
        load, revision = files.at or files.source, files.revision
        with unchanged(load, files.fingerprint, lambda: sources.fingerprint(load, revision, weights=False)):
            return load_tokenizer(load, revision=revision, world=self.spec.data.world.model_dump())

    def subject(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *teachers: Teacher, data: Encoding | None = None
    ) -> Subject:
        """Return the model as a `Subject`, which is ready for sampling and measuring. The subject's vocabulary is cut to the tokens that
        all `teachers` have too. `data` are the model's rules of encoding (default: those of the stage)."""
        ends = (data or self.spec.data).ends or end_tokens(model, tokenizer)
        vocab = shared_vocabulary(tokenizer, model, widths=(t.width for t in teachers))
        for teacher in teachers:
            teacher.compare(vocab)
        return Subject(model, tokenizer, vocab, ends)

    def engine(self, native: Native) -> Engine:
        """Return the engine that samples the stage's text: `native`, or vLLM with the same model and settings."""
        if native.decoding.engine == "native":
            self.say_if_slower(native.student)
            return native
        rank, data = os.environ.get("RANK", "0"), self.spec.data
        launch = Launch(
            settings=self.task.vllm,
            device=self.device,
            dtype=self.dtype,
            longest=max(data.max_prompt, data.context.max_prompt if data.context else 0) + native.decoding.max_new_tokens,
            log=self.folder / (VLLM_LOG if rank == "0" else f"{rank}-{VLLM_LOG}"),
            changes=isinstance(self.spec, TrainingSpec),
        )
        self._vllm = Vllm(native.student, native.decoding, eos=native.eos, vocab=native.vocab, launch=launch)
        return self._vllm

    def close(self) -> None:
        """End the process of vLLM if the stage has started one."""
        if self._vllm:
            self.versions |= {"vllm": self._vllm.version} if self._vllm.version else {}
            self._vllm.close()
            self._vllm = None  # it keeps the model in memory

    # --- data -----------------------------------------------------------------------------------------------------------

    def split(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, contexts: bool = False, data: Encoding | None = None) -> EvalSet:
        """Load a split of a data set, and encode it with the tokenizer. The rows of a large training set stay on the disk.

        Args:
            contexts: True adds the prompts that only the teacher reads, if the stage has a `context`.
            data: rules of encoding (default: those of the stage).
        """
        self._prepares(f"reading {split.ref.name}")
        data, name = data or self.spec.data, split.ref.name
        rules = Rules.of(data, split.role, bos=data.bos, context=data.context if contexts else None)
        called = f"data set `{name}`"
        with self._rows(split, split.role, split.limit) as rows:
            total = rows.count() if split.role == "train" else 0
            if total > LARGE:
                kept = keep(rows, tokenizer, rules, name=called, tick=partial(self._tokenised, total))
                self.counts[split.role, name] = kept.counts
                return EvalSet(name, (), kept.rows)
            examples = rows.read()
        found, self.counts[split.role, name] = encoded_set(name, examples, tokenizer, rules, called=called)
        return found

    def dev(self, dev: Dev, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[float, EvalSet]]:
        """Load the dev sets. Return the weight and the rows of each set, by its name. A mean over the sets uses the weights (sum 1)."""
        if isinstance(dev, Split):
            return {dev.ref.name: (1.0, self.split(dev, tokenizer))}
        each = zip(dev.names, dev.shares, dev.splits, strict=True)
        return {name: (share, self.split(split, tokenizer)) for name, share, split in each}

    def examples(self, split: Split) -> Iterator[Example]:
        """Yield the rows of a split as text, without encoding them."""
        with self._rows(split, split.role, split.limit) as rows:
            yield from rows.stream()

    @contextmanager
    def _rows(self, data: HashedData, role: str, limit: int | None = None) -> Iterator[SplitRows]:
        rows = SplitRows(data.ref, role, self.spec.data.world, self.task.data_root, limit, data.known)
        with unchanged(rows.file or f"data set `{data.ref.name}`", data.fingerprint, rows.fingerprint):
            yield rows

    def _tokenised(self, total: int, done: int) -> None:
        self._prepares(f"{done:,} of {total:,} rows tokenised")
        stop_if_asked(self)

    def own(self, planned: OwnCode) -> OwnFunction:
        """Import a metric or objective of the user. Raises StageFailed if the file of the function has changed since the plan was made."""
        found = load_function(planned.function, self.task.code)
        check_unchanged(found.file, planned.source, found.digest)
        return found

    def corpus(self, source: HashedData | None, tokenizer: PreTrainedTokenizerBase) -> list[Sequence]:
        """Return the plain-text corpus as token sequences; an empty list if `source` is None."""
        if source is None:
            return []
        data = self.spec.data
        with self._rows(source, "train"):
            documents = texts(source.ref, data.world, self.task.data_root)
            return chunks(documents, tokenizer, data.max_length, _CORPUS_CHUNKS, bos=data.bos)


@contextmanager
def _unchanged_files(of: Loaded) -> Iterator[None]:
    """Raise StageFailed, as `unchanged` does, if the weights or the tokenizer of a model have changed."""
    weights = partial(sources.fingerprint, of.source, of.revision)
    tokenizer = partial(sources.fingerprint, of.tokenizer_source, of.tokenizer_revision or of.revision, weights=False)
    planned = of.fingerprint if of.seed is None else None  # random weights have no files
    with unchanged(of.source, planned, weights), unchanged(of.tokenizer_source, of.tokenizer_fingerprint, tokenizer):
        yield


def own_device() -> torch.device:
    """Return this process's GPU, or the CPU if there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def trimming(progress: Progress) -> Progress:
    """Return a function that calls `progress`, and every 30 seconds also returns freed memory to the system."""
    last = time.monotonic()

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        progress(done, total, text)
        if time.monotonic() - last > _TRIM_EVERY:
            give_back_freed_memory()
            last = time.monotonic()

    return report


class Done:
    """Counts the finished work of a stage and reports the progress.

    Call it with the number of newly finished items. The call raises Interrupted if the user asked the run to stop.
    """

    def __init__(self, context: Context, total: int, unit: str):
        self.context, self.total, self.unit, self.done, self.ends = context, total, unit, 0, 0
        context.progress(0, total, unit)

    def part(self, size: int) -> None:
        """Begin a part: `size` items that are saved together. The call that counts the part's last item never raises Interrupted, so that
        the caller can save the part first."""
        self.ends += size

    def save(self, file: Path, size: int, work: Callable[[], Any]) -> None:
        """Do a part of the work, and write its result to a JSON file. If an earlier attempt has written the file, only count the part."""
        self.part(size)
        if file.is_file():
            self.done += size
        else:
            self.context.progress(self.done, self.total, self.unit)
            stop_if_asked(self.context)
            write_json(file, work())

    def __call__(self, count: int) -> None:
        self.done += count
        self.context.progress(self.done, self.total, self.unit)
        if self.done < self.ends:
            stop_if_asked(self.context)


def stop_if_asked(context: Context) -> None:
    """Raise Interrupted if the user asked the run to stop. Stages call this between two parts of their work."""
    if context.stop():
        raise Interrupted("the stage was stopped before its end; its finished parts are kept")
