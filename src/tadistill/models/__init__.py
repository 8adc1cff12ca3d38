"""Language models: find, download, load, save, change and prune them, run teachers, and compute the sizes and the memory of models."""
