"""The two stages that train a student: `sft` and `distill`. They build the models, the sampler and the training step, and run the loop."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill import rng
from tadistill.config.sampling import OnPolicy, Rounds
from tadistill.data.batch import Batch, Sequence, answered_rows, references, responses
from tadistill.data.encoding import Encoded, EvalSet
from tadistill.data.other_tokenizer import Behind, Rereader, Row
from tadistill.data.token_bytes import token_bytes
from tadistill.data.token_cache import row_numbers
from tadistill.data.training_sets import Lazy, TrainingSets, joined
from tadistill.disk import write_json
from tadistill.errors import DataError, ModelError
from tadistill.evaluation.run import dev_metrics, over_sets
from tadistill.evaluation.token_scores import Subject
from tadistill.models.forward import pack_rows
from tadistill.models.loading import save_model
from tadistill.models.modify import adapt, merged, recompute_layers
from tadistill.models.sharding import shard, sharded, weights
from tadistill.models.teachers import MovingAverage, Teacher, frozen_copy
from tadistill.models.tokens import end_tokens, shared_vocabulary
from tadistill.plan.inputs import Encoding, Output, Split
from tadistill.plan.kinds import DistillSpec, SftSpec, TrainingSpec
from tadistill.plan.throughput import machine
from tadistill.rollout.engine import Native
from tadistill.rollout.recorded_signals import Signals
from tadistill.rollout.rounds import on_policy
from tadistill.rollout.samplers import FixedSequences, Sampler, Shard
from tadistill.stages.context import MODEL, RESPONSES, Context
from tadistill.store import ROLLOUTS, SIGNAL
from tadistill.text import counted
from tadistill.train.checkpoint import TrainState
from tadistill.train.loop import Hooks, train_stage
from tadistill.train.step import make_step

_SHOWN, _LETTERS = 4, 1000  # rows and characters of rollouts.json
_Save = Callable[[Path, dict[str, torch.Tensor]], None]


class Across:
    """The texts and vocabularies of a training whose student and teacher have different tokenizers."""

    def __init__(self, context: Context[Any], student: Subject, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, data: Encoding):
        """Prepare a training of `student` with `teacher`. `tokenizer` and `data` (the rules of encoding) belong to the teacher.

        Raises:
            ModelError: the tokenizers have no token in common.
        """
        mine, theirs = token_bytes(student.tokenizer, student.eos), token_bytes(tokenizer, data.ends)
        sizes = student.vocab, shared_vocabulary(tokenizer, widths=(teacher.width,))
        again = Rereader(mine, theirs, sizes, teacher.longest)
        if not again.shared:
            raise ModelError(
                f"the tokenizers of student and teacher ({sizes[0]:,} and {sizes[1]:,} tokens) have no token in common, so no loss can "
                "compare them; choose models whose tokenizers read the same characters"
            )
        self.context, self.tokenizer, self.data, self.again = context, tokenizer, data, again

    def rows(self, rows: Seq[Encoded], split: Split) -> Seq[Encoded]:
        """Add the teacher's prompts to the student's rows of a training set. Rows with a prompt that is too long for the teacher are left
        out, and an alarm gives their number.

        Raises:
            DataError: all rows are left out.
        """
        found = _behind(self.context, split, rows, row_numbers(rows), self._of_teacher(split), ("row is", "rows are"))
        if not len(found):
            raise DataError(
                f"data set `{split.ref.name}`: the teacher can read none of the student's rows, because the prompts are too long; raise "
                "data.max_prompt"
            )
        return found

    def answers(self, file: Path, rows: Seq[Encoded], split: Split) -> Seq[Sequence]:
        """Return the responses in `file` to the prompts of the student's `rows`, with the teacher's prompts added."""
        return _answers(self.context, split, file, rows, self._of_teacher(split))

    def _of_teacher(self, split: Split) -> Seq[Encoded]:
        counts = dict(self.context.counts)  # the manifest gets the counts of the student's rows
        found = self.context.split(split, self.tokenizer, contexts=True, data=self.data).encoded
        self.context.counts = counts
        return found


def _behind(
    context: Context[Any], split: Split, rows: Seq[Row], numbers: np.ndarray, of_teacher: Seq[Encoded], nouns: tuple[str, str]
) -> Behind[Row]:
    # the rows or answers with the teacher's prompts; an alarm gives the number of those that are left out
    found = Behind(rows, numbers, of_teacher)
    if found.left_out:
        why = "because the prompt is too long in the teacher's tokens"
        context.alarm(f"data set `{split.ref.name}`: {found.left_out} of {counted(len(rows), *nouns)} left out, {why}")
    return found


def _answers(context: Context[Any], split: Split, file: Path, rows: Seq[Encoded], of_teacher: Seq[Encoded]) -> Seq[Sequence]:
    # a file of retokenised answers leaves out rows, so each answer finds the teacher's prompt by the number of its row
    return _behind(context, split, responses(file), answered_rows(file, rows), of_teacher, ("answer is", "answers are"))


def train(context: Context[TrainingSpec]) -> dict[str, Any]:
    """Train the student, and save its selected checkpoint as a Hugging Face directory. The result contains values for the stage's
    manifest.json."""
    spec, method, optim = context.spec, context.spec.method, context.spec.optim
    accelerator = Accelerator(cpu=context.device.type == "cpu", mixed_precision="bf16" if optim.precision == "bf16" else "no")
    ranks = Shard(accelerator.process_index, accelerator.num_processes)
    student, tokenizer, save = _student(context)
    teachers = _teachers(context, student)
    for model in (student, *teachers.models) if optim.packed else ():
        pack_rows(model)
    subject = context.subject(student, tokenizer, *(() if teachers.other else teachers.running))
    subject = replace(subject, vocab=min([subject.vocab, *(len(read.head.weight) for read in teachers.signals if read.head)]))
    across = Across(context, subject, *teachers.other) if teachers.other else None
    sampler = _sampler(context, subject, teachers, ranks, across)
    # the policy must be the distribution that was sampled from, so rollouts train without dropout (as MiniLLM does)
    student.train(not method.sampler.on_policy)
    vocab = across.again if across else subject.vocab
    own = context.own(spec.own).call if isinstance(spec, DistillSpec) and spec.own else None
    step = make_step(method, student, teachers.running, vocab, seed=spec.seed, own=own, recorded=len(teachers.signals))
    state = train_stage(
        student,
        replace(step, average=teachers.average),
        sampler,
        optim=optim,
        select=spec.select,
        seed=spec.seed,
        accelerator=accelerator,
        directory=context.folder,
        hooks=_hooks(context, subject, teachers, ranks, save),
        checkpoint_seconds=context.task.checkpoint_seconds,
    )
    whole = weights(student)
    if accelerator.is_main_process:
        save(context.folder / MODEL, whole)
    return _facts(context, state, accelerator.num_processes)


@dataclass(frozen=True)
class _Teachers:
    """The teachers of a training. It has none for fine-tuning, and for a method that only reads what a teacher wrote."""

    running: tuple[Teacher, ...] = ()
    """The teachers that run during training, the original one first."""
    other: tuple[Teacher, PreTrainedTokenizerBase, Encoding] | None = None
    """The teacher, its tokenizer and its rules of encoding, if its tokenizer is not that of the student."""
    average: MovingAverage | None = None
    """The moving average of the student, if it is the teacher."""
    signals: tuple[Signals, ...] = ()
    """The recorded outputs of teachers that do not run."""

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """The models of the teachers that run in this process."""
        return tuple(teacher.model for teacher in self.running if teacher.model is not None)


def _teachers(context: Context[TrainingSpec], student: PreTrainedModel) -> _Teachers:
    spec = context.spec
    if not isinstance(spec, DistillSpec):
        return _Teachers()
    if spec.ema is not None:  # a sharded model cannot be copied, and has no adapters
        twin = context.frozen(spec.student)[0] if sharded(student) else frozen_copy(student)
        average = MovingAverage(student, twin, spec.ema)
        return _Teachers((average.teacher,), average=average)
    loaded = [context.teacher(handle) for handle in (spec.teacher, *spec.assistants)] if spec.method.runs_teacher else []
    recorded = (spec.signal, *spec.assistant_signals) if spec.signal else ()
    return _Teachers(
        running=tuple(teacher for teacher, _ in loaded),
        other=(*loaded[0], spec.teacher_data) if spec.teacher_data else None,
        signals=tuple(Signals(context.store.folder(output.stage) / SIGNAL, context.device) for output in recorded),
    )


def _hooks(context: Context[TrainingSpec], subject: Subject, teachers: _Teachers, ranks: Shard, save: _Save) -> Hooks:
    spec = context.spec
    return Hooks(
        evaluate=_dev(context, subject, teachers.running[0] if teachers.running else None, ranks),
        progress=lambda done, text: context.progress(done, spec.optim.steps or 1, text),
        alarm=context.alarm,
        sampled=lambda step, batch: write_rollouts(context.folder / ROLLOUTS, step, batch, subject.tokenizer),
        stop=context.stop,
        keep=lambda step, whole: save(context.folder / f"{MODEL}-{step}", whole),
        kept=frozenset(spec.keep if isinstance(spec, SftSpec) else ()),
    )


def _facts(context: Context[TrainingSpec], state: TrainState, devices: int) -> dict[str, Any]:
    spec, method = context.spec, context.spec.method
    batch, rollouts = spec.optim.batch, method.round_rollouts
    counts = {"devices": devices, "batch": batch, "batch_per_device": batch // devices}
    if method.samples and isinstance(method.sampler, Rounds):
        counts |= {"rollouts": rollouts, "rollouts_per_device": rollouts // devices, "updates_per_round": method.round_updates}
    return {
        "steps": state.step,
        "best_step": state.best_step,
        "best_value": state.best_value,
        "alarms": state.alarms["given"],
        "checkpoints": spec.select.evaluations(state.step),
        "stopped_early": state.step < (spec.optim.steps or 0),
        "ledger": state.ledger,
        "machine": machine(torch.get_num_threads(), torch.cuda.get_device_name() if context.device.type == "cuda" else None),
        "global_and_per_device": counts,
    }


def write_rollouts(path: Path, step: int, batch: Batch, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the first four sampled sequences as text, with at most 1,000 characters of each prompt and response."""
    rows = []
    for ids, mask in zip(batch.ids_BT[:_SHOWN].tolist(), batch.mask_BT[:_SHOWN].tolist(), strict=True):
        places = [place + 1 for place, counted in enumerate(mask) if counted]  # the mask of a token is one position before the token
        start, end = (places[0], places[-1] + 1) if places else (len(ids), len(ids))
        prompt, response = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])
        rows.append({"prompt": prompt[-_LETTERS:], "response": response[:_LETTERS]})
    write_json(path, {"step": step, "rows": rows})


def _student(context: Context[TrainingSpec]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, _Save]:
    spec = context.spec
    fsdp = context.task.resources.parallel == "fsdp"
    student, tokenizer = context.model(spec.student, device=torch.device("cpu") if fsdp else None)
    if fsdp:
        shard(student, context.device)
    ends = spec.data.ends or end_tokens(student, tokenizer)
    if spec.optim.gradient_checkpointing:
        recompute_layers(student)
    if spec.lora is None:
        return student, tokenizer, lambda folder, whole: save_model(student, tokenizer, folder, whole, ends=ends)
    tuner = adapt(student, spec.lora, seed=rng.torch_seed(spec.seed, "adapters"))
    return student, tokenizer, lambda folder, _: save_model(merged(tuner), tokenizer, folder, ends=ends)


def _sampler(context: Context[TrainingSpec], subject: Subject, teachers: _Teachers, shard: Shard, across: Across | None) -> Sampler:
    spec, method, config = context.spec, context.spec.method, context.spec.method.sampler
    sets, training, texts = _training_texts(context, subject, across)
    again = across and across.again
    common: dict[str, Any] = {"pad": subject.pad, "seed": spec.seed, "shard": shard, "sets": training, "again": again}
    if not (method.samples and isinstance(config, OnPolicy)):
        return FixedSequences(texts, method.optim, signals=teachers.signals, **common)
    context.say_if_slower(*(teacher.model for teacher in teachers.running[:1] if config.guided and teacher.model is not None))
    corpus = context.corpus(spec.corpus if isinstance(spec, DistillSpec) else None, subject.tokenizer)
    # sample with a bfloat16 copy; not if FSDP owns the weights, and not on a CPU, where it would change the numbers of finished stages
    half = spec.optim.precision == "bf16" and context.device.type == "cuda" and context.task.resources.parallel == "ddp"
    adapts = "chunk" not in config.model_fields_set
    native = Native(subject.model, config, eos=subject.eos, vocab=subject.vocab, chunk=config.chunk, adapts=adapts, half=half)
    common |= {"engine": context.engine(native), "vocab": subject.vocab, "corpus": corpus}
    return on_policy(method, texts, joined(sets), teachers=teachers.running, **common)


def _training_texts(
    context: Context[TrainingSpec], subject: Subject, across: Across | None
) -> tuple[list[Seq[Encoded]], TrainingSets, Seq[Sequence]]:
    # the rows of each training set, the rule by which updates draw from the sets, and the responses to all rows
    spec = context.spec
    distill = spec if isinstance(spec, DistillSpec) else None
    sets = [context.split(split, subject.tokenizer, contexts=True).encoded for split in spec.sets]
    texts: Seq[Sequence] | None = None
    if across:
        if distill and distill.responses:  # there is only one set
            texts = across.answers(context.store.folder(distill.responses.stage) / RESPONSES, joined(sets), spec.train)
        sets = [across.rows(each, split) for each, split in zip(sets, spec.sets, strict=True)]
    training = TrainingSets(tuple(map(len, sets)), spec.weights, distill.route if distill and spec.method.uses_teacher else ())
    if texts is None:
        texts = _texts(context, training, sets)
    if len(sets) == 1:  # a row can have no answer, because the answer did not fit into the student's tokens
        training = replace(training, sizes=(len(texts),))
    return sets, training, texts


def _texts(context: Context[TrainingSpec], training: TrainingSets, sets: list[Seq[Encoded]]) -> Seq[Sequence]:
    # the responses of all sets, one set after the other; each with the number of its teacher, if the sets have teachers of their own
    spec = context.spec
    distill = spec if isinstance(spec, DistillSpec) else None
    answered = (distill.responses, *distill.assistant_responses) if distill and distill.responses else ()

    def written(output: Output, encoded: list[Seq[Encoded]]) -> Seq[Sequence]:
        file, rows = context.store.folder(output.stage) / RESPONSES, joined(encoded)
        if spec.data.context and len(encoded) == 1:
            return _answers(context, spec.train, file, rows, rows)
        return responses(file, rows if spec.data.context else ())  # the answers to several sets are those to all their rows

    if answered and not training.route:
        return written(answered[0], sets)
    fixed = joined([references(each) for each in sets])
    if not training.route:
        return fixed
    own = [written(output, [sets[number] for number in training.sets_of(k)]) for k, output in enumerate(answered)]

    def read(row: int) -> Sequence:
        teacher = training.teacher(row)
        assert teacher is not None
        return replace(own[teacher][training.place(row)] if own else fixed[row], teacher=teacher)

    return Lazy(len(fixed), read)


def _dev(context: Context[TrainingSpec], subject: Subject, teacher: Teacher | None, ranks: Shard) -> Callable[[], dict[str, float]]:
    spec = context.spec
    if spec.dev is None or spec.decoding is None:
        return dict
    sets, settings, metric = context.dev(spec.dev, subject.tokenizer), spec.decoding, spec.select.metric
    # all processes run a sharded teacher on the same texts
    together = metric == "reverse_kl" and teacher is not None and teacher.model is not None and sharded(teacher.model)

    def measure(data: EvalSet) -> dict[str, float]:
        share = Shard() if together or len(data.encoded) < ranks.world else ranks
        return dev_metrics(subject, data, settings, metric, teacher=teacher, shard=share)

    return lambda: over_sets({name: (share, measure(data)) for name, (share, data) in sets.items()})
