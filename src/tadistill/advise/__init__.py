"""Advice on whether a path with teacher assistants is worth its compute, compared with direct distillation."""
