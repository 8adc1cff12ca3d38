"""A training stage, sft or distill: models, sampler and step come together and go through the loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill import rng
from tadistill.config import Evaluate, Method, Optim
from tadistill.config.method import Dense, Select
from tadistill.config.model import Lora
from tadistill.config.objective import CrossEntropy
from tadistill.config.sampling import OnPolicy, Rounds
from tadistill.data.batch import Sequence, references
from tadistill.disk import read_jsonl
from tadistill.evaluation.run import dev_metrics
from tadistill.evaluation.scoring import Subject
from tadistill.models.loading import end_tokens, save_model, shared_vocabulary
from tadistill.models.lora import adapt, merged
from tadistill.models.recomputing import recompute_layers
from tadistill.plan.throughput import machine
from tadistill.rollout.engine import Engine, Native
from tadistill.rollout.rounds import on_policy
from tadistill.rollout.samplers import FixedSequences, Sampler, Shard
from tadistill.rollout.signals import Signals
from tadistill.rollout.vllm import Vllm
from tadistill.stages.context import MODEL, RESPONSES, SIGNAL, Context, teacher_dtype
from tadistill.train.loop import Hooks, train_stage
from tadistill.train.sharding import weights
from tadistill.train.step import make_step


def train(context: Context) -> dict[str, Any]:
    """An sft or distill stage: trains, keeps the selected checkpoint, saves it as a Hugging Face directory."""
    spec = context.spec
    optim, select = Optim.model_validate(spec["optim"]), Select.model_validate(spec["select"])
    method = Method.model_validate(spec["method"]) if "method" in spec else Method(objective=CrossEntropy())
    dense = Dense.model_validate(spec["dense"]) if "dense" in spec else None
    method = method.model_copy(update={"optim": optim, "select": select, "dense": dense})
    accelerator = _accelerator(context, optim)
    student, tokenizer, save = _student(context, optim)
    handles = [spec["teacher"], *spec.get("assistants", ())] if _needs_teacher(method) else []
    teachers = tuple(context.frozen(handle, teacher_dtype(optim.precision))[0] for handle in handles)
    signals = Signals(context.store.folder(spec["signal"]["stage"]) / SIGNAL, context.device) if "signal" in spec else None
    vocab = shared_vocabulary(tokenizer, student, *teachers)
    if signals and signals.head:
        vocab = min(vocab, len(signals.head.weight))
    sampler = _sampler(context, method, student, teachers, tokenizer, vocab, signals, accelerator)
    # the policy must be the distribution that was sampled from, so rollouts train without dropout (as MiniLLM does)
    student.train(not isinstance(method.sampler, OnPolicy))
    hooks = Hooks(
        evaluate=_dev(
            context, Subject(student, tokenizer, vocab, end_tokens(student, tokenizer)), select, teachers[0] if teachers else None
        ),
        progress=lambda done, text: context.progress(done, optim.steps or 1, text),
        alarm=context.alarm,
        stop=context.stop,
        keep=lambda step, whole: save(context.folder / f"{MODEL}-{step}", whole),
        kept=frozenset(spec.get("keep", ())),
    )
    state = train_stage(
        student,
        make_step(method, student, teachers, vocab, seed=spec["seed"]),
        sampler,
        optim=optim,
        select=select,
        seed=spec["seed"],
        accelerator=accelerator,
        directory=context.folder,
        hooks=hooks,
        checkpoint_seconds=context.task.checkpoint_seconds,
        fsdp=context.task.resources.parallel == "fsdp",
        track=accelerator.log if context.task.trackers else None,
    )
    for tracker in accelerator.trackers:  # not accelerator.end_training(), which would part the ranks, who may have more stages to run
        tracker.finish()
    whole = weights(student)
    if accelerator.is_main_process:
        save(context.folder / MODEL, whole)
    found = {"steps": state.step, "best_step": state.best_step, "best_value": state.best_value, "alarms": state.alarms["given"]}
    accelerator_name = torch.cuda.get_device_name() if context.device.type == "cuda" else None
    found |= {"ledger": state.ledger, "machine": machine(torch.get_num_threads(), accelerator_name)}
    return found | {"global_and_per_device": _counts(method, accelerator.num_processes)}


_Save = Callable[[Path, dict[str, torch.Tensor]], None]


def _student(context: Context, optim: Optim) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, _Save]:
    """What is trained, its tokenizer, and how it becomes an ordinary directory, by its whole weights or with its adapters merged."""
    spec = context.spec
    student, tokenizer = context.model(spec["student"])
    if optim.gradient_checkpointing:
        recompute_layers(student)
    if "lora" not in spec:
        return student, tokenizer, lambda folder, whole: save_model(student, tokenizer, folder, whole)
    tuner = adapt(student, Lora.model_validate(spec["lora"]), seed=rng.torch_seed(spec["seed"], "adapters"))
    return student, tokenizer, lambda folder, _: save_model(merged(tuner), tokenizer, folder)


def _counts(method: Method, devices: int) -> dict[str, Any]:
    """What the recipe's global numbers mean on this number of devices."""
    batch, sampler = method.optim.batch, method.sampler
    found: dict[str, Any] = {"devices": devices, "batch": batch, "batch_per_device": batch // devices}
    if isinstance(sampler, Rounds):
        rollouts = method.round_rollouts
        found |= {"rollouts": rollouts, "rollouts_per_device": rollouts // devices, "updates_per_round": method.round_updates}
    return found


def _accelerator(context: Context, optim: Optim) -> Accelerator:
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
    context: Context,
    method: Method,
    student: PreTrainedModel,
    teachers: tuple[PreTrainedModel, ...],
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    signals: Signals | None,
    accelerator: Accelerator,
) -> Sampler:
    spec, eos = context.spec, tokenizer.eos_token_id
    assert isinstance(eos, int)
    common: dict[str, Any] = {"pad": eos, "seed": spec["seed"], "shard": Shard(accelerator.process_index, accelerator.num_processes)}
    train = context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer)
    texts = _responses(context, spec["responses"]["stage"]) if "responses" in spec else references(train.encoded)
    config = method.sampler
    if not isinstance(config, OnPolicy):
        return FixedSequences(texts, method.optim, signals=signals, **common)
    common["engine"] = _engine(context, config, student, tokenizer, vocab)
    return on_policy(method, texts, train.encoded, teachers=teachers, vocab=vocab, corpus=context.corpus(tokenizer), **common)


def _engine(context: Context, config: OnPolicy, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Engine:
    eos = end_tokens(student, tokenizer)
    if config.engine == "vllm":
        return Vllm(student, config, eos=eos, vocab=vocab)
    return Native(student, config, eos=eos, vocab=vocab, chunk=config.chunk)


def _dev(context: Context, subject: Subject, select: Select, teacher: PreTrainedModel | None) -> Callable[[], dict[str, float]]:
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


def _responses(context: Context, stage: str) -> list[Sequence]:
    rows = read_jsonl(context.store.folder(stage) / RESPONSES)
    return [Sequence(tuple(r["prompt"]), tuple(r["response"])) for r in rows]
