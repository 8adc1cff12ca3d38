"""What is said beside the measures: rules of thumb and what they choose, and cautions about what the numbers cannot tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf

from tadistill.advise import Advice, History
from tadistill.advise.measures import Measures
from tadistill.advise.probes import TOP_K, Ladder
from tadistill.config import Recipe
from tadistill.config.method import NOT_COMPARABLE
from tadistill.search import ModelPath
from tadistill.search.strategies import Chosen, geometric_mean, lambda_tradeoff, performance_mean, size_law

LEAST_MASS, HOPS = 0.9, (1.3, 4.0)


_NAMES = {
    "cost": "compute",
    "size": "size ratio",
    "size_law": "distance from the size law",
    "reverse_kl": "KL(q ‖ p)",
    "forward_kl": "KL(p ‖ q)",
    "entropy_gap": "entropy gap",
    "loss": "loss ratio",
}


def measure_name(name: str) -> str:
    """A measure of the predictor for readers."""
    return _NAMES.get(name, name)


@dataclass(frozen=True)
class Rule:
    """A rule of thumb and the path it chooses. None of them has been shown to beat direct at equal compute."""

    name: str
    path: tuple[str, ...]
    source: str


def scores(measures: Measures) -> dict[str, dict[str, float]]:
    """Each model's dev score on a scale of 0 to 1, by the score's name."""
    by_loss = {m.name: exp(-m.loss.mean) for m in measures.models}
    return {"exp(−loss)": by_loss, "ROUGE-L / 100": {m.name: m.rouge_l.mean / 100 for m in measures.models}}


def lambda_sweeps(measures: Measures) -> dict[str, tuple[Chosen, ...]]:
    """MiniDisc's trade-off score(A) + lambda (1 - N_A / N_T) for all lambda, on either score: the scale of the score decides much."""
    names = [m.name for m in measures.models]
    sizes = {m.name: float(m.parameters) for m in measures.models}
    return {name: lambda_tradeoff(names[0], names[1:-1], of_models, sizes) for name, of_models in scores(measures).items()}


def sweep_text(chosen: Sequence[Chosen]) -> str:
    """``l up to 0.13, then m``."""
    parts = [c.assistant if c.high == inf else f"{c.assistant} up to {c.high:.2g}" for c in chosen]
    return ", then ".join(parts)


def rules(measures: Measures, ladder: Ladder, most: int | None) -> tuple[Rule, ...]:
    """What rules of thumb choose from sizes and dev scores alone."""
    ends, between = (ladder.teacher, ladder.assistants, ladder.student), scores(measures)["exp(−loss)"]
    return (
        Rule("size law", size_law(*ends, ladder.sizes, max_assistants=most), "each teacher 2.5 times its learner (Zhang et al. 2025)"),
        Rule("performance mean", performance_mean(*ends, between), "score midway between teacher and student (Mirzadeh et al. 2020)"),
        Rule("geometric mean", geometric_mean(*ends, ladder.sizes), "both hops shrink alike"),
    )


def notes(
    recipe: Recipe, paths: Sequence[ModelPath], measures: Measures, advice: Advice, past: History, metric: str, prompts: int
) -> tuple[str, ...]:
    """Cautions, one sentence each."""
    pairs = [measures.pairs[hop] for hop in dict.fromkeys(hop for path in paths for hop in pairwise(path))]
    found: list[str] = []
    wide = [f"{p.teacher} > {p.learner} ({p.size_ratio:.1f})" for p in pairs if p.size_ratio > HOPS[1]]
    near = [f"{p.teacher} > {p.learner} ({p.size_ratio:.2f})" for p in pairs if p.size_ratio < HOPS[0]]
    if wide:
        found.append(f"Wide hops, more than {HOPS[1]:g} times in size: {_list(wide)}.")
    if near:
        found.append(f"Short hops, less than {HOPS[0]:g} times in size: {_list(near)}; a training for little.")
    thin = [f"{p.teacher} > {p.learner} {p.mass.mean:.2f}" for p in pairs if p.mass.mean < LEAST_MASS]
    if thin:
        found.append(
            f"A learner gives less than {LEAST_MASS:g} of its probability to its teacher's {TOP_K} likeliest tokens: {_list(thin)}; "
            "on-policy reverse KL has been reported to collapse where that share is low."
        )
    bought = [m.name for m in measures.models[1:-1] if _ready_made(recipe, m.name)]
    if bought:
        found.append(
            f"{_list(bought)}: loaded as it is, so how it was trained and selected, and with how much compute, is not known here and in "
            "no path's cost."
        )
    if metric in NOT_COMPARABLE:
        found.append(f"method.select.metric is `{metric}`, which cannot compare students of different teachers; use loss or rouge_l.")
    if not advice.pairs:
        found.append("There is no history, so the default holds: direct at equal compute. Paths of the rules of thumb are hypotheses.")
    if past.left_out:
        found.append(f"{len(past.left_out)} arms or seeds of earlier studies could not be used: {past.left_out[0]}.".replace("..", "."))
    if (n := measures.models[0].loss.n) < prompts:
        found.append(f"Dev has {n} prompts that fit, fewer than the {prompts} asked for.")
    found.append(
        "Models were measured as they are before any distillation. In a chain an assistant is distilled first, which makes it sharper and "
        "moves every measure of the next hop."
    )
    return tuple(found)


def _ready_made(recipe: Recipe, name: str) -> bool:
    """Loaded as it is: nothing of its training is part of the study."""
    model = recipe.models[name]
    return model.load is not None and not model.load.startswith("scratch:") and model.sft is None


def _list(parts: Sequence[str]) -> str:
    return ", ".join(parts)
