"""Run one stage in this process: the only place that joins models, data, training and evaluation.

`run_stage` takes the stage's lock, does the work in its folder in the store, and puts the manifest in place last. What an
earlier, killed attempt left there is resumed.
"""

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill import rng
from tadistill.config import Data, DataRef, Evaluate, Method, Optim
from tadistill.config.method import Select
from tadistill.config.objective import CrossEntropy, MiniLLM, SampledKL
from tadistill.config.sampling import DatasetSampler, OnPolicy, Rounds
from tadistill.data import corpus, datasets
from tadistill.data.batch import Sequence
from tadistill.data.templates import encode
from tadistill.evaluation.run import EvalSet, Subject, dev_metrics, evaluate, generate, references
from tadistill.models.loading import end_tokens, load_model, load_tokenizer, save_model, shared_vocabulary
from tadistill.models.pruning import keep_list, prune_depth
from tadistill.rollout.engine import Engine, Native
from tadistill.rollout.rounds import Rollouts, Teacher
from tadistill.rollout.samplers import FixedSequences, Mix, Pairs, Replay, Sampler, Shard
from tadistill.rollout.signals import Signals, record
from tadistill.rollout.vllm import Vllm
from tadistill.study.store import Store, write_json
from tadistill.study.task import Task
from tadistill.train.loop import Hooks, Interrupted, train_stage
from tadistill.train.step import make_step

SIGNAL = "signal"  # the sub-folder of a signal stage with the teacher's outputs
MODEL = "model"  # the sub-folder of a training stage that is an ordinary Hugging Face directory
_GENERATION_BATCH = 64
_CORPUS_CHUNKS = 20_000

Progress = Callable[[int, int, str], None]


def run_stage(task: Task, *, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Run a stage unless the store has it (another process may have finished it meanwhile)."""
    store = Store(Path(task.store))
    lock = store.acquire(task.key, timeout=10)
    try:
        if store.finished(task.key):
            return
        folder = store.folder(task.key)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "stage.json", {"kind": task.kind, "label": task.label, "parents": task.parents, "spec": task.spec})
        start = time.monotonic()
        context = _Context(task, store, folder, progress, alarm, stop)
        facts = {"sft": _train, "distill": _train, "generate": _generate, "signal": _signal, "evaluate": _evaluate}[task.kind](context)
        store.finish(
            task.key,
            {
                "key": task.key,
                "kind": task.kind,
                "label": task.label,
                "parents": task.parents,
                "seconds": round(time.monotonic() - start, 2),
                "versions": {name: version(name) for name in ("tadistill", "torch", "transformers", "accelerate")},
                **facts,
            },
        )
    finally:
        lock.release()


class _Context:
    """A task with the helpers that read its spec."""

    def __init__(self, task: Task, store: Store, folder: Path, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]):
        self.task, self.spec, self.store, self.folder = task, task.spec, store, folder
        self.progress, self.alarm, self.stop = progress, alarm, stop
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, handle: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer behind a handle."""
        world = self.spec["data"]["world"]
        if "stage" in handle:
            directory = str(self.store.folder(handle["stage"]) / MODEL)
            tokenizer = load_tokenizer(directory, world=world)
            model = load_model(directory, dtype=dtype)
        elif "prune" in handle:
            parent, tokenizer = self.model(handle["of"], dtype)
            model = prune_depth(parent, keep_list(handle["prune"], parent.config.num_hidden_layers))
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
        return model.to(self.device), tokenizer  # type: ignore[arg-type]

    def teacher(self, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The frozen teacher of the stage."""
        model, tokenizer = self.model(self.spec["teacher"], dtype)
        return model.eval().requires_grad_(False), tokenizer

    def split(self, role: str, ref: dict, limit: int | None, tokenizer: PreTrainedTokenizerBase) -> EvalSet:
        """A data set, read and encoded."""
        settings, name = self.spec["data"], DataRef.model_validate(ref).name
        everywhere = {"train": ref, "dev": ref, "test": [ref], "limit": {role: limit}, "root": self.task.data_root}
        data = Data.model_validate(settings | everywhere)
        examples = datasets.load(DataRef.model_validate(ref), role, data)
        lengths = {"template": data.template, "max_prompt": data.max_prompt, "max_length": data.max_length}
        return EvalSet(name, examples, encode(examples, tokenizer, name=f"data set `{name}`", **lengths))

    def corpus(self, tokenizer: PreTrainedTokenizerBase) -> list[Sequence]:
        """Chunks of plain text for the language-modelling term, if the stage has one."""
        if "corpus" not in self.spec:
            return []
        ref = self.spec["corpus"]["ref"]
        data = Data.model_validate(self.spec["data"] | {"train": ref, "dev": ref, "test": [ref], "root": self.task.data_root})
        return corpus.chunks(datasets.texts(DataRef.model_validate(ref), data), tokenizer, data.max_length, _CORPUS_CHUNKS)


# --- sft and distill ----------------------------------------------------------------------------------------------------


def _train(context: _Context) -> dict[str, Any]:
    """An sft or distill stage: trains, keeps the selected checkpoint, saves it as a Hugging Face directory."""
    spec = context.spec
    optim, select = Optim.model_validate(spec["optim"]), Select.model_validate(spec["select"])
    method = Method.model_validate(spec["method"]) if "method" in spec else Method(objective=CrossEntropy())
    method = method.model_copy(update={"optim": optim, "select": select})
    accelerator = _accelerator(context, optim)
    student, tokenizer = context.model(spec["student"])
    teacher = context.teacher(_dtype(optim.precision))[0] if _needs_teacher(method) else None
    signals = Signals(context.store.folder(spec["signal"]["stage"]) / SIGNAL, context.device) if "signal" in spec else None
    vocab = shared_vocabulary(tokenizer, student, *([teacher] if teacher else []))
    if signals and signals.head:
        vocab = min(vocab, len(signals.head.weight))
    if optim.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    sampler = _sampler(context, method, student, teacher, tokenizer, vocab, signals, accelerator)
    # the policy must be the distribution that was sampled from, so rollouts train without dropout (as MiniLLM does)
    student.train(not isinstance(method.sampler, OnPolicy))
    hooks = Hooks(
        evaluate=_dev(context, Subject(student, tokenizer, vocab, end_tokens(student, tokenizer)), select, teacher),
        progress=lambda done, text: context.progress(done, optim.steps or 1, text),
        alarm=context.alarm,
        stop=context.stop,
    )
    state = train_stage(
        student,
        make_step(method, student, teacher, vocab),
        sampler,
        optim=optim,
        select=select,
        seed=spec["seed"],
        accelerator=accelerator,
        directory=context.folder,
        hooks=hooks,
        checkpoint_seconds=context.task.checkpoint_seconds,
        track=accelerator.log if context.task.trackers else None,
    )
    accelerator.end_training()
    save_model(student, tokenizer, context.folder / MODEL)
    return {"steps": state.step, "best_step": state.best_step, "best_value": state.best_value}


def _accelerator(context: _Context, optim: Optim) -> Accelerator:
    AcceleratorState._reset_state(True)  # one worker runs many stages, each with its own precision
    trackers = list(context.task.trackers)
    accelerator = Accelerator(
        cpu=context.device.type == "cpu",
        gradient_accumulation_steps=1,
        mixed_precision="bf16" if optim.precision == "bf16" else "no",
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=str(context.folder),
    )
    if trackers:
        accelerator.init_trackers(context.task.study, config={"stage": context.task.label, "key": context.task.key})
    return accelerator


def _sampler(
    context: _Context,
    method: Method,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    signals: Signals | None,
    accelerator: Accelerator,
) -> Sampler:
    spec, eos = context.spec, tokenizer.eos_token_id
    assert isinstance(eos, int)
    common: dict[str, Any] = {"pad": eos, "seed": spec["seed"], "shard": Shard(accelerator.process_index, accelerator.num_processes)}
    train = context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer)
    texts = _responses(context, spec["responses"]["stage"]) if "responses" in spec else references(train)
    config = method.sampler
    if not isinstance(config, OnPolicy):
        return FixedSequences(texts, method.optim, signals=signals, **common)
    common["engine"] = _engine(context, config, student, tokenizer, vocab)
    if isinstance(config, Rounds):
        assert teacher is not None
        scores = isinstance(method.objective, MiniLLM | SampledKL)
        states = method.objective.single_step if isinstance(method.objective, MiniLLM) else not scores
        plain = context.corpus(tokenizer)
        return Rollouts(train.encoded, method, teacher=Teacher(teacher, vocab, scores, states), corpus=plain, **common)
    return {"mix": Mix, "replay": Replay, "pair": Pairs}[config.type](texts, config, method.optim, **common)


def _engine(context: _Context, config: OnPolicy, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Engine:
    eos = end_tokens(student, tokenizer)
    if config.engine == "vllm":
        return Vllm(student, config, eos=eos, vocab=vocab)
    return Native(student, config, eos=eos, vocab=vocab, chunk=config.chunk)


def _dev(context: _Context, subject: Subject, select: Select, teacher: PreTrainedModel | None) -> Callable[[], dict[str, float]]:
    """The dev evaluation of a training stage."""
    if select.metric == "last":
        return dict
    data = context.split("dev", context.spec["dev"]["ref"], context.spec["dev_limit"], subject.tokenizer)
    settings = Evaluate.model_validate(context.spec["decoding"])
    return lambda: dev_metrics(subject, data, settings, select.metric, teacher=teacher)


def _needs_teacher(method: Method) -> bool:
    """Whether training itself runs the teacher, or selection does."""
    if isinstance(method.sampler, Rounds) or method.select.metric == "reverse_kl":
        return True
    return not (isinstance(method.objective, CrossEntropy) or method.signal)


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


# --- signal -------------------------------------------------------------------------------------------------------------


def _signal(context: _Context) -> dict[str, Any]:
    """The teacher's hidden states or top-k tokens on the training set, in parts that survive a kill."""
    spec = context.spec
    config = DatasetSampler.model_validate({"signal": spec["signal"]}).signal
    assert config is not None
    model, tokenizer = context.teacher(_dtype(spec["precision"]))
    sequences = references(context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer))
    subject = _subject(model, tokenizer)

    def tick(done: int) -> None:
        context.progress(done, len(sequences), "sequences")
        _stop_if_asked(context)

    record(model, sequences, config, context.folder / SIGNAL, vocab=subject.vocab, pad=subject.pad, tick=tick)
    return {"sequences": len(sequences)}


# --- generate -----------------------------------------------------------------------------------------------------------


def _generate(context: _Context) -> dict[str, Any]:
    """The teacher's answer to every training prompt, in parts that survive a kill."""
    spec = context.spec
    model, tokenizer = context.teacher()
    subject = _subject(model, tokenizer)
    train = context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer)
    decoding = Evaluate(seeds=(spec["seed"],), batch=_GENERATION_BATCH, **spec["sampler"])
    parts = context.folder / "parts"
    rows = []
    for start in range(0, len(train.encoded), 8 * _GENERATION_BATCH):
        part = parts / f"{start}.json"
        if not part.is_file():
            _stop_if_asked(context)
            chunk = EvalSet(train.name, train.examples, train.encoded[start : start + 8 * _GENERATION_BATCH])
            answers = generate(subject, chunk, decoding, spec["seed"])
            write_json(part, [{"prompt": list(a.prompt), "response": list(a.response)} for a in answers])
        rows += json.loads(part.read_text(encoding="utf-8"))
        context.progress(len(rows), len(train.encoded), "answers")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (context.folder / "responses.jsonl").write_text(text, encoding="utf-8")
    return {"answers": len(rows)}


def _subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *others: PreTrainedModel) -> Subject:
    return Subject(model, tokenizer, shared_vocabulary(tokenizer, model, *others), end_tokens(model, tokenizer))


def _responses(context: _Context, stage: str) -> list[Sequence]:
    text = (context.store.folder(stage) / "responses.jsonl").read_text(encoding="utf-8")
    rows = (json.loads(line) for line in text.splitlines())
    return [Sequence(tuple(r["prompt"]), tuple(r["response"])) for r in rows]


# --- evaluate -----------------------------------------------------------------------------------------------------------


def _evaluate(context: _Context) -> dict[str, Any]:
    """Every test set of the study; each finished set is kept if the run is killed in the next."""
    spec = context.spec
    settings = Evaluate.model_validate(spec["decoding"])
    model, tokenizer = context.model(spec["model"])
    teacher, _ = context.teacher()
    subject = _subject(model.eval(), tokenizer, teacher)
    scores, records, done = {}, [], 0
    sets = [context.split("test", s["ref"], spec["limit"], tokenizer) for s in spec["sets"]]
    total = sum(len(s.encoded) for s in sets) * len(settings.seeds)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        context.progress(done, total, "answers")

    for data in sets:
        part = context.folder / "parts" / f"{data.name}.json"
        if part.is_file():
            tick(len(data.encoded) * len(settings.seeds))
        else:
            _stop_if_asked(context)
            write_json(part, evaluate(subject, data, settings, teacher=teacher, tick=tick))
        scores[data.name], of_set = json.loads(part.read_text(encoding="utf-8"))
        records += of_set
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (context.folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    write_json(context.folder / "scores.json", scores)
    return {"left_out": {s.name: len(s.examples) - len(s.encoded) for s in sets}}


def _stop_if_asked(context: _Context) -> None:
    if context.stop():
        raise Interrupted("stopped between two parts")
