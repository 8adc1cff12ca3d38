"""Mixed sampling in which each model reads only when it has to says the same as the loop in which both read every token."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tests.conftest import shared_model, tiny_model
from tests.unit.rollout.test_generate import EOS, FAMILIES, GREEDY, PROMPTS, VOCAB, assert_equal, full_forward, log_probs, uniforms
from torch.utils._python_dispatch import TorchDispatchMode

from tadistill.config.common import Decoding
from tadistill.rollout import teacher_mixed_fast
from tadistill.rollout.decoder import way_of
from tadistill.rollout.draw import Mixture, Speculation
from tadistill.rollout.engine import sample

STEPS = 24


@contextmanager
def counted(model):
    """The number of tokens in every call of the model."""
    calls = []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True)
    yield calls
    handle.remove()


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def in_step(monkeypatch, *args, **settings):
    """The loop over positions."""
    with monkeypatch.context() as patch:
        patch.setattr(teacher_mixed_fast, "possible", lambda *_: False)
        return sample(*args, **settings)


ALPHAS = [(family, alpha) for family in ("gpt2", "llama") for alpha in (0.0, 0.05, 0.5, 1.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "alpha"), [*((family, 0.2) for family in FAMILIES), *ALPHAS])
def test_equals_the_loop_over_positions(family, alpha, monkeypatch):
    student, teacher = shared_model(family), shared_model(family, seed=3, layers=3)
    args = student, PROMPTS, uniforms(8, STEPS)
    settings = {"eos": EOS, "vocab": VOCAB, "guide": Mixture(teacher, alpha)}
    with counted(teacher) as calls:
        found = sample(*args, **settings)
    with counted(teacher) as calls_in_step:
        expected = in_step(monkeypatch, *args, **settings)
    assert_equal(found, expected)
    assert len({len(r.tokens) for r in found}) > 2  # some end early
    assert len(calls) <= len(calls_in_step) + 1
    # nothing is read twice, and no padding: a prompt, and a response but for its last token
    assert sum(calls) == sum(len(p) + len(r.tokens) - 1 for p, r in zip(PROMPTS, found, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_gpu_has_masks_of_aligned_width(family, monkeypatch):
    """Otherwise every layer copies the mask. Hidden columns change nothing."""
    widths, mask = [], teacher_mixed_fast._Places.mask
    monkeypatch.setattr(teacher_mixed_fast._Places, "mask", lambda *args: (found := mask(*args), widths.append(found.shape[-1]))[0])
    student, teacher = shared_model(family), shared_model(family, seed=3, layers=3)
    args, settings = (student, PROMPTS, uniforms(8, STEPS)), {"eos": EOS, "vocab": VOCAB, "guide": Mixture(teacher, 0.2)}
    expected = sample(*args, **settings)
    assert any(width % 8 for width in widths)
    widths.clear()
    monkeypatch.setattr(teacher_mixed_fast, "_ALIGNS", {"cpu"})
    assert_equal(sample(*args, **settings), expected)
    assert not any(width % 8 for width in widths)


def test_a_rectangle_of_queries_is_one_operation():
    """Places without a token have any token. Zeros in these places would need one kernel more in each layer."""
    rows_N, columns_N = np.array([0, 0, 2]), np.array([3, 4, 1])
    some = np.zeros(0, np.int64)
    call = teacher_mixed_fast._Call(np.array([7, 8, 9]), rows_N, columns_N, some, some, np.zeros(0))
    places, values = teacher_mixed_fast._Places(call, 3, 8, torch.device("cpu")), torch.randn(3, 2, 4)
    with Operations() as seen:
        spread = places.spread(values)
    assert [name for name in seen.names if name != "view"] == ["index_select"]
    assert spread.shape == (3, 2, 2, 4)
    torch.testing.assert_close(places.pack(spread), values, rtol=0, atol=0)


def test_a_model_may_read_only_prompts_in_a_call(monkeypatch):
    """The teacher draws the first token of every row, so the student reads a long prompt and predicts nothing."""
    student, teacher, numbers = shared_model("llama"), shared_model("llama", seed=3, layers=3), uniforms(1, STEPS)
    numbers[:, 0] = 0.1
    args, settings = (student, [tuple(range(1, 21))], numbers), {"eos": EOS, "vocab": VOCAB, "guide": Mixture(teacher, 0.2)}
    assert_equal(sample(*args, **settings), in_step(monkeypatch, *args, **settings))


@pytest.mark.parametrize("wide", [False, True])
def test_models_of_two_families_and_windows_wider_than_the_text(wide, monkeypatch):
    student, teacher = shared_model("gpt2"), shared_model("mistral", seed=3, sliding_window=64 if wide else None)
    args, settings = (student, PROMPTS, uniforms(8, STEPS)), {"eos": EOS, "vocab": VOCAB, "guide": Mixture(teacher, 0.2)}
    with counted(teacher) as calls:
        found = sample(*args, **settings)
    assert len(calls) < STEPS
    assert_equal(found, in_step(monkeypatch, *args, **settings))


def test_a_model_can_guide_itself(monkeypatch):
    model = shared_model("llama")
    args, settings = (model, PROMPTS, uniforms(8, STEPS)), {"eos": EOS, "vocab": VOCAB, "guide": Mixture(model, 0.5)}
    assert_equal(sample(*args, **settings), in_step(monkeypatch, *args, **settings))
    assert model.config._attn_implementation == "sdpa"


def test_values_are_those_of_a_full_forward_pass():
    student, teacher = shared_model("qwen2"), shared_model("qwen2", seed=3)
    for rollout, prompt in zip(
        sample(student, PROMPTS, uniforms(8, STEPS), eos=EOS, vocab=VOCAB, guide=Mixture(teacher, 0.2)), PROMPTS, strict=True
    ):
        (of_student, _), (of_teacher, hidden) = (full_forward(m, prompt, rollout.tokens) for m in (student, teacher))
        mixed = (0.8 * of_student.softmax(-1) + 0.2 * of_teacher.softmax(-1)).log()
        for name, logits in (("student", of_student), ("teacher", of_teacher), ("behaviour", mixed)):
            np.testing.assert_allclose(rollout.values[name], log_probs(logits, rollout.tokens), atol=2e-4)
        torch.testing.assert_close(rollout.hidden, hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "most"), [(0.05, 12), (0.2, 32), (0.5, 56)])
def test_the_teacher_is_called_less_often_than_there_are_tokens(alpha, most):
    student, teacher = shared_model("llama"), shared_model("llama", seed=3)
    with counted(teacher) as calls, counted(student) as calls_of_student:
        sample(student, PROMPTS * 2, uniforms(16, 64), eos=(), vocab=VOCAB, guide=Mixture(teacher, alpha))
    assert len(calls) <= most
    assert len(calls_of_student) <= 100
    assert max(calls[1:]) <= 16 * 9  # so that memory is bounded


def test_no_model_falls_far_behind_at_the_ends_of_alpha():
    student, teacher = shared_model("llama"), shared_model("llama", seed=3)
    for alpha, behind in ((0.0, teacher), (1.0, student)):
        with counted(behind) as calls:
            sample(student, PROMPTS, uniforms(8, 64), eos=(), vocab=VOCAB, guide=Mixture(teacher, alpha))
        assert len(calls) <= 10
        assert max(calls[1:]) <= 8 * 9


def test_the_switch_leaves_a_uniform_for_the_choice():
    numbers = torch.from_numpy(uniforms(100, 100))
    teachers, rest = Mixture(shared_model("llama"), 0.2).switch(numbers)
    assert abs(teachers.double().mean() - 0.2) < 0.015
    for part in (rest[teachers], rest[~teachers]):
        assert 0 <= part.min() <= part.max() < 1
        counts = torch.histc(part, 10, 0, 1)
        expected = len(part) / 10
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # the 0.999 quantile
    _, rest = Mixture(shared_model("llama"), 0.2).switch(torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert rest < 1


@pytest.mark.parametrize("case", ["window", "eager", "family", "warping", "greedy", "speculation"])
def test_what_cannot_be_packed_goes_in_step(case, monkeypatch):
    student = shared_model("mistral")
    teacher = tiny_model("mistral", seed=3, **({"sliding_window": 6} if case == "window" else {}))
    if case == "eager":
        teacher.set_attn_implementation("eager")
    if case == "family":
        monkeypatch.setattr(teacher_mixed_fast, "PACKED_FAMILIES", {"llama"})
    decoding = {"warping": Decoding(top_p=0.9), "greedy": GREEDY}.get(case, Decoding())
    guide = Speculation(teacher, 3) if case == "speculation" else Mixture(teacher, 0.2)
    way_of(teacher)  # tries the model once
    with counted(teacher) as calls:
        sample(student, PROMPTS, uniforms(8, STEPS), eos=(), vocab=VOCAB, decoding=decoding, guide=guide)
    assert len(calls) == STEPS
