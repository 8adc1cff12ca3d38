"""The memory that models need, and the free memory of this machine.

    check_memory({"teacher": resident_bytes(1_557_611_200, training=False), "student": resident_bytes(124_439_808, training=True)})

Activations and logits are not included, because they depend on the batch.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path

from tadistill.errors import ConfigError, ModelError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MALLOC = {-3: 2**30, -1: 2**30, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
_TRAINED = 16  # float32 weights, gradients and AdamW's two moments


def resident_bytes(parameters: int, *, training: bool, dtype: str = "float32", adapters: int | None = None) -> int:
    """Return the number of bytes of a model's weights. With `training`, its gradients and AdamW's two moments (float32) are included.

    Training in half precision keeps the weights in float32, and adds a copy in half precision (autocast).

    Args:
        parameters: number of all parameters, including those of adapters.
        adapters: number of the adapters' parameters, if only adapters are trained.

    Raises:
        ConfigError: `dtype` is not float32, bfloat16 or float16.
    """
    width = _BYTES.get(str(dtype).removeprefix("torch."))
    if width is None:
        raise ConfigError(f"dtype is `{dtype}`; use one of {', '.join(_BYTES)}")
    if not training:
        return parameters * width
    trained = parameters if adapters is None else adapters
    return trained * (_TRAINED + (width if width < 4 else 0)) + (parameters - trained) * 4


def check_memory(
    needs: Mapping[str, int], available: int | None = None, advice: str = "use smaller models, or a machine with more memory"
) -> None:
    """Check that the memory is large enough for the sum of all `needs`, which are bytes by name.

    `available` is the memory in bytes. The default is the free memory of this process.

    Raises:
        ModelError: the memory is too small. The message lists the `needs`, their sum, the free memory and the `advice`.
    """
    if available is None:
        available = available_memory()
    total = sum(needs.values())
    if total > available:
        parts = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.items())
        raise ModelError(f"the models need {total / 1e9:.1f} GB of memory ({parts}), but only {available / 1e9:.1f} GB are free; {advice}")


def keep_freed_memory() -> None:
    """Let this process keep large blocks of freed memory for later use. This works with the C library glibc only.

    By default, glibc gives large blocks back to the system, and asks for new ones in each update. This costs 3 to 5 % of the time of a
    small student's update. With this function, the peak memory of the process stays the same, but the memory is not free until the process
    ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def available_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of bytes that this process can still use. A Slurm job or a container can have less than the free memory of the
    machine."""
    import psutil  # not at the top, because `plan` checks no memory

    free = psutil.virtual_memory().available
    if not own.is_file():
        return free  # not Linux
    lines = own.read_text(encoding="utf-8").splitlines()
    path = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)
    if path is None:
        return free  # cgroup version 1
    here = root / path
    for folder in (here, *here.parents):
        if root not in (folder, *folder.parents):
            break
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            cached = _inactive_file(folder / "memory.stat")
            free = min(free, max(limit - used + cached, 0))
    return free


def _number(path: Path) -> int | None:
    # a control file contains a number of bytes, or `max`
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file(path: Path) -> int:
    # page cache that the kernel frees when memory is short, though memory.current includes it
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
