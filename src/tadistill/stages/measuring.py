"""The stages that measure models. `evaluate` and `analyse` use the test sets. `probe` and `pair` use dev prompts, before any distillation.

`evaluate` and `analyse` save finished parts in the folder parts/, so that they can continue after an interruption. `probe` and `pair` write
one value per prompt and metric, so that standard errors can be computed from the file.
"""

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tadistill.config import Evaluate
from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import EvalSet, as_one
from tadistill.data.encoding_rules import Rules
from tadistill.disk import read_json, read_jsonl, write_json, write_rows
from tadistill.errors import check_unchanged
from tadistill.evaluation.model_pairs import analyse as analyse_set
from tadistill.evaluation.model_pairs import cross_read, pair_measures
from tadistill.evaluation.run import generate_answers, native, score
from tadistill.evaluation.token_scores import Subject, means, unknown_text
from tadistill.models.teachers import Teacher, teacher_of
from tadistill.plan.inputs import Encoding, Handle, Output, is_served, task_files
from tadistill.plan.kinds import AnalyseSpec, EvaluateSpec, PairSpec, ProbeSpec
from tadistill.rollout.engine import Engine
from tadistill.stages.context import ANSWERS, Context, Done, stop_if_asked
from tadistill.text import counted, form

if TYPE_CHECKING:
    from tadistill.evaluation.lm_eval_tasks import TaskResult


def evaluate(context: Context[EvaluateSpec]) -> dict[str, Any]:
    """Sample a model's answers to all test sets. Write the answers and their scores."""
    spec, settings = context.spec, context.spec.decoding
    model, tokenizer = context.model(spec.model, context.dtype)
    subject = context.subject(model.eval(), tokenizer)
    sets = [context.split(split, tokenizer) for split in spec.sets]
    answers = _answers(context, context.engine(native(subject, settings)), sets, settings)
    own = {planned.function.partition(":")[2]: context.own(planned) for planned in spec.own}
    rules = Rules.of(spec.data, "test", bos=spec.data.bos) if spec.per_byte else None
    scores, corpus, predictions = {}, {}, []
    total = sum(len(of_seed) for of_set in answers.values() for of_seed in of_set.values())
    for data in sets:
        stop_if_asked(context)
        if spec.per_byte and (unknown := unknown_text(data, tokenizer)):
            context.alarm(unknown)
        context.progress(total, total, f"scoring the answers to {data.name}")
        found = score(subject, data, settings, answers[data.name], own, read_references=spec.references, per_byte=rules)
        scores[data.name], corpus[data.name] = found.scores, found.corpus | {"rows": [e.row for e in data.encoded]}
        predictions += found.records
    for name, found in _tasks(context, subject, settings).items():
        scores[name] = found.scores
        corpus[name] = {"numbers": {}, "reference_length": [0] * len(found.rows), "rows": found.rows, "unseen": 0.0, "task": True}
        predictions += found.records
    write_rows(context.folder / "predictions.jsonl", predictions)
    rows = [
        {"set": data.name, "index": e.row, "seed": seed, "tokens": a.response}
        for data in sets
        for seed, of_seed in answers[data.name].items()
        for e, a in zip(data.encoded, of_seed, strict=True)
    ]
    write_rows(context.folder / ANSWERS, rows)
    write_json(context.folder / "scores.json", scores)
    write_json(context.folder / "corpus.json", corpus)
    return {}


def _tasks(context: Context[EvaluateSpec], subject: Subject, settings: Evaluate) -> "dict[str, TaskResult]":
    planned, found = context.spec.tasks, dict[str, "TaskResult"]()
    if planned is None:
        return found
    from tadistill.evaluation import lm_eval_tasks

    context.progress(0, 1, "loading tasks of lm-eval")
    tasks = lm_eval_tasks.load_tasks(planned.names, context.task.data_root)
    for (file, now), before in zip(task_files(planned.names), planned.files, strict=True):
        check_unchanged(file, before, now)
    for i, (name, task) in enumerate(tasks.items()):
        part = context.folder / "parts" / f"task-{i}.json"
        if not part.is_file():
            stop_if_asked(context)
            # the progress of a stage with test sets is that of its answers
            context.progress(*((0, 1) if context.spec.sets else (i, len(tasks))), f"running {name} of lm-eval ({i + 1} of {len(tasks)})")
            chat = context.spec.data.template == "chat"
            limits = {"fewshot": planned.fewshot, "limit": planned.limit, "batch": settings.batch, "chat": chat}
            result = lm_eval_tasks.read_samples(name, lm_eval_tasks.run_task(name, task, subject, **limits), settings.seeds[0])
            write_json(part, asdict(result))
        found[name] = lm_eval_tasks.TaskResult(**read_json(part))
        if found[name].left_out:
            context.alarm(f"{name}: {', '.join(found[name].left_out)} of lm-eval is left out, because it has no value from 0 to 1 per item")
    return found


def _answers(context: Context, engine: Engine, sets: list[EvalSet], settings: Evaluate) -> dict[str, dict[int, list[Sequence]]]:
    done = Done(context, sum(len(s.encoded) for s in sets) * len(settings.seeds), "answers")
    found: dict[str, dict[int, list[Sequence]]] = {}
    for data in sets:
        for seed in settings.seeds:
            part = context.folder / "parts" / f"{data.name}-{seed}.json"
            work = partial(generate_answers, engine, data, seed, done)
            done.save(part, len(data.encoded), lambda work=work: [a.response for a in work()])
            pairs = zip(data.encoded, read_json(part), strict=True)
            found.setdefault(data.name, {})[seed] = [Sequence(e.prompt, tuple(tokens)) for e, tokens in pairs]
    return found


def analyse(context: Context[AnalyseSpec]) -> dict[str, Any]:
    """Compare a model with the original teacher. Write the divergence, the error that each step of the path adds, and the exposure bias."""
    spec = context.spec
    if spec.of_teacher is not None:
        return _read_each_other(context, spec.of_teacher)
    model, tokenizer = context.model(spec.model, context.dtype)
    teacher, _ = context.teacher(spec.teacher)
    others = [teacher, *(_assistant(context, handle) for handle in spec.assistants)]
    subject = context.subject(model.eval(), tokenizer, *others)
    sets = [context.split(split, tokenizer) for split in spec.sets]
    own = _read_answers(context, spec.answers, sets)
    given = _read_answers(context, spec.teacher_answers, sets) if spec.teacher_answers else {}
    of_teacher, notes = {}, []
    for data in sets:
        of_teacher[data.name], note = _known(given.get(data.name, {}), spec.tokens or subject.vocab)
        notes += [f"{data.name}: {note}"] if note else []
        own[data.name], note = _readable(own[data.name], subject.vocab)
        notes += [f"{data.name}: {note}"] if note else []
    for note in notes:
        context.alarm(note)
    scores, exposure = {}, {}
    read = {data.name: len(data.encoded) * (1 + len(own[data.name])) + sum(map(len, of_teacher[data.name].values())) for data in sets}
    done = Done(context, sum(read.values()), "sequences")
    for data in sets:
        part = context.folder / "parts" / f"{data.name}.json"
        work = partial(analyse_set, subject, data, own[data.name], of_teacher[data.name], others=others, batch=spec.batch, tick=done)
        done.save(part, read[data.name], work)
        scores[data.name], exposure[data.name] = read_json(part)
    write_json(context.folder / "scores.json", scores)
    write_json(context.folder / "exposure.json", exposure)
    return {"notes": notes} if notes else {}


def _readable(answers: dict[int, list[Sequence]], vocab: int) -> tuple[dict[int, list[Sequence]], str]:
    # the model's own answers, each up to its first token that another compared model may not have, and a sentence about answers that were
    # cut; the distributions before this token are compared, but not the token, so the last id 0 only takes its place
    cut, shorter, which = _up_to(answers, vocab, (0,))
    contain = form(shorter, "contains", "contain")
    return cut, f"{which} {contain} a token that a bigger model does not have; the models are compared up to this token" if shorter else ""


def _known(answers: dict[int, list[Sequence]], vocab: int) -> tuple[dict[int, list[Sequence]], str]:
    # the teacher's answers, each up to its first token that the student does not have, and a sentence about answers that were cut; a
    # prediction needs only the tokens before it, so the rest of an answer is comparable
    cut, shorter, which = _up_to(answers, vocab)
    found = {seed: kept for seed, of_seed in cut.items() if (kept := [s for s in of_seed if s.response])}
    what = f"{which} of the teacher {form(shorter, 'contains', 'contain')} a token that the student does not have"
    return found, f"{what}; the exposure bias compares {form(shorter, 'it', 'them')} up to this token" if shorter else ""


def _up_to(answers: dict[int, list[Sequence]], vocab: int, last: tuple[int, ...] = ()) -> tuple[dict[int, list[Sequence]], int, str]:
    # answers up to their first token that is not below `vocab`, with `last` in its place; the number of answers that are now shorter, and
    # this number for a sentence, as in "1 of 3 answers"
    def start(s: Sequence) -> Sequence:
        kept = tuple(takewhile(lambda token: token < vocab, s.response))
        return s if len(kept) == len(s.response) else replace(s, response=(*kept, *last))

    cut = {seed: [start(s) for s in of_seed] for seed, of_seed in answers.items()}
    pairs = [pair for seed, of_seed in answers.items() for pair in zip(of_seed, cut[seed], strict=True)]
    shorter = sum(len(after.response) < len(before.response) for before, after in pairs)
    return cut, shorter, f"{shorter} of {counted(len(pairs), 'answer')}"


class _Side(NamedTuple):
    # one of two models with different tokenizers, its rules of encoding, its encoded test sets, and its answers
    subject: Subject
    rules: Rules
    sets: list[EvalSet]
    answers: dict[str, dict[int, list[Sequence]]]


def _read_each_other(context: Context[AnalyseSpec], of_teacher: Encoding) -> dict[str, Any]:
    spec = context.spec
    assert spec.teacher_answers is not None
    student = _side(context, spec.model, spec.data, spec.answers)
    teacher = _side(context, spec.teacher, of_teacher, spec.teacher_answers)
    ways = (teacher, student, "teacher_text", "forward_bits"), (student, teacher, "own_text", "reverse_bits")
    done = Done(context, sum(len(of_set) for writer, *_ in ways for of_set in writer.answers.values()), "sets of answers")
    scores, notes = dict[str, dict[str, list]](), Counter[str]()
    for mine, theirs in zip(student.sets, teacher.sets, strict=True):
        rows, columns = {e.row for e in mine.encoded}, dict[str, list[np.ndarray]]()
        if missing := rows - {e.row for e in theirs.encoded}:
            context.alarm(
                f"{mine.name}: {counted(len(missing), 'prompt is', 'prompts are')} too long for the teacher, but not for the student, so "
                "student and teacher are not compared on this set; raise data.max_prompt"
            )
            scores[mine.name] = {}
            continue
        for writer, reader, text, extra in ways:
            of_writer, of_reader = (mine, theirs) if writer is student else (theirs, mine)
            for of_seed in writer.answers[mine.name].values():
                answers = {e.row: answer for e, answer in zip(of_writer.encoded, of_seed, strict=True) if e.row in rows}
                found = cross_read(writer.subject, reader.subject, of_reader, reader.rules, answers, batch=spec.batch)
                columns.setdefault(text, []).append(found.reader)
                columns.setdefault(extra, []).append(found.reader - found.writer)
                notes.update(early=found.early, unknown=found.unknown)
                done(1)
        scores[mine.name] = {name: np.stack(column, axis=1).tolist() for name, column in columns.items()}
    write_json(context.folder / "scores.json", scores)
    write_json(context.folder / "exposure.json", dict.fromkeys(scores))
    if notes["early"]:
        context.alarm(
            f"{counted(notes['early'], 'answer has', 'answers have')} something other than text before the end (a special token, or bytes "
            "that are not UTF-8); only the text before it is compared, and not how the answer goes on or ends"
        )
    if notes["unknown"]:
        context.alarm(
            f"{counted(notes['unknown'], 'token of the answers is', 'tokens of the answers are')} unknown to the model that reads them, so "
            "the answers' bits per byte are too low"
        )
    return dict(notes)


def _side(context: Context[AnalyseSpec], handle: Handle, data: Encoding, answers: Output) -> _Side:
    model, tokenizer = context.model(handle, context.dtype)
    subject = context.subject(model.eval(), tokenizer, data=data)
    sets = [context.split(split, tokenizer, data=data) for split in context.spec.sets]
    return _Side(subject, Rules.of(data, "test", bos=data.bos), sets, _read_answers(context, answers, sets))


def _assistant(context: Context[AnalyseSpec], handle: Handle) -> Teacher:
    return context.teacher(handle)[0] if is_served(handle) else teacher_of(context.model(handle, context.dtype)[0].eval())


def _read_answers(context: Context, answers: Output, sets: list[EvalSet]) -> dict[str, dict[int, list[Sequence]]]:
    found: dict[str, dict[int, list[Sequence]]] = {}
    prompts = {data.name: {e.row: e.prompt for e in data.encoded} for data in sets}
    for row in read_jsonl(context.store.folder(answers.stage) / ANSWERS):
        of_seed = found.setdefault(row["set"], {}).setdefault(row["seed"], [])
        of_seed.append(Sequence(prompts[row["set"]][row["index"]], tuple(row["tokens"])))
    return found


# --- before any distillation -------------------------------------------------------------------------------------------


def probe(context: Context[ProbeSpec]) -> dict[str, Any]:
    """Sample a model's answers to the dev prompts. Write the answers and their scores."""
    spec, settings = context.spec, context.spec.decoding
    (seed,) = settings.seeds
    model, tokenizer = context.model(spec.model, context.dtype)
    subject = context.subject(model.eval(), tokenizer)
    dev = _dev(context, tokenizer)
    done = Done(context, len(dev.encoded), "answers")
    done.part(len(dev.encoded))
    answers = generate_answers(context.engine(native(subject, settings)), dev, seed, done)
    found = score(subject, dev, settings, {seed: answers})
    write_rows(context.folder / ANSWERS, [{"index": e.row, "tokens": a.response} for e, a in zip(dev.encoded, answers, strict=True)])
    write_json(context.folder / "scores.json", {name: [row[0] for row in rows] for name, rows in found.scores.items()})
    return {"prompts": len(dev.encoded)}


def _dev(context: Context[ProbeSpec] | Context[PairSpec], tokenizer: PreTrainedTokenizerBase) -> EvalSet:
    return as_one([data for _, data in context.dev(context.spec.dev, tokenizer).values()])


def pair(context: Context[PairSpec]) -> dict[str, Any]:
    """Compare a student with a bigger model on dev prompts. Write metrics on the student's answers and on the references."""
    spec = context.spec
    model, tokenizer = context.model(spec.model, context.dtype)
    teacher, _ = context.teacher(spec.teacher)
    subject = context.subject(model.eval(), tokenizer, teacher)
    dev = _dev(context, tokenizer)
    tokens = {row["index"]: tuple(row["tokens"]) for row in read_jsonl(context.store.folder(spec.answers.stage) / ANSWERS)}
    answers, note = _readable({0: [Sequence(e.prompt, tokens[e.row]) for e in dev.encoded]}, subject.vocab)
    if note:
        context.alarm(note)
    stop_if_asked(context)
    found = pair_measures(subject, teacher, own=answers[0], references=references(dev.encoded), k=spec.k, batch=spec.batch)
    write_json(context.folder / "scores.json", {name: means(values).tolist() for name, values in found.items()})
    return {"prompts": len(dev.encoded)}
