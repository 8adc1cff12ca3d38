"""What sampling gives back, and the host's record of it while it runs. Axes: B sequences, T positions, H hidden, N of the tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """A sampled response (EOS included when it was reached) and what sampling knew of each of its tokens.

    `values` are log-probabilities in nats, float32: `student` and, with a guide, `teacher` are the models' own (temperature 1,
    whole shared vocabulary); `behaviour` is of the distribution really sampled from, after warping and mixing.
    `hidden` (T, H) is what the guide's teacher gave to its output head for each token, on the CPU in the teacher's dtype.
    """

    tokens: tuple[int, ...]
    values: dict[str, np.ndarray]
    hidden: Tensor | None = None


class Record:
    """What was sampled, on the host and for all rows, whether or not they are still in the batch."""

    def __init__(self, rows: int, steps: int, eos: tuple[int, ...], models: Iterable[str]):
        self.tokens = np.zeros((rows, steps), np.int64)
        self.lengths = np.full(rows, steps)
        self.eos = np.array(eos, np.int64)
        self.values = {name: np.zeros((rows, steps), np.float32) for name in ("behaviour", *models)}
        self.hidden: Tensor | None = None  # made when its size is known

    def say(self, rows: np.ndarray, t: np.ndarray | int, tokens: np.ndarray) -> None:
        """Write the rows' tokens at their places `t`; a row that has ended stays as long as it is."""
        self.tokens[rows, t] = tokens
        ended = (tokens[:, None] == self.eos).any(1) & (self.lengths[rows] > t)
        self.lengths[rows[ended]] = np.broadcast_to(t, rows.shape)[ended] + 1

    def score(self, rows: np.ndarray, t: np.ndarray | int, log_p: dict[str, Tensor], hidden_NH: Tensor | None) -> None:
        """Write what is known of the rows' tokens at their places `t`."""
        for name, log_p_N in log_p.items():
            self.values[name][rows, t] = log_p_N.cpu().numpy()
        if hidden_NH is not None:
            if self.hidden is None:
                self.hidden = torch.zeros(*self.tokens.shape, hidden_NH.shape[1], dtype=hidden_NH.dtype)
            self.hidden[torch.from_numpy(rows), torch.as_tensor(t)] = hidden_NH.cpu()

    def rollouts(self) -> list[Rollout]:
        """The responses, each with memory of its own."""
        found = []
        for b, n in enumerate(self.lengths.tolist()):
            values = {name: array[b, :n].copy() for name, array in self.values.items()}
            hidden = None if self.hidden is None else self.hidden[b, :n].clone()
            found.append(Rollout(tuple(self.tokens[b, :n].tolist()), values, hidden))
        return found
