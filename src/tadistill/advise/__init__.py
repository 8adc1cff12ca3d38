"""Advice on whether a chain of assistants between a teacher and a student is worth its compute, with the evidence."""
