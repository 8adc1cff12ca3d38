"""The texts of the advice, and the `Report` that the terminal, the page and advice.json show."""

import shlex
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf

from tadistill.advise.decide import Advice, Option, improvement_unit
from tadistill.advise.history import History
from tadistill.advise.measures import (
    TOP_K,
    Ladder,
    Mean,
    Measures,
    PathCost,
    chain_settings,
    direct_settings,
    twin_name,
    with_seeds,
)
from tadistill.advise.twins import unused
from tadistill.config import Recipe
from tadistill.config.arm import ModelPath, path_text
from tadistill.metrics import NOT_COMPARABLE
from tadistill.search.strategies import Chosen, geometric_mean, lambda_tradeoff, path_name, performance_mean, size_law
from tadistill.text import MINUS, counted

LEAST_MASS, HOPS = 0.9, (1.3, 4.0)  # `notes` warns about a `Pair.mass` below the first, and about size ratios outside the range
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
    """Return the title under which tables show a measure."""
    return _NAMES.get(name, name)


@dataclass(frozen=True)
class Rule:
    """A rule of thumb for the choice of assistants, and the path that it chooses. No rule has been shown to beat direct distillation."""

    name: str
    path: tuple[str, ...]
    source: str


def scores(measures: Measures) -> dict[str, dict[str, float]]:
    """Return the dev scores of each model, as {kind of score: {model: value from 0 to 1}}. The kinds are exp(−loss) and ROUGE-L / 100."""
    by_loss = {m.name: exp(-m.loss.mean) for m in measures.models}
    return {"exp(−loss)": by_loss, "ROUGE-L / 100": {m.name: m.rouge_l.mean / 100 for m in measures.models}}


def lambda_sweeps(measures: Measures) -> dict[str, tuple[Chosen, ...]]:
    """Return the assistants that MiniDisc's rule chooses, for each kind of score.

    The choice depends on a number lambda: a larger lambda favours smaller models (see `lambda_tradeoff`). So there is one choice for each
    range of lambda.
    """
    names = [m.name for m in measures.models]
    sizes = {m.name: float(m.parameters) for m in measures.models}
    return {name: lambda_tradeoff(names[0], names[1:-1], of_models, sizes) for name, of_models in scores(measures).items()}


def sweep_text(chosen: Sequence[Chosen]) -> str:
    """Return the values of lambda for which each assistant is chosen, as text.

    For example, ``a up to 0.13, then b`` says that a is chosen up to 0.13, and b above 0.13.
    """
    parts = [c.assistant if c.high == inf else f"{c.assistant} up to {c.high:.2g}" for c in chosen]
    return ", then ".join(parts)


def rules(measures: Measures, ladder: Ladder, most: int | None) -> tuple[Rule, ...]:
    """Return three rules of thumb, each with the path that it chooses. The rules use only the models' sizes and dev scores."""
    ends, between = (ladder.teacher, ladder.assistants, ladder.student), scores(measures)["exp(−loss)"]
    return (
        Rule(
            "size law",
            size_law(*ends, ladder.sizes, max_assistants=most),
            "each teacher is 2.5 times as big as its learner (Zhang et al. 2025)",
        ),
        Rule("performance mean", performance_mean(*ends, between), "score is midway between teacher and student (Mirzadeh et al. 2020)"),
        Rule("geometric mean", geometric_mean(*ends, ladder.sizes), "both distillations shrink the model by the same factor"),
    )


def notes(
    recipe: Recipe, paths: Sequence[ModelPath], measures: Measures, advice: Advice, past: History, metric: str, prompts: int
) -> tuple[str, ...]:
    """Return warnings about the models, the settings and the earlier studies. Each warning is one or two sentences."""
    pairs = [measures.pairs[hop] for hop in dict.fromkeys(hop for path in paths for hop in pairwise(path))]
    found: list[str] = []
    wide = [f"{p.teacher} > {p.learner} ({p.size_ratio:.1f})" for p in pairs if p.size_ratio > HOPS[1]]
    near = [f"{p.teacher} > {p.learner} ({p.size_ratio:.2f})" for p in pairs if p.size_ratio < HOPS[0]]
    if wide:
        found.append(f"In wide steps, the teacher is more than {HOPS[1]:g} times as big as the learner: {', '.join(wide)}.")
    if near:
        found.append(
            f"In short steps, the teacher is less than {HOPS[0]:g} times as big as the learner: {', '.join(near)}. Such a step costs a "
            "training and changes little."
        )
    thin = [f"{p.teacher} > {p.learner} {p.mass.mean:.2f}" for p in pairs if p.mass.mean < LEAST_MASS]
    if thin:
        found.append(
            f"These learners give less than {LEAST_MASS:g} of their probability to the {TOP_K} tokens that are most likely for their "
            f"teacher: {', '.join(thin)}. On-policy reverse KL has been reported to collapse if this probability is low."
        )
    assistants = {m.name: recipe.models[m.name] for m in measures.models[1:-1]}
    bought = [name for name, model in assistants.items() if model.load and not model.load.startswith("scratch:") and model.sft is None]
    if bought:
        found.append(
            f"Assistants that this study does not train: {', '.join(bought)}. The compute of their training is unknown, so no path's cost "
            "contains it."
        )
    if metric in NOT_COMPARABLE:
        found.append(
            f"method.select.metric is `{metric}`, which cannot compare students of different teachers, so no experiment is proposed; use "
            "loss or rouge_l."
        )
    if not advice.pairs:
        found.append(
            "No earlier study has a chain that can be used, so the advice is the default: direct distillation with a chain's compute. The "
            "rules of thumb are only hypotheses."
        )
    found += unused(past.on(metric))
    if past.left_out:
        first = past.left_out[0].rstrip(".")
        found.append(
            f"{counted(len(past.left_out), 'arm or seed', 'arms or seeds')} of earlier studies could not be used, for instance: {first}."
        )
    if (n := measures.models[0].loss.n) < prompts:
        found.append(
            f"--prompts is {prompts}, but the dev set has only {counted(n, 'prompt that is', 'prompts that are')} short enough, so "
            f"{counted(n, 'prompt is', 'prompts are')} used."
        )
    found.append(
        "Models were measured before any distillation. In a chain an assistant is distilled first, which lowers its entropy and "
        "changes every measure of the next step."
    )
    return tuple(found)


def command_notes(refused: Sequence[str], unpriced: Sequence[str]) -> tuple[str, ...]:
    """Return warnings about the commands.

    Args:
        refused: the errors of recipes with other arms, which are therefore not proposed.
        unpriced: the arms of the recipe with trainings of unknown compute.
    """
    found: list[str] = []
    if refused:
        found.append(f"{counted(len(refused), 'command is', 'commands are')} not proposed, for instance: {refused[0].rstrip('.')}.")
    if unpriced:
        found.append(f"The compute of a training is not known for {', '.join(unpriced)}, so the cost of no command contains it.")
    return tuple(found)


@dataclass(frozen=True)
class NextRun:
    """A run that the advice proposes, as a sentence and as a command. The command is empty if this run is finished, or if the recipe's
    arms do not allow it."""

    text: str
    command: str
    cost: float
    """Training compute of the stages that are not finished, divided by the compute of one direct run with one seed."""
    gain: float | None
    """Expected improvement, because this run may lead to a better choice of path. None for the run to start now."""


def steps(
    recipe: Recipe,
    source: str,
    overrides: Sequence[str],
    advice: Advice,
    costs: Mapping[tuple[str, ...], PathCost],
    cost_of: Callable[[Sequence[str]], float | None],
    finished: Container[str] = (),
) -> tuple[NextRun, ...]:
    """Return the runs that the advice proposes. The first is the run to start now. The others are experiments.

    The commands only add paths to the recipe, so nothing is trained twice. `budgets` do not apply to these paths: they would replace
    each path by several.

    Args:
        recipe: the recipe, with the overrides of the command line.
        source: the recipe's file name, as it appears in the commands.
        overrides: the KEY=VALUE arguments of the command line. The commands repeat them.
        advice: the verdict and the experiments.
        costs: the cost of every path.
        cost_of: returns the cost of the recipe with some KEY=VALUE arguments (`NextRun.cost`). None if such a recipe is refused.
        finished: the paths (`path_name`) and equal-compute baselines (`twin_name`) whose stages are all finished.
    """

    def next_run(text: str, settings: list[str], cost: float, gain: float | None = None) -> NextRun:
        return NextRun(text, shlex.join(["tadistill", "run", source, *overrides, *settings]), cost, gain)

    def now(what: str, arms: list[str], names: list[str], why: str = "") -> NextRun:
        if all(name in finished for name in names):
            return NextRun(f"now: nothing to run; {what} ({over}) {'are' if len(names) > 1 else 'is'} finished", "", 0.0, None)
        if (cost := cost_of(settings := with_seeds(recipe, arms, seeds))) is None:
            return NextRun(f"now: {what}, {over}, which the arms of the recipe do not allow (see the notes)", "", 0.0, None)
        return next_run(f"now: {what}, {over}{why}", settings, cost)

    seeds, over, found = len(recipe.seeds), counted(len(recipe.seeds), "seed"), list[NextRun]()
    chains = [path for path in costs if len(path) > 2]
    if advice.verdict == "chain":
        what, names = f"{path_text(advice.path)} and direct distillation of equal compute", [path_name(advice.path), twin_name(advice.path)]
        found.append(now(what, chain_settings(recipe, advice.path), names, "; the chain is useful if it wins on the test sets"))
    elif chains:
        wanted = advice.next[0].path if advice.next else chains[0]
        what = f"direct distillation with the compute of {path_text(wanted)}"
        found.append(now(what, direct_settings(recipe, wanted, costs[wanted]), [twin_name(wanted)]))
    for e in advice.next:
        more = f" ({e.new} of them new)" if e.new < e.seeds else ""
        text = f"to learn more: compare {path_text(e.path)} with direct at equal compute, {counted(e.seeds, 'seed')}{more}"
        found.append(next_run(text, with_seeds(recipe, chain_settings(recipe, e.path), e.seeds), e.cost, e.gain))
    return tuple(found)


@dataclass(frozen=True)
class Report:
    """Everything that the terminal, the page and advice.json show."""

    study: str
    command: str
    seed: int
    """Training seed of the measured models."""
    dev: str
    prompts: int
    metric: str
    """The dev metric that selects the direct path's student. Improvements are in the unit of this metric."""
    ladder: Ladder
    measures: Measures
    costs: Mapping[tuple[str, ...], PathCost]
    sweeps: Mapping[str, tuple[Chosen, ...]]
    """Maps a kind of score to the assistants that MiniDisc's rule chooses, each with its range of lambda."""
    rules: tuple[Rule, ...]
    history: History
    advice: Advice
    steps: tuple[NextRun, ...]
    notes: tuple[str, ...]

    @property
    def studies(self) -> tuple[str, ...]:
        """The studies whose finished arms are the evidence for the verdict."""
        return tuple(sorted({o.study for o in self.history.on(self.metric)})) if self.advice.pairs else ()


def reason(advice: Advice) -> str:
    """Explain the verdict in one or two sentences."""
    best = advice.likeliest
    if best is None:
        return "There is no other path to compare direct distillation with."
    if not advice.pairs:
        text = (
            "No finished study compares a chain with direct distillation at equal compute, so the intervals come from the prior alone, and "
            "no measure has been shown to predict anything. Run direct distillation with the compute that a chain would cost."
        )
        chain = advice.hypothesis
        return (
            text
            if chain is None
            else f"{text} The size law (teachers 2.5 times as big as learners) suggests {path_text(chain)}. This is only a hypothesis."
        )
    name, ends = path_text(best.path), f"{signed_number(best.low)} to {signed_number(best.high)}"
    range_ = f"{signed_number(best.expected)} ({ends})"
    on = f"from {counted(advice.pairs, 'chain')} of {counted(advice.families, 'family', 'families')}"
    if advice.verdict == "chain":
        return (
            f"{name} is expected to beat direct at equal compute by {range_}. P(better) is {best.p_better:.3f}; to recommend the best of "
            f"{counted(len(advice.options) - 1, 'chain')}, at least {advice.needed:.3f} is needed. Evidence: {on}."
        )
    text = f"the most promising chain, {name}, has an expected improvement of {range_}"
    if advice.verdict == "direct":
        return f"No chain is likely to beat direct at equal compute by more than {advice.margin:g}: {text}, {on}."
    return (
        f"Earlier studies do not decide whether a chain beats direct at equal compute: {text}, {on}. P(better) is {best.p_better:.2f}, "
        f"but a recommendation needs {advice.needed:.3f}. Until more is known, run direct distillation with the chain's compute."
    )


def verdict_line(advice: Advice) -> str:
    """Return a short line with the verdict and its path."""
    path = path_text(advice.path)
    if advice.verdict == "chain":
        return f"chain: {path}"
    if advice.verdict == "direct":
        return f"direct: {path}, at a chain's compute"
    return f"inconclusive: until more is known, run direct distillation ({path})"


def basis_line(report: Report) -> str:
    """Return a line with the numbers of earlier chains and families on which the verdict is based."""
    advice = report.advice
    if not advice.pairs:
        return "no history: differences come from the prior, which assumes no effect on average"
    chains, families = counted(advice.pairs, "chain"), counted(advice.families, "family", "families")
    studies = ", ".join("this study" if study == report.study else study for study in report.studies)
    return f"history: {chains} compared with direct at equal compute, of {families} ({studies})"


def cost_text(cost: float) -> str:
    """Say what a command costs (`NextRun.cost`), without a period."""
    runs = f"{cost:.1f}" if cost >= 0.05 else f"{cost:.1g}"
    return f"costs as much compute as {runs} direct runs of one seed" if cost else "needs no training"


def gain_text(gain: float, report: Report) -> str:
    """Return a sentence without its period about the improvement that is expected from an experiment, and what this number is based on."""
    basis, digits = (": ", 2) if report.advice.pairs else (", from the prior alone: about ", 1)
    return f"Expected improvement of the chosen path{basis}{float(f'{gain:.{digits}g}'):g} {improvement_unit(report.metric)}".rstrip()


def signed_number(value: float) -> str:
    """Format an improvement, such as ``+0.31``, with a real minus sign."""
    return f"{value:+.2f}".replace("-", MINUS)


def option_interval(option: Option) -> str:
    """Format the interval of an option, such as ``[−0.50, +0.61]``."""
    return f"[{signed_number(option.low)}, {signed_number(option.high)}]"


def plus_minus(found: Mean, decimals: int = 3) -> str:
    """Format a mean and its standard error, such as ``0.087 ± 0.004``."""
    mean = f"{found.mean:.{decimals}f}".replace("-", MINUS)
    return mean if found.se is None else f"{mean} ± {found.se:.{decimals}f}"
