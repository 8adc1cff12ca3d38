"""The stages that measure: evaluate (a model by itself) and analyse (beside the original teacher and its path's assistants).

What an interrupted stage has finished, the answers of a set under a decoding seed or the analysis of a set, is kept in parts/.
"""

from typing import Any

from tadistill.config import Evaluate
from tadistill.data.batch import Sequence
from tadistill.disk import read_json, read_jsonl, write_json, write_rows
from tadistill.evaluation.analysis import analyse as analyse_set
from tadistill.evaluation.run import EvalSet, generate, score
from tadistill.evaluation.scoring import Subject
from tadistill.stages.context import ANSWERS, Context, make_subject, stop_if_asked


def evaluate(context: Context) -> dict[str, Any]:
    """Answers to every test set under every decoding seed, and what they and the references score."""
    spec = context.spec
    settings = Evaluate.model_validate(spec["decoding"])
    model, tokenizer = context.model(spec["model"])
    subject = make_subject(model.eval(), tokenizer)
    sets = context.test_sets(tokenizer)
    answers = _answers(context, subject, sets, settings)
    scores, corpus, predictions = {}, {}, []
    for data in sets:
        stop_if_asked(context)
        found = score(subject, data, settings, answers[data.name], read_references=spec["references"])
        scores[data.name], corpus[data.name] = found.scores, found.corpus
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
    return {"left_out": {s.name: len(s.examples) - len(s.encoded) for s in sets}}


def _answers(context: Context, subject: Subject, sets: list[EvalSet], settings: Evaluate) -> dict[str, dict[int, list[Sequence]]]:
    """Set -> decoding seed -> answers."""
    total, done, ends = sum(len(s.encoded) for s in sets) * len(settings.seeds), 0, 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        context.progress(done, total, "answers")
        if done < ends:  # inside a part, which may take longer than the time that a signal leaves
            stop_if_asked(context)

    found: dict[str, dict[int, list[Sequence]]] = {}
    for data in sets:
        for seed in settings.seeds:
            part = context.folder / "parts" / f"{data.name}-{seed}.json"
            ends += len(data.encoded)
            if part.is_file():
                tick(len(data.encoded))
            else:
                stop_if_asked(context)
                write_json(part, [a.response for a in generate(subject, data, settings, seed, tick)])
            responses = read_json(part)
            found.setdefault(data.name, {})[seed] = [
                Sequence(e.prompt, tuple(tokens)) for e, tokens in zip(data.encoded, responses, strict=True)
            ]
    return found


def analyse(context: Context) -> dict[str, Any]:
    """Divergence from the original teacher, the error budget of the path, exposure bias."""
    spec = context.spec
    model, tokenizer = context.model(spec["model"])
    teacher, _ = context.teacher()
    assistants = [context.model(handle)[0].eval() for handle in spec["assistants"]]
    subject = make_subject(model.eval(), tokenizer, teacher, *assistants)
    sets = context.test_sets(tokenizer)
    own, of_teacher = (_read_answers(context, spec[role]["stage"], sets) for role in ("answers", "teacher_answers"))
    scores, exposure = {}, {}
    for done, data in enumerate(sets):
        part = context.folder / "parts" / f"{data.name}.json"
        if not part.is_file():
            stop_if_asked(context)
            answers = own[data.name], of_teacher[data.name]
            write_json(part, analyse_set(subject, data, *answers, teacher=teacher, assistants=assistants, batch=spec["batch"]))
        scores[data.name], exposure[data.name] = read_json(part)
        context.progress(done + 1, len(sets), "sets")
    write_json(context.folder / "scores.json", scores)
    write_json(context.folder / "exposure.json", exposure)
    return {}


def _read_answers(context: Context, stage: str, sets: list[EvalSet]) -> dict[str, dict[int, list[Sequence]]]:
    """The answers of an evaluate stage, in the order of the sets' prompts."""
    found: dict[str, dict[int, list[Sequence]]] = {}
    prompts = {data.name: {e.row: e.prompt for e in data.encoded} for data in sets}
    for row in read_jsonl(context.store.folder(stage) / ANSWERS):
        of_seed = found.setdefault(row["set"], {}).setdefault(row["seed"], [])
        of_seed.append(Sequence(prompts[row["set"]][row["index"]], tuple(row["tokens"])))
    return found
