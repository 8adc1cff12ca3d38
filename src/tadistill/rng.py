"""Addressed randomness: every draw names its purpose, so no draw depends on earlier ones.

A generator is a pure function of its address, for instance (seed, stage, step, purpose). Only dropout uses a global generator, whose seed
is set from an address before every update; so a resumed run needs no generator state. Arms share addresses on purpose (common random
numbers): one seed gives every arm the same data order and the same uniforms, which makes differences between arms less noisy.
"""

import hashlib

import numpy as np


def generator(*address: int | str) -> np.random.Generator:
    """Return the generator at this address; equal addresses give equal streams on every machine."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def uniforms(rows: list[int] | range, count: int, *address: int | str) -> np.ndarray:
    """Return uniforms in [0, 1), float64, of shape (len(rows), count); a row's numbers depend only on its id and the address.

    A sequence thus gets the same draws in any batch, order or process.
    """
    return np.stack([generator(*address, int(row)).random(count) for row in rows]) if len(rows) else np.empty((0, count))


def torch_seed(*address: int | str) -> int:
    """Return a seed for `torch.manual_seed` (weights, dropout)."""
    return int(generator(*address).integers(2**62))
