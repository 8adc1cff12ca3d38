"""Pair the chains of earlier studies with their twins: direct distillation of the same compute and settings.

A chain without a twin is not used. `unused` says in which settings it differs from direct distillation, by their keys in a recipe.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, prod
from typing import Any

import numpy as np

from tadistill.advise.history import Edge, Observation, Settings
from tadistill.config.arm import path_text
from tadistill.text import counted, form, listed

EQUAL = 0.05
"""Two costs are treated as equal if their relative difference is at most this number."""
SHOWN = 3
"""Largest number of studies that notes about unused chains name, and of chains and settings in a note."""


@dataclass(frozen=True)
class TwinPair:
    """A chain (path with assistants) and its twin, which is direct distillation with the same compute."""

    family: str
    path: tuple[str, ...]
    edges: tuple[Edge, ...]
    direct: Edge
    cost: float
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    """Quality of the chain minus quality of the twin. There is one value per seed."""
    twin: tuple[float, ...]
    """Costs of the direct runs that give the twin's quality. If there is one run, it is the twin. If there are two, the twin's quality is
    interpolated between them."""

    reported: float = 0.0
    """Standard deviation of the difference on the test sets (`Observation.reported`)."""

    @cached_property
    def mean(self) -> float:
        return float(np.mean(self.differences))


_Directs = dict[tuple[str | int, ...], list[Observation]]  # the runs of direct distillation by `_ends`


def pair_up(observations: Sequence[Observation]) -> list[TwinPair]:
    """Pair each chain with its twin: a run of direct distillation with the same family, student, settings, seed and cost (within 5 %).

    If no direct run has this cost, the twin's quality is interpolated between the next cheaper and the next more expensive run, linearly in
    the log of the cost. A chain is left out if one of these two runs is missing. Of several equal runs with one seed, the first counts.
    """
    directs = _directs(observations)
    found: dict[tuple[Any, ...], dict[int, tuple[Observation, Edge, float]]] = {}
    for o in observations:
        if twin := _twin(o, directs):
            costs, quality, edge = twin
            rows = found.setdefault((_ends(o)[:-1], o.settings.digest, o.path, o.cost, costs), {})
            rows.setdefault(o.seed, (o, edge, o.quality - quality))
    return [_pair([*rows.values()], costs) for (*_, costs), rows in found.items()]


def unused(observations: Sequence[Observation]) -> list[str]:
    """Return a sentence for each of the first studies with chains that have no twin: which chains these are, and what no direct run has.

    A last sentence has the number of other such studies, if there are any.
    """
    directs, found = _directs(observations), dict[str, dict[str, str]]()
    used = {_chain(o) for o in observations if _twin(o, directs)}
    costs: dict[tuple[str, tuple[str, ...]], set[float]] = {}
    for o in observations:
        costs.setdefault((o.study, o.path), set()).add(o.cost)
    for o in observations:
        if len(o.path) > 2 and _chain(o) not in used:
            several = len(costs[o.study, o.path]) > 1
            name = path_text(o.path) + (f" with {o.cost:.3g} times the compute of direct distillation" if several else "")
            found.setdefault(o.study, {}).setdefault(name, _lacks(o, directs))
    said = [_sentence(study, chains) for study, chains in [*found.items()][:SHOWN]]
    more = counted(len(found) - SHOWN, "other study has", "other studies have")
    return [*said, *([f"{more} chains that are not used for such reasons."] if len(found) > SHOWN else [])]


def _chain(o: Observation) -> tuple[Any, ...]:
    return o.study, o.path, o.cost, o.settings.digest  # the same for all seeds


def _sentence(study: str, found: Mapping[str, str]) -> str:
    chains_of: dict[str, list[str]] = {}
    for chain, what in found.items():
        chains_of.setdefault(what, []).append(chain)
    said: list[str] = []
    for what, chains in chains_of.items():
        n, more = len(chains), len(chains) - SHOWN
        named = listed([*chains[:SHOWN], *([counted(more, "other chain")] if more > 0 else [])])
        said.append(f"{named} {form(n, 'is', 'are')} not used, because no finished direct run has {form(n, 'its', 'their')} {what}")
    it = form(len(found), "it", "them")
    return f"Study {study}: {'; '.join(said)}; to use {it}, run direct distillation with the same settings, seeds and compute."


def _lacks(chain: Observation, directs: _Directs) -> str:
    if not (runs := directs.get(_ends(chain))):
        return "seed" if any(ends[:-1] == _ends(chain)[:-1] for ends in directs) else "models, data, method and metric"
    fewest = min((differing_keys(chain.settings, run.settings) for run in runs), key=len)[:SHOWN]
    return listed([name if name == _RULES else f"`{name.replace('STUDENT', chain.path[-1])}`" for name in fewest]) or "compute"


def _directs(observations: Sequence[Observation]) -> _Directs:
    found: _Directs = {}
    for o in observations:
        if len(o.path) == 2:
            found.setdefault(_ends(o), []).append(o)
    return found


def _pair(rows: Sequence[tuple[Observation, Edge, float]], twin: tuple[float, ...]) -> TwinPair:
    first, direct, _ = rows[0]
    seeds, differences = tuple(o.seed for o, *_ in rows), tuple(difference for *_, difference in rows)
    reported = max(o.reported for o, *_ in rows)
    return TwinPair(first.family, first.path, first.edges, direct, first.cost, seeds, differences, twin, reported)


def _ends(o: Observation) -> tuple[str | int, ...]:
    ratio = prod(e.measures.size_ratio or 1.0 for e in o.edges)  # two studies may use one name for students of different sizes
    return o.family, o.path[0], o.path[-1], f"{ratio:.6g}", o.seed


def _twin(o: Observation, directs: _Directs) -> tuple[tuple[float, ...], float, Edge] | None:
    # costs of one or two direct runs, the quality that direct distillation has at the cost of a chain, and its edge
    beside: dict[float, Observation] = {}
    for direct in directs.get(_ends(o), []) if len(o.path) > 2 else []:
        if _equal(o.settings, direct.settings):
            beside.setdefault(direct.cost, direct)
    nearest = min(beside, key=lambda c: abs(log(c / o.cost)), default=0.0)
    below, above = [c for c in beside if c < o.cost], [c for c in beside if c > o.cost]
    if beside and abs(nearest / o.cost - 1) <= EQUAL:
        return (nearest,), beside[nearest].quality, beside[nearest].edges[0]
    if not (below and above):
        return None
    low, high = max(below), min(above)
    share = log(o.cost / low) / log(high / low)
    return (low, high), (1 - share) * beside[low].quality + share * beside[high].quality, beside[low].edges[0]


# --- settings that differ -------------------------------------------------------------------------------------------------

_RULES = "version of tadistill"  # no key: an earlier version made one of the results with other rules
_DATA_KEYS = {  # keys in a recipe of the fields that all trainings of a study share
    **dict.fromkeys(("train", "more", "weights"), "data.train"),
    **{"train_limit": "data.limit.train", "dev": "data.dev", "dev_limit": "data.limit.dev", "corpus": "data.corpus"},
    **{"data": "data", "context": "context", "decoding": "evaluate", "scores": _RULES},
}
_MODEL_KEYS = {  # of the fields of a student
    **dict.fromkeys(("prune", "layers"), "init"),
    **{"fingerprint": "load", "tokenizer_fingerprint": "tokenizer", "tokenizer_revision": "revision"},
}
_OTHER_KEYS = {"own": "objective", "direct": "optim.steps", "lora": "models.STUDENT.lora", "behaviour": _RULES}
_FOLLOWS = {
    **dict.fromkeys(("dev", "dev_limit", "decoding", "scores"), "select.metric"),
    **dict.fromkeys(("student.revision", "student.config", "student.tokenizer"), "student.load"),
    **{"method.objective": "method.objective.type", "method.sampler": "method.sampler.type"},
}
"""Fields that a training has only with some values of another field."""
_SFT, _CHECKPOINT, _PHASES = "models.STUDENT.sft", "models.STUDENT.checkpoint", "phases"
_STAGE = "student.stage."


def differing_keys(one: Settings, other: Settings) -> list[str]:
    """Return the settings in which two trainings differ, by their keys in a recipe. The student is called STUDENT."""
    mine, theirs = _comparable(one, other)
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    some, others = Counter(_trainings(mine)), Counter(_trainings(theirs))
    changed = [*(some - others), *(others - some)]
    if changed:  # what only one student went through has no other side
        names = [name for name in names if not name.startswith("student.")]
    told = [name for name in names if not _follows(name, names)]
    if not changed:  # other content follows from other settings, such as another world
        told = [name for name in told if not name.endswith("fingerprint")] or told
    shared, before = mine.keys() & theirs.keys(), _trainings(mine)
    keys = list(dict.fromkeys([*(_recipe_key(name, names, shared, before) for name in told), *changed]))
    return [key for key in keys if not any(key.startswith(f"{whole}.") for whole in keys)]


def _comparable(one: Settings, other: Settings) -> tuple[Mapping[str, str], Mapping[str, str]]:
    # a plan makes two objectives of one recipe if only one teacher has another tokenizer, and that over spans is known for both
    return (one.own, other.own) if one.over_spans == other.over_spans else (one.spans, other.spans)


def _equal(one: Settings, other: Settings) -> bool:
    mine, theirs = _comparable(one, other)
    return mine == theirs


def _trainings(settings: Mapping[str, str]) -> list[str]:
    # the keys of the trainings that made the student, the last one first
    found: list[str] = []
    place = _STAGE
    while any(name.startswith(place) for name in settings):
        of_checkpoint = settings.get(f"{place.removesuffix('stage.')}checkpoint", "null") != "null"
        distilled = any(name.startswith(f"{place}method.") for name in settings)
        found.append(_CHECKPOINT if of_checkpoint else _PHASES if distilled else _SFT)
        place += _STAGE
    return found


def _follows(name: str, names: Sequence[str]) -> bool:
    place, stage, own = name.rpartition("stage.")
    first, second = own.split(".")[0], ".".join(own.split(".")[:2])
    cause = f"{place}{stage}{_FOLLOWS.get(first) or _FOLLOWS.get(second, own)}"
    return name != cause and cause in names


def _recipe_key(name: str, names: Sequence[str], shared: Collection[str], trainings: Sequence[str]) -> str:
    # `shared` are the names of the settings that both trainings have, and `trainings` the keys of those that made the student
    place, stage, own = name.rpartition("stage.")
    first, _, rest = own.removeprefix("method.").partition(".")
    of_student, of_other = first == "student", ".of." in f".{place}"  # of the model from which the student is made
    if of_student:
        first, _, rest = rest.partition(".")
    while first == "of":
        of_other, (first, _, rest) = True, rest.partition(".")
    if (of_student or of_other) and not (first in _DATA_KEYS and name in shared):
        return f"models.STUDENT.{'init' if of_other or first in _DATA_KEYS else _MODEL_KEYS.get(first, first)}"
    if stage and first in ("train", "more", "weights") and not any(each.startswith(first) for each in names):
        return f"{_SFT}.sets"  # the distillation has the same sets
    if first in _DATA_KEYS:
        known = _DATA_KEYS[first]
        return f"{known}.{rest}" if rest and known in ("data", "evaluate") else known
    known = _OTHER_KEYS.get(first) or f"{first}.{rest}".rstrip(".")
    made = trainings[f"{place}{stage}".count(_STAGE) - 1] if stage else _PHASES
    if made == _PHASES or first in _OTHER_KEYS:
        return known
    return made if made == _CHECKPOINT else f"{made}.{known}"
