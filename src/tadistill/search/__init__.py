"""Paths from a teacher to a student: their lattice, how to search it, what is worth its cost, and rules of thumb. Needs numpy only."""

from tadistill.search.lattice import Concordance, Lattice, Path, concordance, count_paths, last_hop_means, make_lattice, trainings
from tadistill.search.pareto import Label, pareto_paths, undominated
from tadistill.search.strategies import Outcome, Round, Strategy, beam, best_prefix, drive, exhaustive, halving, single

__all__ = [
    "Concordance",
    "Label",
    "Lattice",
    "Outcome",
    "Path",
    "Round",
    "Strategy",
    "beam",
    "best_prefix",
    "concordance",
    "count_paths",
    "drive",
    "exhaustive",
    "halving",
    "last_hop_means",
    "make_lattice",
    "pareto_paths",
    "single",
    "trainings",
    "undominated",
]
