"""Paths from a teacher to a student: the lattice of all paths, search strategies, and rules of thumb. The package needs only numpy."""

from tadistill.search.strategies import best_prefix, concordance, drive, make_lattice

__all__ = ["best_prefix", "concordance", "drive", "make_lattice"]
