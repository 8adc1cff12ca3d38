"""Measures of four imagined models, and the advice that follows from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tadistill.advise.decide import Advice, advise
from tadistill.advise.history import Candidate, History, Observation, path_edges
from tadistill.advise.measures import Ladder, Measures, PathCost, costs, edge_measures, measure, with_search
from tadistill.advise.words import Report, lambda_sweeps, notes, rules, steps
from tadistill.config import load

RECIPE = Path(__file__).parents[2] / "e2e" / "advice.yaml"
SIZES = {"xl": 1000, "l": 400, "m": 350, "s": 100}
LOSS = {"xl": 1.0, "l": 1.2, "m": 1.6, "s": 2.0}


def measures(mass: float = 0.95) -> Measures:
    draw = np.random.default_rng(0)

    def around(value: float) -> list[float]:
        return list(value + 0.01 * draw.normal(size=20))

    alone = {name: {"loss": around(LOSS[name]), "rouge_l": around(20 - LOSS[name]), "entropy": around(1)} for name in SIZES}
    names = list(SIZES)
    beside = {
        (a, b): {"reverse_kl": around(1), "forward_kl": around(1), "overlap": around(0.5), "mass": around(mass), "entropy_gap": around(0)}
        for i, b in enumerate(names)
        for a in names[:i]
    }
    return measure(SIZES, alone, beside)


def verdict(priced: Mapping[tuple[str, ...], PathCost], history: Sequence[Observation] = ()) -> Advice:
    known = edge_measures(measures())
    candidates = [Candidate(path, cost.multiple, path_edges(path, SIZES, known)) for path, cost in priced.items()]
    return advise(candidates, list(history), margin=0.3, family="family")


def report() -> Report:
    """All of it, without history."""
    recipe, found = with_search(load(RECIPE, [])), measures(mass=0.5)
    priced, past = costs(recipe)[1], History((), ("study x: arm y, seed 1, is not finished",))
    advice = verdict(priced)
    ladder = Ladder(SIZES)
    return Report(
        study="an <b>example</b>",
        command="tadistill advise recipe.yaml",
        seed=1,
        dev="dolly",
        prompts=20,
        metric="rouge_l",
        ladder=ladder,
        measures=found,
        costs=priced,
        sweeps=lambda_sweeps(found),
        rules=rules(found, ladder, None),
        history=past,
        advice=advice,
        steps=steps(recipe, "recipe.yaml", [], advice, priced, lambda settings: 1.0),
        notes=notes(recipe, list(priced), found, advice, past, "rouge_l", 20),
    )
