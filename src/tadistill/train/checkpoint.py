"""Training state on disk: written to a temporary file and renamed, so a kill leaves the old state or the new one, whole."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tadistill.errors import StoreError
from tadistill.models.files import replacing


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
    alarms: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    """What `train.meter` counted."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, atomically."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run the same command again to redo the stage") from error
