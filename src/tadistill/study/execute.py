"""Run one stage in this process: the only place that joins models, data, training and evaluation (`training` has sft and distill).

`run_stage` takes the stage's lock, does the work in its folder in the store, and puts the manifest in place last. What an
earlier, killed attempt left there is resumed.
"""

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tadistill.config import Evaluate
from tadistill.config.sampling import DatasetSampler
from tadistill.evaluation.run import EvalSet, evaluate, generate, references
from tadistill.rollout.signals import record
from tadistill.study.context import RESPONSES, SIGNAL, Context, Progress, make_subject, teacher_dtype
from tadistill.study.store import Store, write_json
from tadistill.study.task import Task
from tadistill.study.training import train
from tadistill.train.loop import Interrupted

_GENERATION_BATCH = 64


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
        context = Context(task, store, folder, progress, alarm, stop)
        facts = {"sft": train, "distill": train, "generate": _generate, "signal": _signal, "evaluate": _evaluate}[task.kind](context)
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


# --- signal -------------------------------------------------------------------------------------------------------------


def _signal(context: Context) -> dict[str, Any]:
    """The teacher's hidden states or top-k tokens on the training set, in parts that survive a kill."""
    spec = context.spec
    config = DatasetSampler.model_validate({"signal": spec["signal"]}).signal
    assert config is not None
    model, tokenizer = context.teacher(teacher_dtype(spec["precision"]))
    sequences = references(context.split("train", spec["train"]["ref"], spec["train_limit"], tokenizer))
    subject = make_subject(model, tokenizer)

    def tick(done: int) -> None:
        context.progress(done, len(sequences), "sequences")
        _stop_if_asked(context)

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
    (context.folder / RESPONSES).write_text(text, encoding="utf-8")
    return {"answers": len(rows)}


# --- evaluate -----------------------------------------------------------------------------------------------------------


def _evaluate(context: Context) -> dict[str, Any]:
    """Every test set of the study; each finished set is kept if the run is killed in the next."""
    spec = context.spec
    settings = Evaluate.model_validate(spec["decoding"])
    model, tokenizer = context.model(spec["model"])
    teacher, _ = context.teacher()
    subject = make_subject(model.eval(), tokenizer, teacher)
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


def _stop_if_asked(context: Context) -> None:
    if context.stop():
        raise Interrupted("stopped between two parts")
