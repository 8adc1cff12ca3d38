"""Evaluate a model on prompts with references: generated text over decoding seeds, reference loss, KL to a teacher.

`evaluate` is the public function; `dev_metrics` is the short form that the training loop calls.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tadistill import rng
from tadistill.config import Evaluate
from tadistill.data.batch import Sequence, by_length, collate
from tadistill.data.datasets import Example
from tadistill.data.templates import Encoded
from tadistill.evaluation.metrics import fact_accuracy, rouge_l
from tadistill.models.forward import Reader
from tadistill.objectives import cross_entropy, forward_kl, fused_head, reverse_kl
from tadistill.rollout.engine import Native

TEXT_METRICS = {"rouge_l", "fact_accuracy"}


@dataclass(frozen=True)
class EvalSet:
    """A named test or dev set, encoded for one tokenizer."""

    name: str
    examples: Seq[Example]
    encoded: Seq[Encoded]


@dataclass(frozen=True)
class Subject:
    """The model under evaluation with what decoding needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab: int
    eos: tuple[int, ...]
    """Tokens that end an answer."""

    @property
    def pad(self) -> int:
        """Any id: padding is told by length."""
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos


def generate(
    subject: Subject, data: EvalSet, settings: Evaluate, seed: int, tick: Callable[[int], None] = lambda n: None
) -> list[Sequence]:
    """One sampled answer per prompt, in the order of `data.encoded`.

    Prompts of like length share a batch; a row's random numbers depend on (seed, set, row) alone.
    """
    uniforms = rng.uniforms([e.row for e in data.encoded], settings.max_new_tokens, seed, "decode", data.name)
    engine = Native(subject.model, settings, eos=subject.eos, vocab=subject.vocab, chunk=settings.batch)
    prompts = [e.prompt for e in data.encoded]
    return [Sequence(p, r.tokens) for p, r in zip(prompts, engine.respond(prompts, uniforms, tick=tick), strict=True)]


def texts(subject: Subject, answers: Seq[Sequence]) -> list[str]:
    """Answers as text: special tokens skipped, white space stripped."""
    return [t.strip() for t in subject.tokenizer.batch_decode([list(a.response) for a in answers], skip_special_tokens=True)]


@torch.no_grad()
def per_sequence(
    subject: Subject, sequences: Seq[Sequence], *, batch: int, teacher: PreTrainedModel | None = None
) -> dict[str, np.ndarray]:
    """Means over each response's tokens: loss (nats), and forward_kl and reverse_kl to the teacher if there is one."""
    names = ("loss", "forward_kl", "reverse_kl") if teacher is not None else ("loss",)
    found = {name: np.zeros(len(sequences)) for name in names}
    reader, of_teacher = Reader(subject.model), Reader(teacher) if teacher is not None else None
    for part in by_length(sequences, batch):
        rows = collate([sequences[i] for i in part], pad=subject.pad).to(subject.model.device)
        teachers = (of_teacher.target(teacher, rows),) if of_teacher and teacher else ()
        tokens = rows.targets_BT[rows.mask_BT]

        def values(logits: Tensor, targets: tuple, at: slice, tokens: Tensor = tokens) -> Tensor:
            loss = cross_entropy(logits, tokens[at])
            return torch.stack([loss, *(kl(logits, t) for t in targets for kl in (forward_kl, reverse_kl))])

        hidden, weights = reader.hidden(subject.model, rows), torch.ones(len(names), 1)
        _, tiles = fused_head(hidden, reader.head, values, weights.to(hidden.device), teachers=teachers, vocab=subject.vocab)
        owner = rows.mask_BT.nonzero()[:, 0]
        size = torch.bincount(owner, minlength=len(part))
        for name, value in zip(names, tiles, strict=True):
            mean = torch.zeros(len(part), device=value.device).index_add_(0, owner, value) / size
            found[name][part] = mean.double().cpu().numpy()
    return found


def references(data: EvalSet) -> list[Sequence]:
    """The first reference of every prompt as a sequence."""
    return [Sequence(e.prompt, e.response) for e in data.encoded]


def text_scores(data: EvalSet, predictions: list[str]) -> dict[str, list[float]]:
    """Rouge-L of every prediction, and fact accuracy where the set knows its facts."""
    rows = [data.examples[e.row] for e in data.encoded]
    scores = {"rouge_l": rouge_l(predictions, [r.references for r in rows])}
    if all(r.facts for r in rows):
        scores["fact_accuracy"] = fact_accuracy(predictions, [r.facts for r in rows])
    return scores


def evaluate(
    subject: Subject,
    data: EvalSet,
    settings: Evaluate,
    *,
    teacher: PreTrainedModel | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, list[list[float]]], list[dict]]:
    """Every metric of one set.

    Args:
        teacher: the original teacher, for forward_kl (on the references) and reverse_kl (on the student's own samples),
            both exact over the vocabulary at each position.
        tick: called with the number of prompts answered.

    Returns:
        {metric: [prompt][decoding seed]} (one column where no decoding is involved), and one record per answer.
    """
    fixed = per_sequence(subject, references(data), batch=settings.batch, teacher=teacher)
    scores = {name: fixed[name][:, None].tolist() for name in ("loss", "forward_kl") if name in fixed}
    columns: dict[str, list[np.ndarray]] = {}
    records = []
    for seed in settings.seeds:
        answers = generate(subject, data, settings, seed, tick)
        predictions = texts(subject, answers)
        now: dict[str, Seq[float]] = dict(text_scores(data, predictions))
        now["length"] = [len(a.response) for a in answers]
        if teacher is not None:
            now["reverse_kl"] = per_sequence(subject, answers, batch=settings.batch, teacher=teacher)["reverse_kl"].tolist()
        for name, column in now.items():
            columns.setdefault(name, []).append(np.asarray(column, float))
        records += _records(data, seed, subject, predictions, now)
    scores |= {name: np.stack(column, axis=1).tolist() for name, column in columns.items()}
    return scores, records


def _records(data: EvalSet, seed: int, subject: Subject, predictions: list[str], scores: dict[str, Seq[float]]) -> list[dict]:
    prompts = subject.tokenizer.batch_decode([list(e.prompt) for e in data.encoded], skip_special_tokens=True)
    return [
        {
            "set": data.name,
            "index": e.row,
            "seed": seed,
            "prompt": prompts[i],
            "prediction": predictions[i],
            "references": list(data.examples[e.row].references),
            **{name: round(float(column[i]), 4) for name, column in scores.items()},
        }
        for i, e in enumerate(data.encoded)
    ]


def dev_metrics(
    subject: Subject, data: EvalSet, settings: Evaluate, metric: str, *, teacher: PreTrainedModel | None = None
) -> dict[str, float]:
    """The dev metrics that are free beside `metric`: the loss always, text scores and reverse KL only if asked for."""
    found = {"loss": float(per_sequence(subject, references(data), batch=settings.batch)["loss"].mean())}
    if metric in TEXT_METRICS or metric == "reverse_kl":
        answers = generate(subject, data, settings, settings.seeds[0])
        if metric in TEXT_METRICS:
            found |= {name: float(np.mean(column)) for name, column in text_scores(data, texts(subject, answers)).items()}
            found["length"] = float(np.mean([len(a.response) for a in answers]))
        else:
            found["reverse_kl"] = float(per_sequence(subject, answers, batch=settings.batch, teacher=teacher)["reverse_kl"].mean())
    return found
