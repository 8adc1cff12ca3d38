"""Parts of the kit about sampling: the law of sampled tokens, and tokens a second beside `generate` and vLLM."""

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bench import VOCAB, Kit, Pair, as_in_a_stage, moved, pairs, small
from scipy.stats import chi2
from transformers import GenerationConfig, PreTrainedModel

from tadistill.models.forward import attention_for_any_shape
from tadistill.rollout import static_cache as at_fixed_shapes
from tadistill.rollout.draw import Mixture, Rollout, Speculation
from tadistill.rollout.engine import sample

SMALLEST_P = 1e-4
"""A chi-square test with a smaller p fails. The kit makes a few dozen tests."""
NEEDED = 15.0
"""A measurement of speed starts only if so many seconds are left. The slowest ones take 20, and the warm-up is half of it."""
PROMPT = (5, 17, 9)
Guide = Mixture | Speculation | None


# --- the law ------------------------------------------------------------------------------------------------------------


def p_value(tokens: np.ndarray, law_V: np.ndarray) -> float:
    """Return the p of the chi-square test. It is 0 if a token has probability 0. Rare tokens share cells."""
    observed, expected = np.bincount(tokens, minlength=len(law_V)).astype(float), law_V * len(tokens)
    if observed[law_V == 0].sum() > 0:
        return 0.0
    order = np.argsort(-expected, kind="stable")
    cells = (np.cumsum(expected[order]) / 5).astype(int)  # each number is a cell; a common token spans several
    o, e = (np.bincount(cells, weights=counts[order]) for counts in (observed, expected))
    o, e = o[e > 0], e[e > 0]
    return float(chi2.sf(((o - e) ** 2 / e).sum(), len(e) - 1))


@torch.no_grad()
def next_law(model: PreTrainedModel, ids: tuple[int, ...]) -> np.ndarray:
    """Return the model's probabilities of the next token."""
    return model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].double().softmax(-1).cpu().numpy()


def law(student_V: np.ndarray, teacher_V: np.ndarray, guide: Guide) -> np.ndarray:
    """Return the distribution from which a guided token is drawn, by its definition."""
    if isinstance(guide, Mixture):
        return (1 - guide.alpha) * student_V + guide.alpha * teacher_V
    if isinstance(guide, Speculation):  # the student's token, if it is among the teacher's k most probable ones; else the teacher's
        best = np.argsort(-teacher_V)[: guide.k]
        found = teacher_V * (1 - student_V[best].sum())
        found[best] += student_V[best]
        return found
    return student_V


def guides(teacher: PreTrainedModel) -> dict[str, Guide]:
    return {
        "alone": None,
        "mixture 0.2": Mixture(teacher, 0.2),
        "mixture 0.7": Mixture(teacher, 0.7),
        "speculation": Speculation(teacher, 5),
    }


@contextmanager
def shapes(*, fixed: bool) -> Iterator[None]:
    """Sample at fixed shapes, as on a GPU, or by the loop for CPUs."""
    before = at_fixed_shapes.DEVICES
    at_fixed_shapes.DEVICES = {"cpu", "cuda"} if fixed else set()
    try:
        yield
    finally:
        at_fixed_shapes.DEVICES = before


def sampling(kit: Kit) -> None:
    """Chi-square tests of a first and a second token, and the log-probabilities written beside them, at fixed and at growing shapes."""
    for kind in ("qwen2",) if kit.tiny else ("gpt2", "qwen2"):
        student, teacher = moved(small(kind), kit.device), moved(small(kind, seed=3, layers=3), kit.device)
        for fixed in (True, False):
            with shapes(fixed=fixed):
                _law_holds(kit, f"{kind}, {'fixed shapes' if fixed else 'growing shapes'}", student, teacher)
        _agreement(kit, kind, student, teacher)


def _law_holds(kit: Kit, title: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    rows = 1024 if kit.tiny else 16384
    q, p = next_law(student, PROMPT), next_law(teacher, PROMPT)
    uniforms = np.random.default_rng(1).random((rows, 2))
    for name, guide in guides(teacher).items():
        out = sample(student, [PROMPT] * rows, uniforms, eos=(), vocab=VOCAB, guide=guide)
        first, expected = np.array([r.tokens[0] for r in out]), law(q, p, guide)
        kit.at_least(f"{title}, {name}: p of the first token", p_value(first, expected), SMALLEST_P)
        common = int(np.bincount(first).argmax())
        longer = (*PROMPT, common)
        second = np.array([r.tokens[1] for r in out if r.tokens[0] == common])
        expected_2 = law(next_law(student, longer), next_law(teacher, longer), guide)
        kit.at_least(f"{title}, {name}: p of a second token", p_value(second, expected_2), SMALLEST_P)
        written = np.exp([r.values["behaviour"][0] for r in out[:512]])
        kit.at_most(f"{title}, {name}: error of the written probability", float(np.abs(written - expected[first[:512]]).max()), 1e-4)


def _agreement(kit: Kit, kind: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    # Rounding moves a draw only if the uniform lies beside a boundary, so almost all responses are the same
    prompts = [tuple(range(1, 2 + i % 9)) for i in range(16 if kit.tiny else 64)]
    uniforms = np.random.default_rng(2).random((len(prompts), 8 if kit.tiny else 32))
    everything: dict[str, Any] = {"eos": (0,), "vocab": VOCAB}
    here = sample(student, prompts, uniforms, guide=Mixture(teacher, 0.2), **everything)
    on_cpu = [moved(model, torch.device("cpu")) for model in (student, teacher)]
    kit.at_least(
        f"{kind}: part of the responses that equal the CPU's",
        _same(here, sample(on_cpu[0], prompts, uniforms, guide=Mixture(on_cpu[1], 0.2), **everything)),
        0.9,
    )
    alone = [sample(student, [a], uniforms[i : i + 1], guide=Mixture(teacher, 0.2), **everything)[0] for i, a in enumerate(prompts[:8])]
    kit.at_least(f"{kind}: part of the responses that do not depend on the batch", _same(alone, here[:8]), 0.75)
    with torch.inference_mode(), torch.autocast(kit.device.type, torch.bfloat16):
        half = sample(student, prompts, uniforms, guide=Mixture(moved(teacher, kit.device, torch.bfloat16), 0.2), **everything)
    finite = np.mean([bool(np.isfinite(r.values["behaviour"]).all()) for r in half])
    kit.at_least(f"{kind}: part of the bf16 responses with finite log-probabilities", float(finite), 1.0)
    kit.note(f"{kind}: part of the responses that are equal in bf16", _same(half, here))


def _same(a: list[Rollout], b: list[Rollout]) -> float:
    return float(np.mean([x.tokens == y.tokens for x, y in zip(a, b, strict=True)]))


# --- speed --------------------------------------------------------------------------------------------------------------


def sampling_speed(kit: Kit) -> None:
    """Tokens a second with bf16 weights: the built-in loop, `generate`, vLLM; and with the teacher mixed in."""
    for rows in (4,) if kit.tiny else (64, 256):  # all pairs first with few rows, in case the time ends
        for pair in pairs(kit):
            kit.free()
            student, teacher = pair.make_student(kit.device, torch.bfloat16), pair.make_teacher(kit.device)
            _sampling_speed(kit, pair, Work(rows, *((4, 4) if kit.tiny else (128, 128))), student, teacher)
    for pair in pairs(kit) if importlib.util.find_spec("vllm") and kit.cuda else ():
        with kit.attempt(f"{pair.name}: vLLM"):
            _vllm(kit, pair, pair.make_student(kit.device, torch.bfloat16))


@dataclass(frozen=True)
class Work:
    """Numbers of sequences, and of tokens of each prompt and response. No token ends a response."""

    rows: int
    prompt: int
    new: int

    def prompts(self, vocab: int) -> list[list[int]]:
        return np.random.default_rng(0).integers(1, vocab, (self.rows, self.prompt)).tolist()

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.prompt} + {self.new}"


def _sampling_speed(kit: Kit, pair: Pair, work: Work, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    prompts, uniforms = work.prompts(pair.vocab), np.random.default_rng(1).random((work.rows, work.new))
    ids, mask = torch.tensor(prompts, device=kit.device), torch.ones(work.rows, work.prompt, dtype=torch.long, device=kit.device)
    plain: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
    settings = GenerationConfig(max_new_tokens=work.new, min_new_tokens=work.new, **plain)
    title, tokens = f"{pair.name}, {work}", work.rows * work.new
    loaded = {model: as_in_a_stage(copy.deepcopy(model)) for model in (student, teacher)} if pair.kind == "gpt2" else {}
    mine_student, mine_teacher = (loaded.get(model, model) for model in (student, teacher))

    def own(guide: Guide) -> None:
        with attention_for_any_shape():
            sample(mine_student, [tuple(prompt) for prompt in prompts], uniforms, eos=(), vocab=pair.vocab, guide=guide)

    def generate(*models: PreTrainedModel) -> None:
        for model in models:
            model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]

    mine = _tokens_a_second(kit, f"{title}: ours", tokens, lambda: own(None))
    theirs = _tokens_a_second(kit, f"{title}: generate", tokens, lambda: generate(student))
    _tokens_a_second(kit, f"{title}: ours, mixture 0.2", tokens, lambda: own(Mixture(mine_teacher, 0.2)))
    _tokens_a_second(kit, f"{title}: generate, student and then teacher", tokens, lambda: generate(student, teacher))
    if mine and theirs and not kit.tiny:
        kit.at_least(f"{title}: ours, as a multiple of generate", mine / theirs, 1.0)


def _tokens_a_second(kit: Kit, name: str, tokens: int, work: Callable[[], Any]) -> float | None:
    if kit.left() < (0 if kit.tiny else NEEDED):
        kit.note(name, "no time left")
        return None
    with kit.attempt(name):
        kit.free()
        found = 1e3 * tokens / kit.milliseconds(work, repeat=1)
        kit.note(f"{name}: tokens/s", found)
        if kit.cuda:
            kit.note(f"{name}: peak GB", kit.peak())
        return found
    return None


def _vllm(kit: Kit, pair: Pair, student: PreTrainedModel) -> None:
    import vllm  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        engine = vllm.LLM(model=folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.3)
    for work in (Work(64, 128, 128), Work(256, 128, 128)):
        settings = vllm.SamplingParams(max_tokens=work.new, min_tokens=work.new, ignore_eos=True, detokenize=False, logprobs=0)
        inputs = [{"prompt_token_ids": row} for row in work.prompts(pair.vocab)]
        name, run = f"{pair.name}, {work}: vLLM", partial(engine.generate, inputs, sampling_params=settings, use_tqdm=False)
        _tokens_a_second(kit, name, work.rows * work.new, run)


# --- waits --------------------------------------------------------------------------------------------------------------


def waits(kit: Kit) -> None:
    """How often the CPU waits for the GPU, as CUDA's own debug mode counts it: per sampled token, and per update."""
    if not kit.cuda:
        kit.note("waits", "counted on CUDA only")
        return
    from training import Problem, cases

    student, teacher = moved(small("qwen2"), kit.device), moved(small("qwen2", seed=3), kit.device)
    prompts, uniforms = [tuple(range(1, 2 + i % 5)) for i in range(16)], np.random.default_rng(0).random((16, 32))
    for name, guide in guides(teacher).items():
        found = _counted(lambda guide=guide: sample(student, prompts, uniforms, eos=(), vocab=VOCAB, guide=guide))
        kit.note(f"per token, {name}", found / uniforms.shape[1])
    problem = Problem.of("qwen2")
    for case in cases():  # the first update also moves both models to the card and reads the gradients back, parameter by parameter
        one, three = (_counted(lambda case=case, steps=steps: problem.update(case, kit.device, "bf16", steps)) for steps in (1, 3))
        kit.note(f"one update of two micro-batches, {case.name}", (three - one) / 2)


def _counted(work: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)
