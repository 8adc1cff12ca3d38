"""Paths from a teacher to a student: the lattice of all of them, strategies that search it, and rules of thumb. Needs numpy only."""

from tadistill.search.strategies import best_prefix, concordance, drive, make_lattice

__all__ = ["best_prefix", "concordance", "drive", "make_lattice"]
