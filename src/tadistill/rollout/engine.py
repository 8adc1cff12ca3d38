"""Engines sample responses from the current student. `Native` is the built-in loop, and `Vllm` uses vLLM."""

import importlib
import os
import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.errors import ConfigError
from tadistill.rollout.generate import Mixture, Rollout, Speculation, sample

_MEMORY = 0.3  # share of the GPU for vLLM's weights and KV cache


class Engine(Protocol):
    """The interface of an engine. An engine samples with the student's current weights."""

    student: PreTrainedModel
    decoding: Decoding

    def respond(self, prompts: Seq[tuple[int, ...]], uniforms_BT: np.ndarray, guide: Mixture | Speculation | None = None) -> list[Rollout]:
        """Return one response per prompt, in order. Token t of response b is drawn with the random number `uniforms_BT[b, t]`."""
        ...


class Native:
    """The built-in sampling loop for transformers models. It samples `chunk` prompts of similar length in one batch."""

    def __init__(self, student: PreTrainedModel, decoding: Decoding, *, eos: tuple[int, ...], vocab: int, chunk: int = 64):
        self.student, self.decoding, self.eos, self.vocab, self.chunk = student, decoding, eos, vocab, chunk

    def respond(
        self,
        prompts: Seq[tuple[int, ...]],
        uniforms_BT: np.ndarray,
        guide: Mixture | Speculation | None = None,
        tick: Callable[[int], None] = lambda answered: None,
    ) -> list[Rollout]:
        """Return responses like `Engine.respond`. After each batch, call `tick` with the number of prompts in the batch."""
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


class Vllm:
    """Sampling with vLLM on the student's GPU (`pip install 'tadistill[vllm]'`; CUDA only).

    vLLM has its own copy of the student. Every call first copies the current weights to it. The seed of a sequence is made from its random
    numbers, so the same machine and vLLM version give the same tokens again. The tokens differ from those of `Native`.
    """

    def __init__(self, student: PreTrainedModel, decoding: Decoding, *, eos: tuple[int, ...], vocab: int):
        """Start vLLM. Raises ConfigError if vLLM is not installed."""
        self.student, self.decoding, self.eos, self.vocab = student, decoding, eos, vocab
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the copy must be in this process to receive weights
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(
                "`engine: vllm` needs the package vllm; run pip install 'tadistill[vllm]', or set `engine: native`"
            ) from error
        with tempfile.TemporaryDirectory() as directory:
            student.save_pretrained(directory)
            self._llm = self._vllm.LLM(
                model=directory,
                skip_tokenizer_init=True,
                dtype=str(student.dtype).removeprefix("torch."),
                gpu_memory_utilization=_MEMORY,
                enable_prefix_caching=False,  # it would serve keys and values of old weights
                logprobs_mode="processed_logprobs",
            )

    def respond(self, prompts: Seq[tuple[int, ...]], uniforms_BT: np.ndarray, guide: Mixture | Speculation | None = None) -> list[Rollout]:
        """Return responses like `Engine.respond`. They have no log-probabilities if the decoding settings change the distribution."""
        assert guide is None, "vLLM cannot sample with a teacher, and a recipe that asks for it is refused"
        weights = [(name, parameter.detach()) for name, parameter in self.student.named_parameters()]
        self._llm.apply_model(lambda model: model.load_weights(weights))
        settings = [self._settings(uniforms_BT.shape[1], int(row[0] * 2**31)) for row in uniforms_BT]
        inputs = [{"prompt_token_ids": list(p)} for p in prompts]
        answers = self._llm.generate(inputs, sampling_params=settings, use_tqdm=False)
        return [self._rollout(answer.outputs[0]) for answer in answers]

    def _settings(self, max_tokens: int, seed: int) -> Any:
        decoding, wider = self.decoding, self.student.config.get_text_config().vocab_size > self.vocab
        return self._vllm.SamplingParams(
            temperature=decoding.temperature,
            top_k=decoding.top_k or 0,
            top_p=decoding.top_p,
            min_p=decoding.min_p,
            max_tokens=max_tokens,
            stop_token_ids=list(self.eos),
            seed=seed,
            logprobs=0,  # log-probability of the sampled token only
            detokenize=False,
            allowed_token_ids=list(range(self.vocab)) if wider else None,
        )

    def _rollout(self, output: Any) -> Rollout:
        tokens = tuple(output.token_ids)
        if not self.decoding.plain:
            return Rollout(tokens, {})
        log_q = np.array([found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True)], np.float32)
        return Rollout(tokens, {"behaviour": log_q, "student": log_q})
