"""Which path from a teacher to a student is worth its compute, including none: measured, predicted, and honest about what is not known."""
