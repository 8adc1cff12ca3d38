"""Paths from a teacher to a student: the lattice of all of them, strategies that search it, and rules of thumb. Needs numpy only."""

from tadistill.config.arm import ModelPath
from tadistill.search.strategies import (
    Concordance,
    Lattice,
    Outcome,
    Round,
    Strategy,
    beam,
    best_prefix,
    concordance,
    count_paths,
    drive,
    exhaustive,
    halving,
    make_lattice,
    path_name,
    single,
    trainings,
)

__all__ = [
    "Concordance",
    "Lattice",
    "ModelPath",
    "Outcome",
    "Round",
    "Strategy",
    "beam",
    "best_prefix",
    "concordance",
    "count_paths",
    "drive",
    "exhaustive",
    "halving",
    "make_lattice",
    "path_name",
    "single",
    "trainings",
]
