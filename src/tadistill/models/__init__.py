"""Models: where they come from, how large they are, how they are loaded, saved and pruned.

`sources`, `sizes` and `memory` import no torch and are re-exported here; `loading`, `scratch`, `pruning` and `forward` are
imported by their own paths, so that planning on a login node never loads torch.
"""

from tadistill.models.counting.memory import check_memory, resident_bytes
from tadistill.models.counting.sizes import Size, Work, forward_flops, read_config, size_of, with_layers
from tadistill.models.sources import Source, fetch, fingerprint, locate, parse

__all__ = [
    "Size",
    "Source",
    "Work",
    "check_memory",
    "fetch",
    "fingerprint",
    "forward_flops",
    "locate",
    "parse",
    "read_config",
    "resident_bytes",
    "size_of",
    "with_layers",
]
