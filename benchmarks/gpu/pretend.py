"""Finds operations that mix a GPU's tensors with the CPU's, on a machine without a GPU.

    with pretended() as seen:
        ...                                   # torch.cuda.is_available() is True in here, and models go to "cuda:0"
    assert not seen.mixings

A tensor on the pretended device is an `OnDevice`. It says that it is on `cuda:0`, and it holds a CPU tensor, which does the work. A
dispatch mode looks at every operation: a GPU would refuse one that reads `OnDevice` and a CPU tensor of more than 0 dimensions, and this
mode records its name and the lines of Python that called it. Copies between the two are allowed, and counted, because the CPU waits for a
GPU there.

It detects devices and proves no numbers: attention uses torch's plain formula, and CUDA's kernels are not run.
"""

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


def _load_stub() -> None:
    if "torch" in sys.modules:
        raise ImportError("import `pretend` before torch, because it changes what torch finds when it is loaded")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    home, source = Path(spec.origin).parent, Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/pretend.so"
        against = [f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", str(source), "-o", library, *against], check=True)
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


_load_stub()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

DEVICE = torch.device("cuda:0")
MEMORY = 80 * 10**9
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
"""A GPU's tensor may be indexed with a CPU's tensor: torch copies the index."""
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""After these operations the CPU waits for the GPU, because it needs a number, or the shape of the result."""
SUMS = {aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype_out}
"""Products that return float32 sums of half-precision matrices. Only a GPU has them."""
FRAMES = 4


@dataclass
class Seen:
    """What happened on the pretended device."""

    mixings: Counter[str] = field(default_factory=Counter)
    """Operations that a GPU refuses, as `NAME at FILE:LINE < FILE:LINE …`, with their numbers of calls."""
    waits: Counter[str] = field(default_factory=Counter)
    """Operations after which the CPU waits for the GPU, by name."""
    operations: int = 0
    """Number of operations that the device did."""


class OnDevice(Tensor):
    """A tensor that says it is on `cuda:0`, and holds a CPU tensor."""

    held: Tensor
    seen = Seen()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        sizes = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, **sizes)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __init__(self, held: Tensor):
        pass

    # with these two methods, `Module.to` exchanges the contents of a parameter, so that tied weights stay tied
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "OnDevice":
        return OnDevice(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch has no `tolist` of a subclass

    # tied weights are found by the addresses of their storages
    def storage(self) -> Any:
        return self.held.storage()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # a file has the contents of a tensor, and no class

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = OnDevice(self.held.detach().clone())
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"


class _Mode(TorchDispatchMode):
    """Sends operations on plain tensors to `_run` too: they may make a tensor on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    tensors = [*_tensors(args), *_tensors([*kwargs.values()])]
    on_device = [t for t in tensors if isinstance(t, OnDevice)]
    asked = kwargs.get("device")
    goes = torch.device(asked).type == "cuda" if asked is not None else bool(on_device)
    if not goes and not on_device:
        return func(*args, **kwargs)
    _look(func, args, tensors, on_device, goes)
    if func is aten._fused_sdp_choice.default:
        return 0  # the plain formula: the other answers lead to CUDA's own kernels
    wrappers = {id(t.held): t for t in on_device}
    inner_args, inner_kwargs = _each(_inside, args), {name: _each(_inside, value) for name, value in kwargs.items()}
    found = _sum(*inner_args, **inner_kwargs) if func in SUMS else func(*inner_args, **inner_kwargs)
    to_host = func is aten.copy_.default and not isinstance(args[0], OnDevice)
    return found if not goes or to_host else _each(lambda x: _outside(x, wrappers), found)


# torch's own functions for nested values take several times as long as the operations of tiny models
def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)([_each(change, part) for part in value]) if isinstance(value, list | tuple) else change(value)


def _sum(*factors: Any, out: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    *total, left, right, dtype = factors
    found = left.to(dtype) @ right.to(dtype)
    for more in total:
        found = found + more
    return found if out is None else out.copy_(found)


def _inside(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _outside(value: Any, wrappers: dict[int, OnDevice]) -> Any:
    if not isinstance(value, Tensor):
        return value
    known = wrappers.get(id(value))
    if known is not None:  # the operation changed this tensor in place
        assert known.shape == value.shape, "an operation changed the shape of a tensor in place"
        return known
    with torch.inference_mode(False):  # a view of an ordinary tensor must be ordinary too, and torch looks at the wrapper
        return OnDevice(value)


def _look(func: Any, args: Any, tensors: list[Tensor], on_device: list[OnDevice], goes: bool) -> None:
    seen = OnDevice.seen
    seen.operations += 1
    downloads = func is aten._to_copy.default and on_device and not goes
    if func in WAITS or downloads or (func is aten.copy_.default and not isinstance(args[0], OnDevice)):
        seen.waits[func.__name__] += 1
    elif func in INDEXED and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] if i is not None):
        seen.waits["boolean index"] += 1
    if func in COPIES or not on_device:
        return
    host = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim > 0]
    if func in INDEXED and isinstance(args[0], OnDevice):
        indices = {id(i) for i in args[1] if i is not None}
        host = [t for t in host if id(t) not in indices]
    if host:
        seen.mixings[f"{func} at {_where()}"] += 1


def _where() -> str:
    frame, lines = sys._getframe(3), []
    while frame is not None and len(lines) < FRAMES:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__:
            lines.append(f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines) or "the backward pass"  # a thread of autograd's own


@contextmanager
def pretended() -> Iterator[Seen]:
    """In this process, pretend that torch has one GPU. Yields what happens on it.

    Use it in a process of its own: libraries remember whether there is a GPU.
    """
    OnDevice.seen = seen = Seen()
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True, "is_initialized": True,
        "get_device_name": "a pretended GPU", "mem_get_info": (MEMORY, MEMORY), "get_device_capability": (9, 0),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        **dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "set_device", "manual_seed", "manual_seed_all", "init",
                         "reset_peak_memory_stats")),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda:0") is made on the CPU, and then copied
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_Mode())
        yield seen
