"""The packed form of sparse teacher outputs on disk, with a few bytes per position of the text. This file needs no torch.

    rows = pack_top_k(ids, log_probs, tail, vocab)         # (T, top_k_bytes(k, vocab)) bytes
    ids, log_probs, tail = unpack_top_k(rows, k, vocab)

**Top-k tokens.** A row has the k most probable tokens of one position. It has a fixed number of bytes, so that any row can be read from a
memory map. Its fields are, bit by bit, with the lowest bit of a number first:

    first ids, other ids        the 10 most probable tokens and the others, each as a sorted set of ids
    first codes, other codes    7 bits for each of the first tokens and 4 bits for each other token, in the order of the ids
    first range, other range    8 bits each, in units of 1/8 nat
    tail                        16 bits: log of (probability of all other tokens / largest probability), see below

A sorted set of n ids below V is stored as in Elias 1974 and Fano 1971. The lowest l = floor(log2(V / n)) bits of every id come first. Then
there is a field in which bit (id >> l) + i is set for the i-th id. This takes about 2 + log2(V / n) bits per id. With k = 64 and
V = 131,072, an id takes 13.5 bits on average, and a plain id would take 17.

Code c of a first token stands for the log-probability L1 - c * range / 127, where L1 is the largest log-probability. Code c of another
token stands for L2 - c * range / 15, where L2 is the smallest log-probability of the first tokens. Code c of the tail stands for the
logarithm 16 - c / 1024, but code 65,535 stands for a probability of 0. L1 is not stored. It follows from the other numbers, because the
probabilities of all tokens and of the tail have the sum 1.

A code is rounded, so a log-probability, relative to L1, is wrong by at most half a step: (r + 1/8) / 254 for the first tokens, where r is
the exact range: L1 minus the smallest log-probability of the first tokens. For the others, it is wrong by at most the larger of this bound
and (s + 0.3) / 30, where s is L2 minus their smallest log-probability: L2 is rounded, and none of them can be stored above it. A stored
range is at most 31.9 nats. A token further below L1 or L2 gets the last code, and its error is larger.

**Drawn tokens.** An entry is one of the different tokens that were drawn at a position. It has ceil((i + d) / 8) bytes. The i lowest bits
are the token's id. The next d bits are the number of times that the token was drawn, minus 1. i is the number of bits of V - 1. d is the
number of bits of D - 1, where D is the number of all draws at a position.

Axes: T positions of the text, K kept tokens of a position, E entries.
"""

import numpy as np

from tadistill.config.sampling import HiddenSignal, SampledSignal, Signal, TopKSignal
from tadistill.constants import LOG_ZERO

_FIRST, _FIRST_BITS, _OTHER_BITS = 10, 7, 4
_RANGE_BITS, _PER_NAT, _TAIL_BITS, _HIGHEST, _TAIL_PER_NAT = 8, 8, 16, 16.0, 1024
_NO_TAIL = 2**_TAIL_BITS - 1


def _low_bits(count: int, vocab: int) -> int:
    return max(0, (vocab // count).bit_length() - 1)


def _set_bits(count: int, vocab: int) -> int:
    low = _low_bits(count, vocab)
    return count * low + ((vocab - 1) >> low) + count


def _groups(k: int) -> list[tuple[slice, int]]:
    # the slice of each group among the tokens sorted by probability, and the bits of its codes
    first = min(k, _FIRST)
    return [(slice(0, first), _FIRST_BITS), *([(slice(first, k), _OTHER_BITS)] if k > first else [])]


def top_k_bytes(k: int, vocab: int) -> int:
    """Return the number of bytes of a row with the k most probable tokens of one position, for a vocabulary of `vocab` tokens."""
    groups = [(places.stop - places.start, bits) for places, bits in _groups(k)]
    total = sum(_set_bits(count, vocab) + count * bits + _RANGE_BITS for count, bits in groups) + _TAIL_BITS
    return -(-total // 8)


def pack_top_k(ids_TK: np.ndarray, log_probs_TK: np.ndarray, tail_T: np.ndarray, vocab: int) -> np.ndarray:
    """Return the rows (T, top_k_bytes) of uint8. The K columns of the arguments are sorted from the most to the least probable token.
    `tail_T` is the log-probability of all other tokens together."""
    count, k = ids_TK.shape
    log_p = log_probs_TK.astype(np.float64) - log_probs_TK[:, :1]
    top_T, sets, codes, ranges = np.zeros(count), [], [], []
    for places, bits in _groups(k):
        steps = 2**bits - 1
        below = top_T[:, None] - log_p[:, places]
        # a range is at least one unit, because it is a divisor; a token far below the others gets the last code
        range_T = np.clip(np.ceil(below[:, -1] * _PER_NAT), 1, 2**_RANGE_BITS - 1)
        width_T = range_T / _PER_NAT
        code = np.clip(np.rint(below * (steps / width_T[:, None])), 0, steps).astype(np.int64)
        top_T = top_T - code[:, -1] * width_T / steps
        order = np.argsort(ids_TK[:, places], axis=1)
        sets.append(_set_fields(np.take_along_axis(ids_TK[:, places].astype(np.int64), order, 1), vocab))
        codes.append(_bits(np.take_along_axis(code, order, 1), bits))
        ranges.append(_bits(range_T.astype(np.int64)[:, None], _RANGE_BITS))
    rest = tail_T.astype(np.float64) - log_probs_TK[:, 0]
    tail = np.clip(np.rint((_HIGHEST - rest) * _TAIL_PER_NAT), 0, _NO_TAIL).astype(np.int64)
    fields = [*sets, *codes, *ranges, _bits(tail[:, None], _TAIL_BITS)]
    return np.packbits(np.concatenate(fields, axis=1), axis=1, bitorder="little")


def unpack_top_k(rows: np.ndarray, k: int, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids (T, K) as int64, their log-probabilities (T, K) and those of the tails (T,) as float32.

    In each row, the 10 most probable tokens come first, sorted by id, and then the other tokens, sorted by id.
    """
    bits_TB = np.unpackbits(rows, axis=1, bitorder="little")
    groups, at = _groups(k), 0

    def take(count: int, bits: int) -> np.ndarray:
        nonlocal at
        at += count * bits
        return _numbers(bits_TB[:, at - count * bits : at], count, bits)

    ids = []
    for places, _ in groups:
        count = places.stop - places.start
        low = take(count, bits) if (bits := _low_bits(count, vocab)) else 0
        length = _set_bits(count, vocab) - count * bits
        high = np.nonzero(bits_TB[:, at : at + length])[1].reshape(len(rows), count) - np.arange(count)
        at += length
        ids.append((high << bits) + low)
    codes = [take(places.stop - places.start, bits) for places, bits in groups]
    ranges = [take(1, _RANGE_BITS) / _PER_NAT for _ in groups]
    tail = take(1, _TAIL_BITS)
    top, found = np.zeros((len(rows), 1)), []
    for (_, bits), code, width in zip(groups, codes, ranges, strict=True):
        found.append(top - code * (width / (2**bits - 1)))
        top = found[-1].min(1, keepdims=True)
    rest = np.where(tail == _NO_TAIL, LOG_ZERO, _HIGHEST - tail / _TAIL_PER_NAT)
    log_p = np.concatenate([*found, rest], axis=1)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    log_p = log_p.astype(np.float32)
    return np.concatenate(ids, axis=1), log_p[:, :-1], log_p[:, -1]


def _set_fields(ids_TK: np.ndarray, vocab: int) -> np.ndarray:
    count, k = ids_TK.shape
    low = _low_bits(k, vocab)
    upper = np.zeros((count, ((vocab - 1) >> low) + k), np.uint8)
    np.put_along_axis(upper, (ids_TK >> low) + np.arange(k), 1, axis=1)
    return np.concatenate([_bits(ids_TK & ((1 << low) - 1), low), upper], axis=1)


def _bits(numbers_TK: np.ndarray, bits: int) -> np.ndarray:
    return ((numbers_TK[:, :, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(numbers_TK), -1)


def _numbers(bits_TB: np.ndarray, count: int, bits: int) -> np.ndarray:
    # numbers of up to 32 bits: bits -> whole bytes -> one integer
    size = next(n for n in (1, 2, 4) if 8 * n >= bits)
    whole = np.zeros((len(bits_TB), count, 8 * size), np.uint8)
    whole[:, :, :bits] = bits_TB.reshape(len(bits_TB), count, bits)
    return np.packbits(whole, axis=2, bitorder="little").view(f"<u{size}")[:, :, 0].astype(np.int64)


# --- drawn tokens -------------------------------------------------------------------------------------------------------


def entry_bytes(draws: int, vocab: int) -> int:
    """Return the number of bytes of an entry: one drawn token, and the number of times that it was drawn in `draws` draws."""
    return max(1, -(-((vocab - 1).bit_length() + (draws - 1).bit_length()) // 8))


def pack_entries(ids_E: np.ndarray, counts_E: np.ndarray, draws: int, vocab: int) -> np.ndarray:
    """Return the entries (E, entry_bytes) of uint8, for token ids (E,) and the number of times (E,) that each was drawn."""
    numbers = (ids_E.astype(np.uint64) | (counts_E.astype(np.uint64) - np.uint64(1)) << np.uint64((vocab - 1).bit_length())).astype("<u8")
    return np.ascontiguousarray(numbers[:, None].view(np.uint8)[:, : entry_bytes(draws, vocab)])


def unpack_entries(entries: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids (E,) and the number of times (E,) that each was drawn, as int64."""
    whole = np.zeros((len(entries), 8), np.uint8)
    whole[:, : entries.shape[1]] = entries
    numbers, bits = whole.view("<u8")[:, 0].astype(np.int64), (vocab - 1).bit_length()
    return numbers & ((1 << bits) - 1), (numbers >> bits) + 1


def token_bytes(signal: Signal, hidden: int, vocab: int) -> int:
    """Return the number of bytes on disk of a teacher's recorded output at one token of the text.

    For drawn tokens, it is an upper limit, because the number of different drawn tokens varies.

    Args:
        hidden: width of the teacher's hidden states.
        vocab: number of tokens of the teacher's vocabulary.
    """
    match signal:
        case HiddenSignal(dtype=dtype):
            return hidden * {"float32": 4, "bfloat16": 2}[dtype]
        case TopKSignal(dtype="packed", k=k):
            return top_k_bytes(min(k, vocab), vocab)
        case TopKSignal(k=k, tail=tail):
            return 8 * min(k, vocab) + 4 * (tail == "lump")
        case SampledSignal(draws=draws):
            return min(draws, vocab) * entry_bytes(draws, vocab) + 6
