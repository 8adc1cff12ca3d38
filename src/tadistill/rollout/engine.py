"""What answers prompts with the student as it is now: the built-in loop here, vLLM in `tadistill.rollout.vllm`."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.rollout.generate import Mixture, Rollout, Speculation, sample


class Engine(Protocol):
    """Samples from the student with its weights of this moment."""

    student: PreTrainedModel
    decoding: Decoding

    def respond(self, prompts: Seq[tuple[int, ...]], uniforms_BT: np.ndarray, guide: Mixture | Speculation | None = None) -> list[Rollout]:
        """One response per prompt, in their order, drawn from the numbers in its row of `uniforms_BT`, at most one token a column."""
        ...


class Native:
    """The built-in loop on stock transformers; prompts of like length share a pass."""

    def __init__(self, student: PreTrainedModel, decoding: Decoding, *, eos: tuple[int, ...], vocab: int, chunk: int = 64):
        self.student, self.decoding, self.eos, self.vocab, self.chunk = student, decoding, eos, vocab, chunk

    def respond(
        self,
        prompts: Seq[tuple[int, ...]],
        uniforms_BT: np.ndarray,
        guide: Mixture | Speculation | None = None,
        tick: Callable[[int], None] = lambda answered: None,
    ) -> list[Rollout]:
        """As in `Engine`; `tick` hears how many prompts each pass answered."""
        order = np.argsort([len(p) for p in prompts], kind="stable")
        found: dict[int, Rollout] = {}
        for start in range(0, len(order), self.chunk):
            part = order[start : start + self.chunk]
            out = sample(
                self.student,
                [prompts[i] for i in part],
                uniforms_BT[part],
                eos=self.eos,
                vocab=self.vocab,
                decoding=self.decoding,
                guide=guide,
            )
            found |= dict(zip(part.tolist(), out, strict=True))
            tick(len(part))
        return [found[i] for i in range(len(prompts))]
