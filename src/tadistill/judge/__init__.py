"""Ratings of a study's answers, by a language model behind an OpenAI-compatible endpoint or by people on a blind sheet.

The command line calls `commands`. docs/reference/judge.md explains how the numbers are computed.
"""
