"""Addressed randomness: every draw names what it is for, so no draw depends on what was drawn before it.

A generator is a pure function of its address, for instance (seed, stage, step, purpose). Nothing in the project uses a
global generator except dropout, whose seed is set from an address before every update; a resumed run therefore needs no
generator state. Arms share their addresses on purpose (common random numbers): the same seed gives every arm the same
data order and the same uniforms, which makes their differences less noisy.
"""

import hashlib

import numpy as np


def generator(*address: int | str) -> np.random.Generator:
    """The generator at this address; equal addresses give equal streams on every machine."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def uniforms(rows: list[int] | range, count: int, *address: int | str) -> np.ndarray:
    """(len(rows), count) uniforms in [0, 1), float64; a row's numbers depend on its id and the address alone.

    A sequence therefore gets the same draws whatever batch, order or process it is sampled in.
    """
    return np.stack([generator(*address, int(row)).random(count) for row in rows]) if len(rows) else np.empty((0, count))


def torch_seed(*address: int | str) -> int:
    """A seed for `torch.manual_seed` inside a fork (weights, dropout)."""
    return int(generator(*address).integers(2**62))
