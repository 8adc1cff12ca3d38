"""A GPU and its host run apart: how often an update makes the host wait. The counts are exact, so a new wait fails here.

Forward passes run as they would on a GPU: without an attention mask, and without a comparison in the backward pass.
"""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tests.conftest import tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tadistill.config.method import Method
from tadistill.config.method_parts import Optim
from tadistill.data.batch import Sequence, collate
from tadistill.models import forward
from tadistill.models.forward import pack_rows
from tadistill.objectives import fused_loss
from tadistill.train.loop import _update, make_optimizer
from tadistill.train.step import make_step

READ = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive"}
"""Operators that need a number on the host before they return."""
MASKED = {"index", "index_put", "index_put_"}
"""Operators that count a mask first, if an index is one."""
COPIES = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}


class _Operators(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in MASKED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READ or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # models move constants to the device where they are already
        ours = func is torch.Tensor.to and "tadistill" in sys._getframe(1).f_code.co_filename
        to_device = ours and any(isinstance(a, torch.device | str) for a in (*args[1:], kwargs.get("device")))
        made_there = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if func in COPIES or made_there or (to_device and not kwargs.get("non_blocking")):
            self.seen.append(func.__name__)
        return func(*args, **kwargs)


@contextmanager
def waits():
    """Yield a list that gets the name of every operation for which the host would wait, if the tensors were on a GPU."""
    seen = []
    with _Copies(seen), _Operators(seen):
        yield seen


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(forward, "_UNMASKED", {"cpu"})
    monkeypatch.setattr(fused_loss, "_QUEUED", {"cpu"})


def sequence(prompt, response):
    values = np.random.default_rng(response).normal(-3, 1, response).astype(np.float32)
    names = ("student", "behaviour", "teacher", "from_teacher")
    return Sequence(tuple(range(1, prompt + 1)), (*range(2, response + 1), 0), dict.fromkeys(names, values))


ROWS = [sequence(3, 9), sequence(1, 1), sequence(12, 5)]
PLAIN = [Sequence((), tuple(range(1, n))) for n in (8, 5, 3)]

METHODS = {
    "sft": ({"name": "sft"}, 1),
    "kd": ({"name": "kd"}, 2),
    "reverse kl": ({"objective": {"type": "reverse_kl"}}, 2),
    "jensen-shannon": ({"objective": {"type": "jensen_shannon", "temperature": 2.0}}, 2),
    "top-k": ({"objective": {"type": "top_k_reverse_kl", "k": 4}}, 2),
    "adaptive kl": ({"objective": {"type": "adaptive_kl"}}, 2),
    "taid": ({"name": "taid"}, 2),
    "distillm-2": ({"name": "distillm-2"}, 2),
    "sampled kl": ({"objective": {"type": "sampled_kl"}, "sampler": {"type": "student"}}, 1),
    "minillm": ({"name": "minillm"}, 3),
    "minillm-official": ({"name": "minillm-official"}, 4),
}
"""Method -> the waits of a micro-batch: one in each forward pass, where transformers looks whether positions start again in a row."""


def ready(name, copies=1):
    method = Method.model_validate(METHODS[name][0])
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5).requires_grad_(False)
    step = make_step(method, student, (teacher,) if method.objective.needs_teacher else (), 31)
    corpus = collate(PLAIN, pad=0) if method.objective.needs_corpus else None
    batches = step.prepare([collate(ROWS, pad=0, corpus=corpus)] * copies, 0, lambda sums: sums)
    return student, step, [batch.to(torch.device("cpu")) for batch in batches]


@pytest.mark.parametrize("name", METHODS)
def test_waits_of_a_micro_batch(name):
    student, step, (batch,) = ready(name)
    with waits() as seen:
        step.loss(student, batch, {"response": 15.0, "corpus": 13.0}).total.backward()
    assert len(seen) == METHODS[name][1], seen


def test_packed_rows_wait_for_nothing():
    method = Method.model_validate({"name": "kd"})
    models = tiny_model("llama"), tiny_model("gpt2", seed=5).requires_grad_(False)
    for model in models:
        pack_rows(model)
    step, batch = make_step(method, models[0], models[1:], 31), collate(ROWS, pad=0).to(torch.device("cpu"))
    with waits() as seen:
        step.loss(models[0], batch, {"response": 15.0}).total.backward()
    assert seen == []


@pytest.mark.parametrize("copies", [1, 3])
def test_waits_of_an_update(copies):
    """Beside the waits of its micro-batches, an update reads its losses and its gradient norm once. The other reads are of host tensors."""
    student, step, batches = ready("kd", copies)
    accelerator, optim = Accelerator(cpu=True), Optim(steps=2)
    optimizer = accelerator.prepare(make_optimizer(student, optim))
    with waits() as seen:
        _update(student, step, batches, optimizer, optim, accelerator, 0)
    read = "_local_scalar_dense"
    assert seen == ["tolist", *[read] * (2 * copies), "cpu", read, read, "tolist"]


def test_the_optimizer_is_one_kernel_per_group():
    assert make_optimizer(tiny_model("llama"), Optim(steps=2)).defaults["fused"] is True
