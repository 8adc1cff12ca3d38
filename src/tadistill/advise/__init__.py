"""Advice on which path from a teacher to a student is worth its compute, including no chain at all, with the evidence for it."""

from tadistill.advise.decide import Advice, Experiment, Option, advise
from tadistill.advise.history import (
    Candidate,
    Edge,
    EdgeMeasures,
    History,
    Observation,
    edge_record,
    family_of,
    history,
    load_measures,
    path_edges,
)

__all__ = [
    "Advice",
    "Candidate",
    "Edge",
    "EdgeMeasures",
    "Experiment",
    "History",
    "Observation",
    "Option",
    "advise",
    "edge_record",
    "family_of",
    "history",
    "load_measures",
    "path_edges",
]
