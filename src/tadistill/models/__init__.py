"""Models: their sources, sizes and memory, loading and saving, pruning and other changes.

`sources`, `wheels` and `counting` need no torch, so that a study can be planned without it.
"""
