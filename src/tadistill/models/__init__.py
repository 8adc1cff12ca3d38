"""Models: sources, sizes, memory, loading, saving and pruning. Only `sources`, `wheels` and `counting` work without torch."""
