"""Recommend a way to distil: directly from teacher to student, or through teacher assistants at the same compute."""
