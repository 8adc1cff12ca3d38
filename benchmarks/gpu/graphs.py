"""Part of the kit that tries CUDA graphs: one step of sampling at fixed shapes is recorded, and repeated for every further token.

This is an experiment and no code of the product, which starts all kernels of a step again for every token. Two things are in the way there.
The hooks that count FLOPs are Python, which a graph does not run again. And a graph belongs to one number of rows and one capacity of the
caches. On a CPU, the same code runs without a recording.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench import Kit, Pair, as_in_a_stage, pairs
from transformers import PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.models.forward import attention_for_any_shape, evaluating
from tadistill.rollout.draw import Mixture, teacher_tap
from tadistill.rollout.static_cache import Columns, Said, Step

WARM = 3
"""Steps before the recording. The first ones allocate what later steps reuse."""
NEEDED = 25.0
"""A comparison starts only if so many seconds are left."""


def graphs(kit: Kit) -> None:
    """A step of sampling that is recorded as a CUDA graph and repeated, against the same steps without a graph."""
    for pair in pairs(kit):
        kit.free()
        student = as_in_a_stage(pair.make_student(kit.device, torch.bfloat16))
        teacher = as_in_a_stage(pair.make_teacher(kit.device))
        for name, guide in (("student", None), ("mixture 0.2", Mixture(teacher, 0.2))):
            if kit.left() < (0 if kit.tiny else NEEDED):
                kit.note(f"{pair.name}, {name}", "no time left")
                continue
            with kit.attempt(f"{pair.name}, {name}"):
                _compare(kit, pair, name, student, guide)


@dataclass(frozen=True)
class _Found:
    tokens: np.ndarray
    log_probs: np.ndarray
    seconds: float
    """Seconds of the steps that are timed."""
    steps: int


def _compare(kit: Kit, pair: Pair, name: str, student: PreTrainedModel, guide: Mixture | None) -> None:
    rows, prompt, new = (4, 4, 8) if kit.tiny else (64, 128, 128)
    draw = np.random.default_rng(0)
    prompts = [tuple(row) for row in draw.integers(1, pair.vocab, (rows, prompt)).tolist()]
    common: Any = (kit, student, guide, prompts, draw.random((rows, new)), pair.vocab)
    plain = _sampled(*common, lambda step: step)
    recorded = _sampled(*common, _record if kit.cuda else lambda step: step)
    title = f"{pair.name}, {name}, {rows} rows of {prompt} + {new}"
    for way, found in (("without a graph", plain), ("with a graph", recorded)):
        kit.note(f"{title}, {way}: ms a step", 1e3 * found.seconds / found.steps)
    kit.note(f"{title}: time as a part of that without a graph", recorded.seconds / plain.seconds)
    kit.at_least(f"{title}: part of the tokens that are equal", float((plain.tokens == recorded.tokens).mean()), 1.0)
    apart = np.abs(plain.log_probs - recorded.log_probs)[plain.tokens == recorded.tokens]
    kit.note(f"{title}: largest difference of a log-probability", float(apart.max()))


@torch.inference_mode()
def _sampled(
    kit: Kit,
    student: PreTrainedModel,
    guide: Mixture | None,
    prompts: list[tuple[int, ...]],
    uniforms: np.ndarray,
    vocab: int,
    prepare: Callable[[Step], Callable[[], object]],
) -> _Found:
    models = {"student": student} | ({"teacher": guide.teacher} if guide else {})
    with attention_for_any_shape(), evaluating(student), teacher_tap(guide) as seen:
        columns = Columns(models, prompts, uniforms.shape[1], vocab)
        said = Said(uniforms, np.zeros(0, np.int64), models, columns.device)  # no token ends a response
        step = Step(columns, said, Decoding(), guide, seen)
        step.say(columns.prompts())
        _warm(kit, step)
        repeat, steps = prepare(step), uniforms.shape[1] - 1 - WARM
        kit.wait()
        start = time.perf_counter()
        for _ in range(steps):
            repeat()
        kit.wait()
        seconds = time.perf_counter() - start
    return _Found(said.tokens_BT.cpu().numpy(), said.values["behaviour"].cpu().numpy(), seconds, steps)


def _warm(kit: Kit, step: Step) -> None:
    if not kit.cuda:
        for _ in range(WARM):
            step()
        return
    beside = torch.cuda.Stream()  # as torch advises before a recording
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(beside)


def _record(step: Step) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # starts no kernel, so the step is not done yet
        step()
    return graph.replay
