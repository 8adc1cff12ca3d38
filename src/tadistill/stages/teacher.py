"""The stages that prepare a teacher.

They sample its answers (`generate`), ask an API for them (`ask`), write them with the tokenizer of another model (`retokenise`), record its
outputs (`signal`) or change its temperature (`temper`).
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tadistill.config import Evaluate
from tadistill.constants import GENERATION_BATCH
from tadistill.data.batch import references, responses
from tadistill.data.encoding import EvalSet
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.retokenised_answers import TEXTS, Answer, Retokenised, read_texts, retokenised, said
from tadistill.data.token_bytes import token_bytes
from tadistill.data.training_sets import joined
from tadistill.disk import read_json, stream_jsonl, write_rows
from tadistill.errors import DataError
from tadistill.evaluation.run import generate_answers, native
from tadistill.evaluation.token_scores import Subject, entropy, means
from tadistill.models.chat_api_replies import open_cache
from tadistill.models.loading import save_model
from tadistill.models.modify import matching_temperature, temper_head
from tadistill.models.teachers import teacher_of
from tadistill.models.tokens import shared_vocabulary
from tadistill.plan.inputs import TokenizerFiles
from tadistill.plan.kinds import AskSpec, GenerateSpec, RetokeniseSpec, SignalSpec, TemperSpec
from tadistill.plan.remote import wanted_of
from tadistill.rollout.api_teacher import Asking, replies_file
from tadistill.rollout.recorded_signals import complete, of_teacher, record
from tadistill.stages.context import MODEL, RESPONSES, Context, Done, stop_if_asked
from tadistill.store import SIGNAL
from tadistill.text import counted, form

_POLL = 0.2  # seconds between two looks at the files of other processes


def generate(context: Context[GenerateSpec]) -> dict[str, Any]:
    """Write a model's answer to every training prompt. After an interruption, finished parts are kept."""
    spec = context.spec
    if spec.sampler.engine == "native":
        model, tokenizer = context.frozen(spec.teacher, context.dtype)
    else:  # vLLM has its own copy of the model on the device
        model, tokenizer = context.model(spec.teacher, context.dtype, torch.device("cpu"))
    subject = context.subject(model, tokenizer)
    sets = [context.split(split, tokenizer, contexts=True) for split in spec.sets]
    rows, examples = joined([each.encoded for each in sets]), joined([each.examples for each in sets])
    decoding = Evaluate(seeds=(spec.seed,), batch=GENERATION_BATCH, **spec.sampler.model_dump())
    engine = context.engine(native(subject, decoding, adapts=True))
    files, done = list[Path](), Done(context, len(rows), "answers")

    def answered(start: int, end: int) -> list[dict[str, Any]]:
        asked = rows[start:end]
        read = [replace(e, prompt=e.teacher_prompt or e.prompt) for e in asked] if spec.as_teacher else asked
        answers = generate_answers(engine, EvalSet(spec.train.ref.name, examples, read), spec.seed, done)
        return [{"prompt": list(e.prompt), "response": list(a.response)} for e, a in zip(asked, answers, strict=True)]

    for start in range(0, len(rows), size := 8 * GENERATION_BATCH):
        files.append(context.folder / "parts" / f"{start}.json")
        end = min(start + size, len(rows))
        done.save(files[-1], end - start, partial(answered, start, end))
    write_rows(context.folder / RESPONSES, (row for file in files for row in read_json(file)))
    return {"answers": len(rows)}


def ask(context: Context[AskSpec]) -> dict[str, Any]:
    """Ask a model behind an API for the answer to every training prompt. After an interruption, all answers so far are kept.

    All answers of a model are in one file of the store, `api/MODEL-XXXXXXXX.jsonl`. Every study of the runs directory reads it, and one
    process at a time adds to it. So a request that was answered once is never sent again.

    The result has the numbers of tokens that the API reports. They are None if the API does not report them for all answers.

    Raises:
        ServerFailed: the API stopped answering, or some rows got no usable answer.
    """
    spec = context.spec
    api = spec.teacher.api
    assert api is not None
    wanted = wanted_of(spec, context.examples(spec.train))

    def waiting() -> None:
        context.progress(0, len(wanted), f"another process asks {api.model}")
        stop_if_asked(context)

    def look(done: int) -> None:
        context.progress(done, len(wanted), "answers")
        stop_if_asked(context)

    with open_cache(replies_file(context.store.root, api.model), waiting) as cache:
        replies = Asking(api, cache, f"`{api.model}`").all(wanted, look)
    answers = [Answer(row, reply.text, reply.finish == "stop") for row, reply in enumerate(replies)]
    write_rows(context.folder / TEXTS, map(asdict, answers))
    reported = all(reply.tokens_out for reply in replies)
    tokens = {"tokens_in": sum(r.tokens_in for r in replies), "tokens_out": sum(r.tokens_out for r in replies)}
    models = dict(Counter(reply.model for reply in replies if reply.model))
    if len(models) > 1:
        context.alarm(f"the answers come from {len(models)} versions of `{api.model}`: {', '.join(models)}")
    found: dict[str, Any] = {"answers": len(answers), "cut": sum(not answer.ended for answer in answers)}
    return found | (tokens if reported else dict.fromkeys(tokens)) | {"models": models}


def retokenise(context: Context[RetokeniseSpec]) -> dict[str, Any]:
    """Convert a model's answers to token ids of a student with another tokenizer.

    The answers pass from one tokenizer to the other as text (`data.retokenised_answers`). The new ids are saved as by a `generate` stage.
    """
    spec, file, early = context.spec, context.folder / TEXTS, Counter[str]()
    if spec.writer is None:
        file = context.store.folder(spec.answers.stage) / TEXTS
    else:
        early = _write_texts(context, spec.writer, file)
    tokenizer, name = context.tokenizer(spec.tokenizer), f"data set `{spec.train.ref.name}`"
    rules = Rules.of(spec.data, spec.train.role, bos=spec.data.bos)
    last = Retokenised((), Counts(0), 0, 0)

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal last
        for last in retokenised(context.examples(spec.train), read_texts(file), tokenizer, rules, name=name):
            stop_if_asked(context)
            yield from ({"row": e.row, "prompt": list(e.prompt), "response": list(e.response)} for e in last.encoded)

    write_rows(context.folder / RESPONSES, rows())
    context.counts.clear()  # the manifest gets no counts for the tokenizer that wrote the answers
    notes = [*_losses(early, last)]
    for sentence in notes:
        context.alarm(sentence)
    return {"answers": last.counts.used, "notes": notes}


def _write_texts(context: Context[RetokeniseSpec], writer: TokenizerFiles, file: Path) -> Counter[str]:
    spec, tokenizer, early = context.spec, context.tokenizer(writer), Counter[str]()
    assert spec.asked is not None
    asked, read = context.split(spec.train, tokenizer, contexts=True, data=spec.asked), token_bytes(tokenizer, spec.asked.ends or None)
    answers = stream_jsonl(context.store.folder(spec.answers.stage) / RESPONSES)

    def texts() -> Iterator[Mapping[str, Any]]:
        for encoded, (_, answer) in zip(asked.encoded, answers, strict=True):
            found, why, *_ = said(encoded.row, answer["response"], read)
            if why:
                early[why] += 1
            yield asdict(found)

    write_rows(file, texts())
    return early


def _losses(early: Counter[str], last: Retokenised) -> Iterator[str]:
    rows = last.counts.rows
    causes = {"bytes": "bytes that are not UTF-8", "token": "a special token that does not end an answer"}
    for why, count in early.items():
        yield (
            f"of {counted(rows, 'answer')}, {counted(count, 'stops', 'stop')} before {causes[why]}, and {form(count, 'has', 'have')} no "
            "end token"
        )
    if text := last.counts.text.replace("a reference", "an answer").replace("an empty prompt", "an empty prompt or answer"):
        yield f"{text} with the student's tokenizer"
    if 2 * last.unknown > last.tokens or not last.counts.used:
        if not last.counts.used:
            raise DataError("no answer of the teacher is short enough in the student's tokens; raise data.max_length")
        raise DataError(
            f"the student's tokenizer cannot read the teacher's answers: {last.unknown} of {last.tokens} tokens are unknown to it; choose "
            "a student whose tokenizer reads this text, or train the teacher longer if its answers are not text"
        )
    if last.unknown:
        yield f"{last.unknown} of {last.tokens} tokens of the answers are unknown to the student's tokenizer"


def signal(context: Context[SignalSpec]) -> dict[str, Any]:
    """Record the teacher's outputs on the training set, or on a model's answers. After an interruption, finished parts are kept."""
    spec = context.spec
    teacher, tokenizer = context.teacher(spec.teacher)
    reads = spec.sets if spec.data.context or not spec.responses else ()
    encoded = joined([context.split(split, tokenizer, contexts=True).encoded for split in reads]) if reads else ()
    sequences = responses(context.store.artifact(spec.responses.stage, RESPONSES), encoded) if spec.responses else references(encoded)
    vocab, pad = shared_vocabulary(tokenizer, widths=(teacher.width, spec.tokens or teacher.width)), tokenizer.eos_token_id
    assert isinstance(pad, int)
    teacher.compare(vocab)

    def tick(done: int) -> None:
        context.progress(done, len(sequences), "sequences")
        stop_if_asked(context)

    folder, share = context.folder / SIGNAL, (int(os.environ.get("RANK", 0)), context.task.resources.processes)
    record(of_teacher(teacher, pad), sequences, spec.signal, folder, vocab=vocab, tick=tick, share=share)
    while not complete(folder, len(sequences)):  # the other processes write their own files
        stop_if_asked(context)
        time.sleep(_POLL)
    return {"sequences": len(sequences)}


def temper(context: Context[TemperSpec]) -> dict[str, Any]:
    """Save the teacher with another temperature. At this temperature, the teacher's mean entropy on the dev responses equals the mean
    entropy of the model `spec.like` at temperature 1."""
    spec = context.spec
    teacher, tokenizer = context.model(spec.teacher)
    like, _ = context.frozen(spec.like)
    subject = context.subject(teacher.eval(), tokenizer, teacher_of(like))
    sets = [(share, references(data.encoded)) for share, data in context.dev(spec.dev, tokenizer).values()]

    def mean_entropy(of: Subject, tau: float) -> float:
        stop_if_asked(context)
        return sum(share * float(means(entropy(of, texts, batch=spec.batch, temperature=tau)).mean()) for share, texts in sets)

    wanted = mean_entropy(replace(subject, model=like), 1.0)
    tau = matching_temperature(lambda tau: mean_entropy(subject, tau), wanted)
    temper_head(teacher, tau)
    save_model(teacher, tokenizer, context.folder / MODEL, ends=subject.eos)
    return {"tau": tau, "entropy": wanted}
