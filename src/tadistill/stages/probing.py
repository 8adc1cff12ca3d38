"""The stages before a distillation: probe (a model by itself on dev prompts) and pair (a learner beside a bigger model).

They read dev prompts only; what is left of each is one number per prompt and measure, so that standard errors and paired differences can
be taken later.
"""

from typing import Any

from tadistill.config import Evaluate
from tadistill.data.batch import Sequence, references
from tadistill.disk import read_jsonl, write_json, write_rows
from tadistill.evaluation.pairing import beside
from tadistill.evaluation.run import EvalSet, generate, score
from tadistill.evaluation.scoring import means
from tadistill.stages.context import ANSWERS, Context, make_subject, stop_if_asked


def probe(context: Context) -> dict[str, Any]:
    """A model's own answers to the dev prompts, and what they and the references score."""
    spec = context.spec
    settings = Evaluate.model_validate(spec["decoding"])
    (seed,) = settings.seeds
    model, tokenizer = context.model(spec["model"])
    subject = make_subject(model.eval(), tokenizer)
    dev = context.split("dev", spec["dev"]["ref"], spec["dev_limit"], tokenizer)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        context.progress(done, len(dev.encoded), "answers")
        if done < len(dev.encoded):
            stop_if_asked(context)

    answers = generate(subject, dev, settings, seed, tick)
    found = score(subject, dev, settings, {seed: answers})
    write_rows(context.folder / ANSWERS, [{"index": e.row, "tokens": a.response} for e, a in zip(dev.encoded, answers, strict=True)])
    write_json(context.folder / "scores.json", {name: [row[0] for row in rows] for name, rows in found.scores.items()})
    return {"prompts": len(dev.encoded)}


def pair(context: Context) -> dict[str, Any]:
    """A learner beside a bigger model, on the learner's own answers and on the references."""
    spec = context.spec
    model, tokenizer = context.model(spec["model"])
    teacher, _ = context.teacher()
    subject = make_subject(model.eval(), tokenizer, teacher)
    dev = context.split("dev", spec["dev"]["ref"], spec["dev_limit"], tokenizer)
    own = _answers(context, spec["answers"]["stage"], dev)
    stop_if_asked(context)
    found = beside(subject, teacher, own=own, references=references(dev.encoded), k=spec["k"], batch=spec["batch"])
    write_json(context.folder / "scores.json", {name: means(values).tolist() for name, values in found.items()})
    return {"prompts": len(dev.encoded)}


def _answers(context: Context, stage: str, dev: EvalSet) -> list[Sequence]:
    """The learner's answers of its probe, in the order of the prompts."""
    tokens = {row["index"]: tuple(row["tokens"]) for row in read_jsonl(context.store.folder(stage) / ANSWERS)}
    return [Sequence(e.prompt, tokens[e.row]) for e in dev.encoded]
