"""Answers rated by a language model behind an OpenAI-compatible endpoint, or by people on a blind sheet.

`commands` is what the command line calls; docs/judge.md says how the numbers are made. Imports no torch.
"""
