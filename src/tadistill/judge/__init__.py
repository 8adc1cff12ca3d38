"""Rate the answers of a study's arms. The raters are a language model behind an OpenAI-compatible endpoint, or people who do not see the
names of the arms.

The command line calls `commands`. docs/reference/judge.md explains how the numbers are computed.
"""
