"""Search for a good path from a teacher to a student through assistants: strategies that train some of the paths, and rules of thumb."""

from tadistill.search.strategies import best_prefix, concordance, drive, make_lattice

__all__ = ["best_prefix", "concordance", "drive", "make_lattice"]
