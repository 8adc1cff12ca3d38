"""Run one stage in this process: with `training` (sft, distill), `measuring` (evaluate, analyse) and `probing` (probe, pair) the only place
that joins models, data, training and evaluation.

`run_stage` takes the stage's lock, does the work in its folder in the store, and puts the manifest in place last. What an
earlier, killed attempt left there is resumed (docs/interruptions.md).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tadistill.config import Evaluate
from tadistill.config.sampling import DatasetSampler
from tadistill.data.batch import references
from tadistill.disk import read_json, write_json, write_rows
from tadistill.errors import Interrupted, StageFailed
from tadistill.evaluation.run import EvalSet, generate
from tadistill.evaluation.scoring import Subject, entropy, means
from tadistill.models.loading import save_model
from tadistill.models.tempering import matching_temperature, temper
from tadistill.plan.task import Task
from tadistill.rollout.signals import record
from tadistill.stages.context import MODEL, RESPONSES, SIGNAL, Context, Progress, make_subject, stop_if_asked, teacher_dtype
from tadistill.stages.measuring import analyse, evaluate
from tadistill.stages.probing import pair, probe
from tadistill.stages.ranks import Ranks
from tadistill.stages.training import train
from tadistill.store import Store

_GENERATION_BATCH = 64
_WAIT, _GO, _FINISHED, _STOPPED = "wait", "go", "finished", "stopped while another process ran the stage"


def run_stage(task: Task, *, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Run a stage unless the store has it (another process may have finished it meanwhile).

    With `task.resources.processes` > 1 every rank calls this with the same task, and finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT in its environment (`launch` does that on one machine). WORLD_SIZE must be `processes`; every rank sees all GPUs of its
    machine and takes that of its LOCAL_RANK; all machines see the store and the models. Rank 0 alone takes the lock, writes and reports.
    `stop` may be true on any rank; then all save and raise Interrupted. An error on one rank is raised there alone, and whoever started
    the ranks ends the others (`srun --kill-on-bad-exit=1`). A process may run several stages, as long as its ranks run the same ones.

    Raises:
        StageFailed: a stage that this one stands on is not finished; nothing was written.
        Interrupted: `stop` said so; what was done is kept.
    """
    store, ranks = Store(Path(task.store)), Ranks.join(task.resources.processes)
    if ranks.rank:
        _follow(task, store, ranks, stop)
        return
    if store.finished(task.key):
        ranks.agree(_FINISHED)
        return
    _check_parents(task, store)

    def waiting() -> None:
        progress(0, task.steps or 1, "another process is at it")
        if stop():
            ranks.agree(_STOPPED)
            raise Interrupted(_STOPPED)
        ranks.agree(_WAIT)

    lock = store.acquire(task.key, waiting)
    try:
        if store.finished(task.key):
            ranks.agree(_FINISHED)
            return
        folder = store.begin(task.key, {"kind": task.kind, "label": task.label, "parents": task.parents, "spec": task.spec})
        ranks.agree(_GO)
        start = time.monotonic()
        context = Context(task, store, folder, progress, alarm, stop)
        facts = _WORK[task.kind](context)
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


def _check_parents(task: Task, store: Store) -> None:
    """A scheduler may start a job whose parent failed, and people delete folders."""
    for role, key in task.parents.items():
        if not store.finished(key):
            raise StageFailed(
                f"{task.label} ({task.key}) needs {store.label(key)} as its {role}, which is not finished in the store at {store.root} (it "
                "failed, or files of it were deleted); run the recipe again, which redoes what is missing"
            )


def _follow(task: Task, store: Store, ranks: Ranks, stop: Callable[[], bool]) -> None:
    """A rank other than 0: its share of the work, once rank 0 has the lock and there is something to do."""
    while (word := ranks.agree()) == _WAIT:  # once a second, since a collective operation does not wait for hours
        pass
    if word == _STOPPED:
        raise Interrupted(_STOPPED)
    if word == _GO:
        _WORK[task.kind](Context(task, store, store.folder(task.key), lambda done, total, text: None, lambda text: None, stop))


# --- signal -------------------------------------------------------------------------------------------------------------


def _signal(context: Context) -> dict[str, Any]:
    """The teacher's hidden states or top-k tokens on the training set, in parts that survive a kill."""
    spec = context.spec
    config = DatasetSampler.model_validate({"signal": spec["signal"]}).signal
    assert config is not None
    model, tokenizer = context.teacher(teacher_dtype(spec["precision"]))
    sequences = references(context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer).encoded)
    subject = make_subject(model, tokenizer)

    def tick(done: int) -> None:
        context.progress(done, len(sequences), "sequences")
        stop_if_asked(context)

    record(model, sequences, config, context.folder / SIGNAL, vocab=subject.vocab, pad=subject.pad, tick=tick)
    return {"sequences": len(sequences)}


# --- generate -----------------------------------------------------------------------------------------------------------


def _generate(context: Context) -> dict[str, Any]:
    """The teacher's answer to every training prompt, in parts that survive a kill."""
    spec = context.spec
    model, tokenizer = context.teacher()
    subject = make_subject(model, tokenizer)
    train = context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer)
    decoding = Evaluate(seeds=(spec["seed"],), batch=_GENERATION_BATCH, **spec["sampler"])
    parts = context.folder / "parts"
    rows, answered, ends = [], 0, 0

    def tick(count: int) -> None:
        nonlocal answered
        answered += count
        if answered < ends:  # inside a part, which may take longer than the time that a signal leaves
            stop_if_asked(context)

    for start in range(0, len(train.encoded), 8 * _GENERATION_BATCH):
        part = parts / f"{start}.json"
        if not part.is_file():
            stop_if_asked(context)
            chunk = EvalSet(train.name, train.examples, train.encoded[start : start + 8 * _GENERATION_BATCH])
            ends = answered + len(chunk.encoded)
            answers = generate(subject, chunk, decoding, spec["seed"], tick)
            write_json(part, [{"prompt": list(a.prompt), "response": list(a.response)} for a in answers])
        rows += read_json(part)
        context.progress(len(rows), len(train.encoded), "answers")
    write_rows(context.folder / RESPONSES, rows)
    return {"answers": len(rows)}


# --- temper -------------------------------------------------------------------------------------------------------------


def _temper(context: Context) -> dict[str, Any]:
    """The teacher with the temperature at which its mean entropy on dev responses is another model's."""
    spec = context.spec
    teacher, tokenizer = context.model(spec["teacher"])
    like, _ = context.frozen(spec["like"])
    subject = make_subject(teacher.eval(), tokenizer, like)
    sequences = references(context.split("dev", spec["dev"]["ref"], spec["dev_limit"], tokenizer).encoded)

    def mean_entropy(of: Subject, tau: float) -> float:
        stop_if_asked(context)
        return float(means(entropy(of, sequences, batch=spec["batch"], temperature=tau)).mean())

    wanted = mean_entropy(replace(subject, model=like), 1.0)
    tau = matching_temperature(lambda tau: mean_entropy(subject, tau), wanted)
    save_model(temper(teacher, tau), tokenizer, context.folder / MODEL)
    return {"tau": tau, "entropy": wanted}


_WORK = {
    "sft": train,
    "distill": train,
    "temper": _temper,
    "generate": _generate,
    "signal": _signal,
    "evaluate": evaluate,
    "analyse": analyse,
    "probe": probe,
    "pair": pair,
}
