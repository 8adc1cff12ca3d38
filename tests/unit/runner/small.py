"""A study of one fine-tuning and its evaluation, which takes a second."""

_RECIPE = """
study: small
seeds: [1]
models:
  MODEL:
    load: scratch:gpt2
    tokenizer: tinyworld
    config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}
    sft: {optim: {steps: 8, batch: 4}, select: {metric: loss, every: 2}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_length: 40, limit: {train: 64, dev: 4, test: 4}}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
arms: {sft: MODEL}
"""


def small(model: str) -> str:
    """Return the recipe, with this name for its model."""
    return _RECIPE.replace("MODEL", model)
