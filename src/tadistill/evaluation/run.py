"""Evaluate a model on one data set: sample answers with several decoding seeds, and compute text scores, loss and calibration.

`evaluate` does all of this. A study calls its two parts, `generate_answers` and `score`, one after the other, and saves the answers in
between. The training loop calls `dev_metrics`. Metrics of two models are in `tadistill.evaluation.model_pairs`.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config import Evaluate
from tadistill.data.batch import Sequence, references
from tadistill.data.encoding import EvalSet
from tadistill.data.encoding_rules import Rules
from tadistill.data.prompts import for_people, task_of
from tadistill.evaluation import text_scores, token_scores
from tadistill.evaluation.token_scores import Answers, Subject, bits_per_byte, divergences, entropy, likelihood, means, reference_sizes
from tadistill.metrics import names_in
from tadistill.models.forward import attention_for_any_shape
from tadistill.models.shapes import check_ids, check_lengths
from tadistill.models.teachers import Teacher
from tadistill.rollout.engine import Engine, Native
from tadistill.rollout.samplers import Shard
from tadistill.text import counted
from tadistill.user_code import OwnFunction


@dataclass(frozen=True)
class Evaluation:
    """The results of one model on one test set."""

    scores: dict[str, list[list[float]]]
    """Maps a metric to its values [prompt][decoding seed]. A metric that needs no sampled answers has one column."""
    corpus: dict[str, Any]
    """Results for the whole set. `numbers` contains the metrics that have one value per set. Three more keys exist if the model read the
    references: `calibration`, the bins of its predictions; `reference_length`, the number of tokens of each reference without the end
    token; and `unseen`, the share of the references' letters and digits that ROUGE-L ignores.
    """
    records: list[dict[str, Any]]
    """One record per answer, with the full prompt, its parts, the model's answer, the references and the scores."""


def evaluate(
    subject: Subject, data: EvalSet, settings: Evaluate, *, read_references: bool = True, per_byte: Rules | None = None
) -> Evaluation:
    """Sample answers to one data set, and return all metrics that need no second model. The last two arguments are those of `score`.

    Raises:
        ModelError: the model has no embedding for a token of this set. ConfigError: it has no position for the last new token.
    """
    _check_prompts(subject.model, data, settings.max_new_tokens)
    engine = native(subject, settings)
    with attention_for_any_shape():
        answers = {seed: generate_answers(engine, data, seed) for seed in settings.seeds}
        return score(subject, data, settings, answers, read_references=read_references, per_byte=per_byte)


def _check_prompts(model: Any, data: EvalSet, new: int) -> None:
    top = max((max(row.prompt, default=0) for row in data.encoded), default=0)
    check_ids(top, model.get_input_embeddings().weight.shape[0], f"`{data.name}`")
    longest = max((len(row.prompt) for row in data.encoded), default=0)
    what = f"the longest prompt of `{data.name}` ({counted(longest, 'token')}) plus max_new_tokens ({new}) needs"
    check_lengths(model.config.get_text_config().to_dict(), {what: (longest + new, "lower max_new_tokens")})


def native(subject: Subject, settings: Evaluate, *, adapts: bool | None = None) -> Native:
    """Return the built-in engine with the settings of an evaluation.

    With `adapts`, a GPU samples as many answers at a time as its memory allows. By default, `adapts` is True if the recipe does not set
    `batch`.
    """
    if adapts is None:
        adapts = "batch" not in settings.model_fields_set
    return Native(subject.model, settings, eos=subject.eos, vocab=subject.vocab, chunk=settings.batch, adapts=adapts)


def generate_answers(engine: Engine, data: EvalSet, seed: int, tick: Callable[[int], None] = lambda n: None) -> list[Sequence]:
    """Sample one answer per prompt, in the order of `data.encoded`.

    The random numbers of a prompt depend only on the seed, the name of the data set, and the prompt's row.
    """
    uniforms = rng.uniforms([e.row for e in data.encoded], engine.decoding.max_new_tokens, seed, "decode", data.name)
    prompts = [e.prompt for e in data.encoded]
    return [Sequence(p, r.tokens) for p, r in zip(prompts, engine.respond(prompts, uniforms, tick=tick), strict=True)]


def score(
    subject: Subject,
    data: EvalSet,
    settings: Evaluate,
    answers: Answers,
    own: Mapping[str, OwnFunction] | None = None,
    *,
    read_references: bool = True,
    per_byte: Rules | None = None,
) -> Evaluation:
    """Return all scores of sampled answers. `own` maps names to metrics of the user's own code.

    If `read_references` is True, loss and calibration on the references are measured too. If `per_byte` also has the rules with which the
    set was encoded, the bits per byte of the references are measured as well.
    """
    predictions = {seed: decode(subject, of_seed) for seed, of_seed in answers.items()}
    per_seed: dict[int, dict[str, np.ndarray]] = {}
    for seed, of_seed in answers.items():
        scores = text_scores.score_answers(predictions[seed], [a.response for a in of_seed], data.rows)
        scores["entropy"] = means(entropy(subject, of_seed, batch=settings.batch, temperature=settings.temperature)).tolist()
        scores |= text_scores.score_own(own or {}, predictions[seed], data.rows)
        per_seed[seed] = {name: np.asarray(column, float) for name, column in scores.items()}
    columns = {name: np.stack([scores[name] for scores in per_seed.values()], axis=1) for name in next(iter(per_seed.values()))}
    columns |= {name: np.array(values)[:, None] for name, values in text_scores.score_seeds(predictions).items()}
    corpus: dict[str, Any] = {"numbers": text_scores.score_set(predictions)}
    if read_references:
        _read_references(subject, data, settings.batch, columns, corpus, per_byte)
    records = [r for seed in answers for r in _records(data, seed, subject, predictions[seed], per_seed[seed])]
    return Evaluation({name: values.tolist() for name, values in columns.items()}, corpus, records)


def decode(subject: Subject, answers: Seq[Sequence]) -> list[str]:
    """Decode answers to text. Remove the end token, special tokens, and white space at both ends."""
    tokens = [list(a.response[:-1] if a.response and a.response[-1] in subject.eos else a.response) for a in answers]
    return [t.strip() for t in subject.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _read_references(
    subject: Subject, data: EvalSet, batch: int, columns: dict[str, np.ndarray], corpus: dict[str, Any], per_byte: Rules | None
) -> None:
    found = likelihood(subject, references(data.encoded), batch=batch)
    columns["loss"] = means(found["loss"])[:, None]
    if per_byte:
        columns["bits_per_byte"] = bits_per_byte(found["loss"], reference_sizes(data, subject.tokenizer, subject.eos, per_byte))[:, None]
    bins = {"tokens": token_scores.bins(np.concatenate(found["confidence"]), np.concatenate(found["correct"]))}
    corpus["numbers"]["perplexity"] = float(np.exp(np.concatenate(found["loss"]).mean()))
    if all(r.choices for r in data.rows):
        labels, prompts = [e.choices for e in data.encoded], [e.prompt for e in data.encoded]
        found = token_scores.label_probabilities(subject, prompts, labels, batch=batch)
        confidence, correct = token_scores.likeliest(found, [r.choices for r in data.rows], [r.references for r in data.rows])
        columns["label_accuracy"] = 100 * correct[:, None]
        bins["labels"] = token_scores.bins(confidence, correct)
    corpus["numbers"] |= {f"ece_{name}": token_scores.ece(b) for name, b in bins.items()}
    corpus["calibration"] = {name: b.as_json() for name, b in bins.items()}
    corpus["unseen"] = text_scores.unseen([r.references for r in data.rows])
    ended = [e.response[-1] in subject.eos for e in data.encoded]
    corpus["reference_length"] = [len(e.response) - end for e, end in zip(data.encoded, ended, strict=True)]


def _records(data: EvalSet, seed: int, subject: Subject, predictions: list[str], scores: dict[str, np.ndarray]) -> list[dict]:
    prompts = subject.tokenizer.batch_decode([list(e.prompt) for e in data.encoded], skip_special_tokens=True)
    tasks = [task_of(example) for example in data.rows]
    return [
        {
            "set": data.name,
            "index": e.row,
            "seed": seed,
            "prompt": prompts[i],
            "instruction": tasks[i][0],
            "input": tasks[i][1],
            **({"turns": [*map(for_people, data.rows[i].messages)]} if data.rows[i].messages else {}),
            "prediction": predictions[i],
            "references": list(data.examples[e.row].references),
            **{name: round(float(column[i]), 4) for name, column in scores.items()},
        }
        for i, e in enumerate(data.encoded)
    ]


def dev_metrics(
    subject: Subject,
    data: EvalSet,
    settings: Evaluate,
    metric: str,
    *,
    teacher: PreTrainedModel | Teacher | None = None,
    shard: Shard = Shard(),
) -> dict[str, float]:
    """Return the dev loss. If `metric` needs sampled answers, sample answers, and return further metrics of these answers.

    If `metric` is "reverse_kl", the only further metric is the reverse KL to `teacher`. If `metric` is a text score, the further metrics
    are all scores of `score_quality`, and `length`, the mean number of tokens of an answer. The processes of `shard` divide the prompts,
    and all of them return the same metrics.
    """
    order = np.argsort([len(e.prompt) + len(e.response) for e in data.encoded], kind="stable")
    mine = sorted(order[shard.rank :: shard.world].tolist())  # each process gets prompts of all lengths
    part = EvalSet(data.name, data.examples, [data.encoded[i] for i in mine])

    def mean(per_token: list[np.ndarray]) -> float:
        return float(np.array(shard.gather(list(zip(mine, means(per_token), strict=True)))).mean())

    found = {"loss": mean(likelihood(subject, references(part.encoded), batch=settings.batch)["loss"])}
    reads_text = metric in names_in("quality")
    if reads_text or metric == "reverse_kl":
        answers = generate_answers(native(subject, settings), part, settings.seeds[0])
        if reads_text:
            answers = shard.gather(list(zip(mine, answers, strict=True)))
            scores = text_scores.score_quality(decode(subject, answers), data.rows, metric=metric)
            found |= {name: float(np.mean(column)) for name, column in scores.items()}
            found["length"] = float(np.mean([len(a.response) for a in answers]))
        else:
            assert teacher is not None
            (beside,) = divergences(subject, answers, [teacher], batch=settings.batch)
            found["reverse_kl"] = mean(beside["reverse_kl"])
    return found


def over_sets(measured: Mapping[str, tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Return the means of metrics over dev sets, as METRIC, and the values of each set, as METRIC/SET. A single set has only METRIC.

    `measured` maps the name of a set to its weight in the means, and to its metrics. The weights add up to 1.
    """
    if len(measured) == 1:
        ((_, only),) = measured.values()
        return only
    names = next(iter(measured.values()))[1]
    means = {name: sum(share * values[name] for share, values in measured.values()) for name in names}
    return means | {f"{name}/{of}": values[name] for name in names for of, (_, values) in measured.items()}
