"""Paths from a teacher to a student through assistants: the list of all paths, strategies that search it, and rules of thumb."""

from tadistill.search.strategies import best_prefix, concordance, drive, make_lattice

__all__ = ["best_prefix", "concordance", "drive", "make_lattice"]
