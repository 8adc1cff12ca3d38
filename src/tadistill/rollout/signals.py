"""Record a teacher's outputs for a fixed data set once, and read them during training.

    record(teacher, sequences, config, folder, vocab=..., pad=..., tick=...)   # continues where a killed process stopped
    Signals(folder, device).target([3, 17])                                    # outputs at the response tokens of sequences 3 and 17

The outputs are hidden states or top-k log-probabilities. Each safetensors file contains 256 sequences. Hidden states are stored with the
teacher's output head, so that training does not load the teacher. They take 4 H bytes per token (2 H in bfloat16), where H is the hidden
size. Top-k outputs take 8 k + 4 bytes per token.
"""

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.config.sampling import HiddenSignal, TopKSignal
from tadistill.data.batch import Sequence, by_length, collate
from tadistill.disk import replacing
from tadistill.errors import StoreError
from tadistill.models.forward import Reader
from tadistill.objectives import Head, Hidden, TopK, top_k
from tadistill.tuning import RECORDING_BATCH

_PART = 256
_ROWS = 128  # number of tokens whose logits are in memory at the same time


@torch.no_grad()
def record(
    teacher: PreTrainedModel,
    sequences: Seq[Sequence],
    config: HiddenSignal | TopKSignal,
    folder: Path,
    *,
    vocab: int,
    pad: int,
    tick: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the teacher's outputs at every response token of `sequences`. Files that already exist are kept.

    After each batch, and after each file, `tick` is called with the number of sequences that are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = Reader(teacher)
    if isinstance(config, HiddenSignal):
        _write_head(reader.head, vocab, folder)
    for start in range(0, len(sequences), _PART):
        path = folder / f"{start:08d}.safetensors"
        chunk = sequences[start : start + _PART]
        if not path.is_file():
            _write(path, _part(teacher, reader, chunk, config, vocab, pad, lambda done, start=start: tick(start + done)))
        tick(start + len(chunk))


def _part(
    teacher: PreTrainedModel,
    reader: Reader,
    sequences: Seq[Sequence],
    config: HiddenSignal | TopKSignal,
    vocab: int,
    pad: int,
    tick: Callable[[int], None],
) -> dict[str, Tensor]:
    found: dict[int, dict[str, Tensor]] = {}
    for rows in by_length(sequences, RECORDING_BATCH):
        batch = collate([sequences[i] for i in rows], pad=pad).to(teacher.device)
        tensors = _signal(reader.hidden(teacher, batch), reader.head, config, vocab)
        lengths = batch.mask_BT.sum(1).tolist()
        split = {name: tensor.cpu().split(lengths) for name, tensor in tensors.items()}
        found |= {row: {name: parts[i] for name, parts in split.items()} for i, row in enumerate(rows)}
        if len(found) < len(sequences):
            tick(len(found))
    ordered = [found[i] for i in range(len(sequences))]
    joined = {name: torch.cat([part[name] for part in ordered]).contiguous() for name in ordered[0]}
    return joined | {"lengths": torch.tensor([len(next(iter(part.values()))) for part in ordered])}


def _signal(hidden: Tensor, head: Head, config: HiddenSignal | TopKSignal, vocab: int) -> dict[str, Tensor]:
    if isinstance(config, HiddenSignal):
        return {"hidden": hidden.to(getattr(torch, config.dtype))}
    parts = [
        top_k(head.logits(hidden[i : i + _ROWS])[:, :vocab], min(config.k, vocab), tail=config.tail) for i in range(0, len(hidden), _ROWS)
    ]
    kept = {"ids": torch.cat([p.ids for p in parts]).int(), "log_probs": torch.cat([p.log_probs for p in parts])}
    tails = [p.tail for p in parts if p.tail is not None]
    return kept | ({"tail": torch.cat(tails)} if tails else {})


def _write_head(head: Head, vocab: int, folder: Path) -> None:
    tensors = {"weight": head.weight[:vocab]} | ({} if head.bias is None else {"bias": head.bias[:vocab]})
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _write(folder / "head.safetensors", tensors, {"scale": head.scale, "softcap": head.softcap})


def _write(path: Path, tensors: dict[str, Tensor], settings: dict | None = None) -> None:
    # written under a temporary name and renamed, so that a killed process leaves no incomplete file
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"settings": json.dumps(settings)})


class Signals:
    """The recorded outputs of a teacher. Only the requested sequences are read from disk."""

    def __init__(self, folder: Path, device: torch.device):
        """Open the files in `folder`. Raises StoreError if a file is missing or damaged."""
        self._device = device
        head = folder / "head.safetensors"
        paths = sorted(p for p in folder.glob("*.safetensors") if p != head)
        try:
            if [int(p.stem) for p in paths] != list(range(0, _PART * len(paths), _PART)) or not paths:
                raise ValueError("a part is missing")
            self.head = _read_head(head, device) if head.is_file() else None
            self._parts = [safe_open(p, "pt") for p in paths]
            lengths = [part.get_tensor("lengths").numpy() for part in self._parts]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the recorded outputs of the teacher in {folder} are damaged ({error}); delete this folder and run the same command again"
            ) from error
        self._ends = [np.cumsum(n) for n in lengths]

    def target(self, rows: Seq[int]) -> Hidden | TopK:
        """Return the teacher's outputs at the response tokens of these sequences, one sequence after the other."""
        found = [self._row(int(row)) for row in rows]
        joined = {name: torch.cat([f[name] for f in found]).to(self._device) for name in found[0]}
        if self.head is not None:
            return Hidden(joined["hidden"].to(self.head.weight.dtype), self.head)
        return TopK(joined["ids"].long(), joined["log_probs"], joined.get("tail"))

    def _row(self, row: int) -> dict[str, Tensor]:
        number, inside = divmod(row, _PART)
        part, ends = self._parts[number], self._ends[number]
        at = slice(int(ends[inside - 1]) if inside else 0, int(ends[inside]))
        return {name: part.get_slice(name)[at] for name in part.keys() if name != "lengths"}  # noqa: SIM118 (not a mapping)


def _read_head(path: Path, device: torch.device) -> Head:
    tensors = load_file(path, str(device))
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    return Head(tensors["weight"], tensors.get("bias"), settings["scale"], settings["softcap"])
