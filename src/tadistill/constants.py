"""Constants that are used twice: by the code that trains and samples, and by the plan, which predicts the cost without importing torch. The
rules for a missed budget and for the number of training seeds are here too."""

LOG_ZERO = -1e15
"""A finite value that replaces log 0. It is below every real logit, and its square does not overflow in float32."""
TILE_BYTES = 144 * 2**20
"""Maximum size in bytes of the logits of student and teacher together, in one matrix product of `objectives.fused_loss`."""
TILE_ROWS = 384
"""Maximum number of tokens in one matrix product of the fused loss on a CPU. More tokens would need more memory and save no time."""
OBJECTIVE = 3
"""Largest size of an objective's temporary tensors on a GPU, as a multiple of the logits of student and teacher. It is 1 for reverse KL
and 2.5 for the Jensen-Shannon divergence, from models whose heads have no bias."""
STAGES_PER_GPU = "TADISTILL_STAGES_PER_GPU"
"""Environment variable of a stage's process: how many stages may use its GPU at the same time. `runner.processes` sets it."""
GENERATION_BATCH = 64
"""Number of prompts in a batch when a teacher generates answers."""
RECORDING_BATCH = 16
"""Number of sequences in a forward pass that records a teacher's outputs before training."""
COMPACT_BELOW = 0.8
"""Sampling removes finished rows from its key-value caches when the share of unfinished rows is below this value. Removing them at every
step would be slow, because the caches are copied."""
PACKED_FAMILIES = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2"})
"""Model families for which `rollout.teacher_mixed_fast` samples from two models on packed sequences, without padding."""
OFF_BUDGET = 0.1
"""Two arms are not compared at equal compute if their FLOPs differ by more than this share."""


def misses_budget(share: float | None) -> bool:
    """Return True if a part of a budget, such as `of_budget` of an arm, is known and differs from 1 by more than `OFF_BUDGET`."""
    return share is not None and abs(share - 1) > OFF_BUDGET


SEEDS_FOR_A_CLAIM = 3
"""Minimum number of common training seeds for a claim about two arms, if one of them is trained."""


def enough_seeds(seeds: int, *, trained: bool) -> bool:
    """Return True if a claim about two arms with `seeds` common training seeds is possible. `trained` says if one of them is trained."""
    return seeds >= SEEDS_FOR_A_CLAIM or not trained


LOG_POINTS = 100
"""Minimum number of lines in the log of a training stage. A stage with fewer updates logs every update."""
WATCH_EVERY = 10
"""Minimum number of updates between two measurements of the sampled text. A measurement takes about a tenth of an update's time."""
WATCHED_ROWS = 8
"""Number of sequences of a measured update on which metrics of the sampled text are computed that need a forward pass, such as entropy."""
