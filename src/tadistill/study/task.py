"""What a worker process is told about its stage: plain data that can be pickled."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """What a worker needs to run one stage."""

    kind: str
    key: str
    spec: dict[str, Any]
    parents: dict[str, str]
    label: str
    steps: int | None
    store: str
    study: str
    data_root: str | None
    checkpoint_seconds: float
    trackers: tuple[str, ...]
