"""Models: where they come from, their sizes and memory, loading, saving and pruning. Only `sources`, `wheels` and `counting` work without
torch."""
