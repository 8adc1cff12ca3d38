"""Fixed tuning constants. The code that does the work and the plan that predicts its cost both read them here."""

TILE_BYTES = 144 * 2**20
"""Logits of one matrix product in the fused loss (`objectives.fused`), of both models together."""
GENERATION_BATCH = 64
"""Prompts that a teacher answers at a time in a generate stage."""
RECORDING_BATCH = 16
"""Sequences in a forward pass of a teacher whose signal is recorded."""
COMPACT_BELOW = 0.8
"""Share of unfinished rows below which sampling drops the finished rows from its caches: above it the copy costs more than it saves."""
PACKED_FAMILIES = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2"})
"""Families that can read sequences of unequal length without padding while a mixture of two models samples."""
LOG_POINTS = 100
"""Least number of lines in a training stage's log, if it has as many updates."""
WATCH_EVERY = 10
"""Least number of updates between two measurements of rollouts, each of which costs about a tenth of an update."""
WATCHED_ROWS = 8
"""Sequences of a micro-batch on which KL, reward and entropy are measured."""
