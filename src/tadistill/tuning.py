"""Fixed tuning constants, which are used by the code that does the work and by the plan that predicts its cost."""

TILE_BYTES = 144 * 2**20
"""Maximum bytes of logits, of student and teacher together, in one matrix product of the fused loss (`objectives.fused`)."""
GENERATION_BATCH = 64
"""Number of prompts in a batch when a teacher generates answers."""
RECORDING_BATCH = 16
"""Number of sequences in a forward pass that records a teacher's signal."""
COMPACT_BELOW = 0.8
"""Sampling removes finished rows from its caches only if the share of unfinished rows is below this value, because copies are slow."""
PACKED_FAMILIES = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2"})
"""Model families that can sample from a mixture of two models with packed sequences, without padding (`rollout.lazy`)."""
LOG_POINTS = 100
"""Minimum number of lines in the log of a training stage. A stage with fewer updates logs every update."""
WATCH_EVERY = 10
"""Minimum number of updates between two measurements of rollouts. A measurement costs about a tenth of an update."""
WATCHED_ROWS = 8
"""Number of sequences of a micro-batch on which KL, reward and entropy are measured."""
