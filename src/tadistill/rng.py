"""Random numbers from addresses. The same address, such as (seed, stage, step, purpose), always gives the same random numbers.

No random number depends on earlier draws. Only dropout uses torch's global generator, which is seeded from an address before every update.
So a resumed run needs no saved generator state.

All arms of a study use the same data order and the same random numbers for the same seed, so that their differences are less noisy.
"""

import hashlib

import numpy as np


def generator(*address: int | str) -> np.random.Generator:
    """Return a new NumPy generator for this address. Equal addresses give equal random numbers on every machine."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def uniforms(rows: list[int] | range, count: int, *address: int | str) -> np.ndarray:
    """Return float64 random numbers in [0, 1), of shape (len(rows), count).

    The numbers of a row depend only on the row's id and the address. So a sequence gets the same numbers in any batch, order or process.
    """
    return np.stack([generator(*address, int(row)).random(count) for row in rows]) if len(rows) else np.empty((0, count))


def torch_seed(*address: int | str) -> int:
    """Return a seed for `torch.manual_seed`, computed from an address. It is used for initial weights and dropout."""
    return int(generator(*address).integers(2**62))
