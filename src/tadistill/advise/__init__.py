"""Advice on which path from a teacher to a student is worth its compute, including no chain at all, with the evidence for it."""
