"""Which path from a teacher to a student is worth its compute, including none, with the evidence for it. Imports no torch here."""

from tadistill.advise.decide import Advice, Experiment, Option, advise
from tadistill.advise.edges import Candidate, Edge, EdgeMeasures, Observation
from tadistill.advise.history import History, edge_record, family_of, history, load_measures, path_edges

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
