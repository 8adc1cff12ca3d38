"""All that `tadistill advise` found, for the terminal, the page and advice.json.

Every number is one of three: `measured` (on dev prompts), `predicted` (by the cost ledger, from history, or from the prior alone) or
`assumed` (a setting, a definition). advice.json says which.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from tadistill.advise import Advice, Edge, EdgeMeasures, History, edge_record
from tadistill.advise.measures import Estimate, Measures
from tadistill.advise.probes import TOP_K, Ladder, PathCost
from tadistill.advise.steps import Step
from tadistill.advise.words import Rule
from tadistill.search.strategies import Chosen

TAGS = {
    "models": "measured",
    "pairs": "measured",
    "lambda_sweeps": "measured",
    "rules": "measured",
    "paths.flops": "predicted",
    "paths.multiple": "predicted",
    "options": "predicted",
    "margin": "assumed",
    "level": "assumed",
    "top_k": "assumed",
}


@dataclass(frozen=True)
class Report:
    """What the outputs show."""

    study: str
    command: str
    seed: int
    """Training seed of the models that were probed."""
    dev: str
    prompts: int
    metric: str
    """What the direct path's student is selected by on dev, and so the unit of the differences."""
    ladder: Ladder
    measures: Measures
    costs: Mapping[tuple[str, ...], PathCost]
    sweeps: Mapping[str, tuple[Chosen, ...]]
    """Score -> which assistant the trade-off takes at which lambda."""
    rules: tuple[Rule, ...]
    history: History
    advice: Advice
    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    @property
    def studies(self) -> tuple[str, ...]:
        """The studies whose finished arms the verdict rests on."""
        return tuple(sorted({o.study for o in self.history.on(self.metric)})) if self.advice.pairs else ()


def measured(study: str, command: str, measures: Measures, edges: Mapping[tuple[str, str], EdgeMeasures]) -> dict[str, Any]:
    """The part of advice.json that later studies read as history."""
    return {
        "study": study,
        "command": command,
        "edges": [edge_record(Edge(*names, found)) for names, found in edges.items()],
        "models": [_plain(asdict(model)) for model in measures.models],
        "pairs": [_plain(asdict(pair)) for pair in measures.pairs.values()],
    }


def decided(report: Report) -> dict[str, Any]:
    """The rest of it."""
    advice = report.advice
    return _plain(
        {
            "dev": report.dev,
            "prompts": report.prompts,
            "seed": report.seed,
            "top_k": TOP_K,
            "metric": report.metric,
            "paths": [{"path": path, **asdict(cost)} for path, cost in report.costs.items()],
            "lambda_sweeps": {name: [asdict(c) for c in chosen] for name, chosen in report.sweeps.items()},
            "rules": [asdict(rule) for rule in report.rules],
            "advice": asdict(advice),
            "steps": [asdict(step) for step in report.steps],
            "history": {"studies": report.studies, "left_out": report.history.left_out},
            "notes": report.notes,
            "tags": TAGS,
        }
    )


def _plain(value: Any) -> Any:
    """JSON has no infinity: None stands for it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def plus_minus(found: Estimate, decimals: int = 3) -> str:
    """``0.087 ± 0.004``: a mean and its standard error."""
    mean = f"{found.mean:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    return mean if found.se is None else f"{mean} ± {found.se:.{decimals}f}"
