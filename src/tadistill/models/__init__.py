"""Models: sources, sizes, memory, loading and saving, pruning. Only `sources`, `wheels` and `counting` work without torch."""
