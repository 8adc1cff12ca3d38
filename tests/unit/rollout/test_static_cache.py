"""Sampling at fixed shapes says the same as the loops, and a step asks nothing of the host: recorded once, it can be repeated."""

from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from tests.conftest import shared_model, tiny_model
from tests.families import tiny
from tests.unit.rollout.test_generate import ALL_OPTIONS, EOS, FAMILIES, GREEDY, PROMPTS, VOCAB, assert_equal, assert_frequencies, uniforms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tadistill.config.common import Decoding
from tadistill.rollout import static_cache, teacher_mixed_fast
from tadistill.rollout.decoder import Trial, way_of
from tadistill.rollout.draw import Mixture, Record, Speculation
from tadistill.rollout.engine import Native, sample

STEPS = 12
EQUAL = [(5, 6, 7), (9, 8, 7), (3, 4, 5)]
WARPED = Decoding(**ALL_OPTIONS | {"no_repeat_ngram": None})


@contextmanager
def path(monkeypatch, *, in_step: bool):
    """Sample at fixed shapes, or with the loop over positions."""
    with monkeypatch.context() as patch:
        patch.setattr(static_cache, "DEVICES", {"cpu"} if in_step else set())
        patch.setattr(teacher_mixed_fast, "possible", lambda *_: False)
        yield


def assert_same(monkeypatch, student, prompts=PROMPTS, *, eos=EOS, **settings):
    """Assert that both ways say the same, and return it."""
    args = student, prompts, uniforms(len(prompts), STEPS)
    with path(monkeypatch, in_step=True), monkeypatch.context() as patch:
        patch.setattr("tadistill.rollout.engine._fill", None)
        found = sample(*args, eos=eos, vocab=VOCAB, **settings)
    with path(monkeypatch, in_step=False):
        expected = sample(*args, eos=eos, vocab=VOCAB, **settings)
    assert_equal(found, expected)
    return found


GUIDES = {"alone": lambda _: None, "mixture": lambda teacher: Mixture(teacher, 0.3), "speculation": lambda teacher: Speculation(teacher, 3)}


@pytest.mark.parametrize(("family", "guide"), [*((f, "mixture") for f in FAMILIES), ("gpt2", "alone"), ("qwen2", "speculation")])
def test_equals_the_loop_over_positions(family, guide, monkeypatch):
    """With padding, and with rows that end early."""
    student, teacher = shared_model(family), shared_model(family, seed=3, layers=3)
    found = assert_same(monkeypatch, student, guide=GUIDES[guide](teacher))
    assert len({len(r.tokens) for r in found}) > 1
    assert all((r.hidden is None) == (guide == "alone") for r in found)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_equals_the_loop_for_gemma(kind, monkeypatch):
    """With scaled embeddings, tied heads and (gemma2) capped scores in eager attention; its windows are wider than the text."""
    changes = {"layer_types": ["full_attention"] * 2} if kind == "gemma2" else {}
    assert_same(monkeypatch, tiny(kind, **changes), eos=())


@pytest.mark.parametrize("case", ["no padding", "greedy", "warped", "guided by itself", "two families", "wide window"])
def test_equals_the_loop_in_every_setting(case, monkeypatch):
    student, teacher = shared_model("llama"), shared_model("mistral", seed=3, sliding_window=64 if case == "wide window" else None)
    guide = Mixture(student if case == "guided by itself" else teacher, 0.3)
    decoding = {"greedy": GREEDY, "warped": WARPED}.get(case, Decoding())
    if case == "two families":
        student = shared_model("gpt2")
    assert_same(monkeypatch, student, EQUAL if case == "no padding" else PROMPTS, decoding=decoding, guide=guide)


@pytest.mark.parametrize("case", ["narrow window", "no repeated n-grams", "state", "no padding possible"])
def test_what_it_does_not_support_goes_the_usual_way(case, monkeypatch):
    model = {"state": lambda: tiny("mamba"), "no padding possible": lambda: tiny("rwkv"), "narrow window": lambda: tiny("gemma3_text")}.get(
        case, lambda: shared_model("llama")
    )()
    decoding = Decoding(no_repeat_ngram=3) if case == "no repeated n-grams" else Decoding()
    assert not static_cache.possible(model, 32, decoding)
    monkeypatch.setattr(static_cache, "fill", None)
    with path(monkeypatch, in_step=True):
        rollouts = sample(model, PROMPTS[:3], uniforms(3, 4), eos=(), vocab=VOCAB, decoding=decoding)
    assert [len(r.tokens) for r in rollouts] == [4, 4, 4]


def test_a_cache_that_models_do_not_read_is_not_used(monkeypatch):
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda input_ids=None, attention_mask=None, **kwargs: forward(input_ids=input_ids, **kwargs)
    assert not static_cache.possible(model, 32, Decoding())


def test_half_precision_does_not_hide_a_wrong_cache():
    """Rounding could explain an error of 7 % in bfloat16, but the model's other ways have no such errors."""
    model = tiny_model("llama").to(torch.bfloat16)
    forward = model.forward

    def wrong(input_ids=None, attention_mask=None, **kwargs):
        out = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.ndim == 4:
            out.logits = out.logits + 0.07 * out.logits.roll(1, -1)
        return out

    assert static_cache.possible(model, 32, Decoding())
    model.forward = wrong
    static_cache._RIGHT.pop(model)
    assert not static_cache.possible(model, 32, Decoding())


def test_a_cache_that_hides_the_text_of_a_local_window_is_not_used():
    """GPT-Neo finds the columns of its window from the size of the cache: one that is wider hides the text."""
    model = tiny("gpt_neo", window_size=32)
    assert static_cache.possible(model, 32, Decoding())
    assert not static_cache.possible(model, 65, Decoding())
    assert not static_cache.possible(model, 70, Decoding())
    assert static_cache.possible(model, 24, Decoding())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_prompts_of_rising_lengths_need_few_trials(family, monkeypatch):
    """With GPT-Neo, caches above the window fail."""
    model = tiny("gpt_neo", window_size=32) if family == "gpt_neo" else shared_model(family)
    way_of(model)
    tried = []
    monkeypatch.setattr(static_cache, "_RIGHT", WeakKeyDictionary())
    monkeypatch.setattr(static_cache, "Trial", lambda model: tried.append(model) or Trial(model))
    engine = Native(model, Decoding(), eos=(), vocab=VOCAB, chunk=1)
    with path(monkeypatch, in_step=True):
        engine.respond([(5,) * n for n in range(12, 42, 2)], uniforms(15, 4))
    assert len(tried) == 3  # with 16, 32 and 64 columns


def test_a_trial_without_memory_does_not_end_the_sampling(monkeypatch):
    """A trial has a larger cache than the batch, and perhaps more rows. The next batch tries again."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    assert static_cache.possible(model, 16, Decoding())
    with monkeypatch.context() as patch:
        patch.setattr(static_cache, "_read", full)
        assert not static_cache.possible(model, 32, Decoding())
    assert static_cache.possible(model, 32, Decoding())


def test_a_gpu_samples_a_mixture_with_the_packed_calls(monkeypatch):
    """Until steps are recorded as graphs, these start fewer kernels."""
    monkeypatch.setattr(static_cache, "DEVICES", {"cpu"})
    monkeypatch.setattr(static_cache, "fill", None)
    sample(shared_model("llama"), PROMPTS, uniforms(8, 4), eos=(), vocab=VOCAB, guide=Mixture(shared_model("llama", seed=3), 0.2))


def test_two_tokens_follow_the_models_distribution(monkeypatch):
    """The first is drawn after the prompt, the second in a step; its random number is another one."""
    student, teacher, draws = shared_model("llama", vocab=6), shared_model("llama", vocab=6, seed=5), 8_000
    numbers = np.random.default_rng(1).random((draws, 2))
    with path(monkeypatch, in_step=True):
        rollouts = sample(student, [(1, 2)] * draws, numbers, eos=(), vocab=6, guide=Mixture(teacher, 0.2))
    texts = torch.tensor([(1, 2, token) for token in range(6)])
    with torch.no_grad():
        q, p = (m(texts).logits[:, 1:].softmax(-1) for m in (student, teacher))
    mixed = 0.8 * q + 0.2 * p  # (first token, place, V)
    law = mixed[0, 0].unsqueeze(1) * mixed[:, 1]
    assert_frequencies(np.array([6 * r.tokens[0] + r.tokens[1] for r in rollouts]), law.flatten().numpy())


# --- a step -------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The tensor at a place of an operation's output."""

    operation: int
    place: int


class Seen(TorchDispatchMode):
    """The operations of a `with` block, which can be repeated on the same memory, as a CUDA graph repeats them."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], []
        self.results: dict[int, Result] = {}
        self.alive = []  # so that no later tensor gets the id of an earlier one

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        self.found.append((str(func), [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
        known = tree_map(lambda v: self.results.get(id(v), v) if isinstance(v, torch.Tensor) else v, given)
        out = func(*given[0], **given[1])
        for place, value in enumerate(tree_leaves(out)):
            if isinstance(value, torch.Tensor):
                self.results[id(value)] = Result(len(self.calls), place)
                self.alive.append(value)
        self.calls.append((func, known))
        return out

    def repeat(self) -> None:
        outs = []
        for func, known in self.calls:
            args, kwargs = tree_map(lambda v: outs[v.operation][v.place] if isinstance(v, Result) else v, known)
            outs.append(tree_leaves(func(*args, **kwargs)))


class Asks(TorchDispatchMode):
    """The number of questions about a value, for which the host waits."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in {"_local_scalar_dense", "item", "is_nonzero", "nonzero"}
        return func(*args, **(kwargs or {}))


def batch_of(student, guide, decoding=Decoding()):
    models = {"student": student} | ({"teacher": guide.teacher} if guide else {})
    columns = static_cache.Columns(models, PROMPTS, STEPS, VOCAB)
    said = static_cache.Said(uniforms(len(PROMPTS), STEPS), np.array(EOS), models, columns.device)
    return columns, said


@pytest.mark.parametrize(("family", "guide"), [("gpt2", "mixture"), ("qwen2", "alone"), ("qwen2", "speculation")])
@torch.inference_mode()
def test_a_step_recorded_once_and_repeated_says_the_same(family, guide, monkeypatch):
    """As a CUDA graph: the same operations on the same memory, and no Python in between."""
    student, helper = shared_model(family), GUIDES[guide](shared_model(family, seed=3))
    expected = assert_same(monkeypatch, student, decoding=WARPED, guide=helper)
    columns, said = batch_of(student, helper)
    with static_cache.teacher_tap(helper) as seen:
        step = static_cache.Step(columns, said, WARPED, helper, seen)
        step.say(columns.prompts())
        with Seen() as recorded:
            step()
    for _ in range(STEPS - 2):
        recorded.repeat()
    record = Record(len(PROMPTS), STEPS, EOS, said.values)
    record.take(said.tokens_BT, said.values, said.hidden_BTH)
    for a, b in zip(record.rollouts(), expected, strict=True):
        assert a.tokens == b.tokens
        for name in b.values:
            np.testing.assert_allclose(a.values[name], b.values[name], atol=1e-5)


@torch.inference_mode()
def test_all_steps_are_the_same_operations_and_ask_nothing():
    student, guide = shared_model("qwen2"), Mixture(shared_model("qwen2", seed=3), 0.3)
    columns, said = batch_of(student, guide)
    with static_cache.teacher_tap(guide) as tap:
        step = static_cache.Step(columns, said, Decoding(), guide, tap)
        step.say(columns.prompts())
        steps = []
        with Asks() as asks:
            for _ in range(4):
                with Seen() as seen:
                    step()
                steps.append(seen)
    assert all(s.found == steps[0].found for s in steps)
    assert asks.count == 0


# --- how often the host waits -------------------------------------------------------------------------------------------


@contextmanager
def waits(monkeypatch):
    """Count the copies to the host (`down`) and to the device (`up`), and the questions about values (`asks`), as on a GPU."""
    found = {"up": 0, "down": 0, "asks": 0}
    cpu, from_numpy = torch.Tensor.cpu, torch.from_numpy

    def down(tensor):
        found["down"] += 1
        return cpu(tensor)

    def up(array):
        found["up"] += 1
        return from_numpy(array)

    with monkeypatch.context() as patch, Asks() as asks:
        patch.setattr(torch.Tensor, "cpu", down)
        patch.setattr(torch, "from_numpy", up)
        yield found
    found["asks"] = asks.count


def counts(monkeypatch, steps: int, guide: str, prompts=PROMPTS) -> tuple[int, int, int]:
    student, teacher = shared_model("llama"), shared_model("llama", seed=3)
    settings = {"eos": (), "vocab": VOCAB, "guide": GUIDES[guide](teacher)}
    sample(student, prompts, uniforms(len(prompts), steps), **settings)  # the models are tried once for each larger cache
    with waits(monkeypatch) as found:
        sample(student, prompts, uniforms(len(prompts), steps), **settings)
    return found["up"], found["down"], found["asks"]


@pytest.mark.parametrize(("guide", "down", "models"), [("alone", 2, 1), ("mixture", 3, 2)])
def test_fixed_shapes_wait_at_every_eighth_token(guide, down, models, monkeypatch):
    """A call copies prompts, masks, positions, numbers and EOS to the device, and tokens, values and states back."""
    with path(monkeypatch, in_step=True):
        for steps in (8, 9, 17):
            up, found, asks = counts(monkeypatch, steps, guide)
            assert (up, found) == (5, down)
            asked = (steps - 1) // 8
            assert asked <= asks <= asked + 2 * models  # transformers asks about the mask of the prompts


@pytest.mark.parametrize(("guide", "each_eighth", "models"), [("alone", 1, 1), ("speculation", 2, 2)])
def test_the_loop_waits_once_for_a_token_and_once_for_each_models_mask(guide, each_eighth, models, monkeypatch):
    """Log-probabilities and states come at every eighth token. transformers asks in every call whether a mask has padding."""
    with path(monkeypatch, in_step=False):
        for steps in (8, 16):
            up, down, asks = counts(monkeypatch, steps, guide)
            assert down == steps + each_eighth * steps // 8
            assert asks <= models * (steps + 1)
            assert up <= 4 + 2 * steps // 8  # ids, positions, mask, numbers; then places in host memory
            assert counts(monkeypatch, steps, guide, EQUAL)[2] <= models  # without padding, it asks nothing in later calls


def test_a_packed_call_is_one_copy_to_the_device(monkeypatch):
    """Calls that draw copy the tokens back; log-probabilities of both models, and states, come at every eighth call."""
    done = {"__call__": 0, "keep": 0, "_say": 0}

    def counting(owner, name):
        work = getattr(owner, name)

        def counted(*args):
            done[name] += 1
            return work(*args)

        monkeypatch.setattr(owner, name, counted)

    counting(teacher_mixed_fast._Packed, "__call__")
    counting(teacher_mixed_fast._Packed, "keep")
    counting(teacher_mixed_fast, "_say")
    student, guide = shared_model("llama"), Mixture(shared_model("llama", seed=3), 0.2)
    with waits(monkeypatch) as found:
        sample(student, PROMPTS, uniforms(8, 24), eos=(), vocab=VOCAB, guide=guide)
    settled = -(-done["__call__"] // 8)
    assert found["asks"] == 0
    assert found["down"] <= done["_say"] + 2 * settled
    # one per call, the switch of the mixture, the rows that are kept, and the rows of the states in host memory
    assert found["up"] <= done["__call__"] + 1 + done["keep"] + 2 * settled
