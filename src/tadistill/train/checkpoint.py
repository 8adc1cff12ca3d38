"""Training state on disk: written to a temporary file and renamed, so a kill leaves the old state or the new one, whole."""

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tadistill.errors import StoreError


@dataclass
class TrainState:
    """Everything a stage needs to go on exactly where it was; randomness is addressed and needs no state."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, atomically."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error}; free some space or check permissions, then run the same command again") from error


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run the same command again to redo the stage") from error
