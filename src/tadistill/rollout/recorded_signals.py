"""Record a teacher's outputs for fixed texts once, and load them during training.

    record(of_teacher(teacher, pad), sequences, config, folder, vocab=...)     # continues where a killed process stopped
    Signals(folder, device).target([3, 17])                                  # outputs at the response tokens of sequences 3 and 17

`config` chooses hidden states, top-k tokens or drawn tokens. Hidden states are stored with the teacher's output head, so that training does
not load the teacher. `docs/concepts/recorded.md` describes the files: safetensors with 256 sequences each, which are read by memory map.
Every sequence has a checksum, which is tested when the sequence is read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tadistill import rng
from tadistill.config.sampling import HiddenSignal, SampledSignal, Signal, TopKSignal
from tadistill.constants import RECORDING_BATCH
from tadistill.data.batch import Sequence, by_length, collate
from tadistill.disk import damaged, ordinary_permissions, replacing
from tadistill.errors import ConfigError, StoreError
from tadistill.models.teachers import Teacher
from tadistill.objectives import Head, Hidden, Sampled, TopK, sampled_target, top_k
from tadistill.rollout import recorded_format

_PART = 256
_ROWS = 128  # number of tokens whose logits are in memory at the same time
_CHECK = 8  # bytes of a sequence's checksum

Outputs = Callable[[Seq[Sequence]], Hidden | TopK]
"""A function that takes sequences and returns a teacher's outputs at their response tokens, concatenated in the order of the sequences.

The outputs are `Hidden`, from which every form of recording can be made, or `TopK`, from which only `top_k` can be made. The
tokens of `TopK` are sorted from the most to the least probable.
"""


def of_teacher(teacher: Teacher, pad: int) -> Outputs:
    """Return a function that computes a teacher's outputs at response tokens. `pad` is the padding token."""
    return lambda sequences: teacher.target(collate(sequences, pad=pad).to(teacher.device))


@torch.no_grad()
def record(
    outputs: Outputs,
    sequences: Seq[Sequence],
    config: Signal,
    folder: Path,
    *,
    vocab: int,
    tick: Callable[[int], None] = lambda done: None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write the teacher's outputs at every token of `sequences` that counts in the loss. Files that already exist are not written again.

    Several processes write different files: `share` is the rank of this process and the number of processes. Before and after each new
    file, and after each batch, `tick` is called with the number of sequences that are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(outputs, config, vocab, folder)
    for number, start in enumerate(range(0, len(sequences), _PART)):
        path = folder / f"{start:08d}.safetensors"
        chunk = [s.of_teacher for s in sequences[start : start + _PART]]
        if path.is_file():
            continue
        tick(start)
        if number % share[1] == share[0]:
            writer.write(path, chunk, start, lambda done, start=start: tick(start + done))
        tick(start + len(chunk))


def complete(folder: Path, count: int) -> bool:
    """Return True if the outputs for all `count` sequences are in `folder`."""
    return all((folder / f"{start:08d}.safetensors").is_file() for start in range(0, count, _PART))


class _Writer:
    def __init__(self, outputs: Outputs, config: Signal, vocab: int, folder: Path):
        self.outputs, self.config, self.vocab, self.folder = outputs, config, vocab, folder

    def write(self, path: Path, sequences: Seq[Sequence], start: int, tick: Callable[[int], None]) -> None:
        found: dict[int, dict[str, Tensor]] = {}
        for rows in by_length(sequences, RECORDING_BATCH):
            part = [sequences[i] for i in rows]
            target, lengths = self.outputs(part), [s.counted for s in part]
            if start == 0 and isinstance(target, Hidden) and isinstance(self.config, HiddenSignal):
                self._write_head(target.head)  # before the first part, and so by one process only
            columns = self._columns(target, [start + i for i in rows], lengths)
            split = {name: tensor.cpu().split(sizes) for name, (tensor, sizes) in columns.items()}
            found |= {row: {name: parts[i] for name, parts in split.items()} for i, row in enumerate(rows)}
            if len(found) < len(sequences):
                tick(len(found))
        ordered = [found[i] for i in range(len(sequences))]
        joined = {name: torch.cat([part[name] for part in ordered]).contiguous() for name in ordered[0]}
        index = {"lengths": torch.tensor([s.counted for s in sequences])}
        if "entries" in joined:
            index["entries of"] = torch.tensor([len(part["entries"]) for part in ordered])
        index["checks"] = torch.stack([_check(part) for part in ordered])
        _write(path, joined | index, {"index": _digest(index.values()), **self.config.model_dump(), "vocab": self.vocab})

    def _write_head(self, head: Head) -> None:
        path = self.folder / "head.safetensors"
        if path.is_file():
            return
        tensors = {"weight": head.weight[: self.vocab]} | ({} if head.bias is None else {"bias": head.bias[: self.vocab]})
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        _write(path, tensors, {"scale": head.scale, "softcap": head.softcap, "index": _digest(tensors.values())})

    def _columns(self, target: Hidden | TopK, rows: list[int], lengths: list[int]) -> dict[str, tuple[Tensor, list[int]]]:
        # tensors whose first axis is tokens or entries, each with its number of rows for every sequence
        match self.config:
            case HiddenSignal(dtype=dtype):
                assert isinstance(target, Hidden)
                return {"hidden": (target.states.to(getattr(torch, dtype)), lengths)}
            case TopKSignal() as config:
                kept = self._first(target, config) if isinstance(target, TopK) else self._top_k(target, config)
                assert kept.tail is not None
                if config.dtype == "packed":
                    ids, log_p, tail = (t.cpu().numpy() for t in (kept.ids, kept.log_probs.float(), kept.tail.float()))
                    return {"rows": (torch.from_numpy(recorded_format.pack_top_k(ids, log_p, tail, self.vocab)), lengths)}
                found = {"ids": (kept.ids.int(), lengths), "log_probs": (kept.log_probs, lengths)}
                return found if config.tail == "drop" else found | {"tail": (kept.tail, lengths)}
            case SampledSignal() as config:
                assert isinstance(target, Hidden)
                return self._sampled(target, config, rows, lengths)

    def _first(self, target: TopK, config: TopKSignal) -> TopK:
        have, k = target.ids.shape[-1], min(config.k, self.vocab)
        if have < k:
            raise ConfigError(f"the teacher gives its {have} most probable tokens, but `signal.k` is {k}; set `signal.k` to {have} or less")
        return target.first(k)

    def _top_k(self, target: Hidden, config: TopKSignal) -> TopK:
        parts = [top_k(logits, min(config.k, self.vocab)) for _, logits in self._logits(target)]
        tails = [p.tail for p in parts if p.tail is not None]
        return TopK(torch.cat([p.ids for p in parts]), torch.cat([p.log_probs for p in parts]), torch.cat(tails))

    def _sampled(self, target: Hidden, config: SampledSignal, rows: list[int], lengths: list[int]) -> dict[str, tuple[Tensor, list[int]]]:
        # a sequence has its own random numbers, so its tokens do not depend on the batch
        numbers = [rng.generator(config.seed, "drawn tokens", row).random((n, config.draws)) for row, n in zip(rows, lengths, strict=True)]
        uniforms = torch.from_numpy(np.concatenate(numbers))
        parts = [sampled_target(logits, uniforms[tokens]) for tokens, logits in self._logits(target)]
        distinct = torch.cat([(p.shares > 0).sum(1) for p in parts]).cpu()
        ids = torch.cat([p.ids[p.shares > 0] for p in parts]).cpu().numpy()
        counts = torch.cat([(p.shares[p.shares > 0] * config.draws).round().long() for p in parts]).cpu().numpy()
        entries = torch.from_numpy(recorded_format.pack_entries(ids, counts, config.draws, self.vocab))
        of_sequences = [int(part.sum()) for part in distinct.split(lengths)]
        entropy = torch.cat([p.entropy for p in parts])
        return {"entries": (entries, of_sequences), "distinct": (distinct.short(), lengths), "entropy": (entropy, lengths)}

    def _logits(self, target: Hidden) -> Iterable[tuple[slice, Tensor]]:
        for start in range(0, len(target.states), _ROWS):
            tokens = slice(start, start + _ROWS)
            yield tokens, target.head.logits(target.states[tokens])[:, : self.vocab]


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor.numel():
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check(part: dict[str, Tensor]) -> Tensor:
    digest = bytes.fromhex(_digest(part[name] for name in sorted(part)))
    return torch.tensor([*digest[:_CHECK]], dtype=torch.uint8)


def _write(path: Path, tensors: dict[str, Tensor], settings: dict) -> None:
    # written under a temporary name and renamed, so that a killed process leaves no incomplete file
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"settings": json.dumps(settings)})
        ordinary_permissions(temporary)


class Signals:
    """The recorded outputs of a teacher. Only the requested sequences are read from disk."""

    def __init__(self, folder: Path, device: torch.device):
        """Open the files in `folder`. Raises StoreError if a file is missing or damaged, or if this user may not read it."""
        self._device, self._folder = device, folder
        head = folder / "head.safetensors"
        try:
            files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
            for path in files:  # of a file without permission, safetensors says that it does not exist
                path.open("rb").close()
            paths = [p for p in files if p != head]
            if [int(p.stem) for p in paths] != list(range(0, _PART * len(paths), _PART)) or not paths:
                raise ValueError("a part is missing")
            self.head = _read_head(head, device) if head.is_file() else None
            self._parts = [_Part(path) for path in paths]
            if self.head is None and "hidden" in self._parts[0].names:
                raise ValueError(f"{head.name} is missing")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception | str) -> StoreError:
        if isinstance(error, PermissionError):
            return damaged(Path(error.filename), error)
        return StoreError(
            f"the recorded outputs of the teacher in {self._folder} are damaged ({error}); delete this folder and run the same command "
            "again"
        )

    def target(self, rows: Seq[int]) -> Hidden | TopK | Sampled:
        """Return the teacher's outputs at the response tokens of the sequences with the indices `rows`, one sequence after the other.

        Raises:
            StoreError: the bytes of a sequence are missing, or have changed since they were written.
        """
        try:
            found = [self._parts[row // _PART].sequence(row % _PART) for row in map(int, rows)]
        except IndexError as error:
            raise self._damaged("the last part is missing") from error
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(error) from error
        joined = {name: torch.cat([f[name] for f in found]) for name in found[0]}
        settings = self._parts[0].settings
        if self.head is not None:
            return Hidden(joined["hidden"].to(self._device, self.head.weight.dtype, non_blocking=True), self.head)
        if "rows" in joined:
            k, vocab = min(settings["k"], settings["vocab"]), settings["vocab"]
            ids, log_p, tail = map(torch.from_numpy, recorded_format.unpack_top_k(joined["rows"].numpy(), k, vocab))
            return TopK(ids, log_p, tail if settings["tail"] == "lump" else None).to(self._device)
        if "entries" in joined:
            return _sampled(joined, settings).to(self._device)
        return TopK(joined["ids"].long(), joined["log_probs"], joined.get("tail")).to(self._device)


def _sampled(joined: dict[str, Tensor], settings: dict) -> Sampled:
    found_ids, counts = map(torch.from_numpy, recorded_format.unpack_entries(joined["entries"].numpy(), settings["vocab"]))
    distinct = joined["distinct"].long()
    rows = torch.arange(len(distinct)).repeat_interleave(distinct)
    places = torch.arange(len(rows)) - (distinct.cumsum(0) - distinct)[rows]
    shape = len(distinct), int(distinct.max()) if len(distinct) else 0
    ids, shares = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    ids[rows, places], shares[rows, places] = found_ids, counts / settings["draws"]
    return Sampled(ids, shares, joined["entropy"])


class _Part:
    # one file: the sequences' tensors, joined along their first axis, and an index of their sizes and checksums

    def __init__(self, path: Path):
        self.path, self._file = path, safe_open(path, "pt")
        self.settings = json.loads(self._file.metadata()["settings"]) or {}  # empty in files of earlier versions, which have no checksums
        names = set(self._file.keys())
        index = {name: self._file.get_tensor(name) for name in ("lengths", "entries of", "checks") if name in names}
        if "index" in self.settings and _digest(index.values()) != self.settings["index"]:
            raise ValueError(f"the index of {path.name} does not fit its checksum")
        self._checks = index.get("checks")
        self.names = sorted(names - index.keys())
        self._ends = {name: np.cumsum(index.get(f"{name} of", index["lengths"]).numpy()) for name in self.names}

    def sequence(self, inside: int) -> dict[str, Tensor]:
        found = {}
        for name in self.names:
            ends = self._ends[name]
            found[name] = self._file.get_slice(name)[slice(int(ends[inside - 1]) if inside else 0, int(ends[inside]))]
        if self._checks is not None and not torch.equal(_check(found), self._checks[inside]):
            raise ValueError(f"sequence {inside} of {self.path.name} does not fit its checksum")
        return found


def _read_head(path: Path, device: torch.device) -> Head:
    tensors = load_file(path, str(device))
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    if "index" in settings and _digest(tensors[name].cpu() for name in ("weight", "bias") if name in tensors) != settings["index"]:
        raise ValueError(f"{path.name} does not fit its checksum")
    return Head(tensors["weight"], tensors.get("bias"), settings["scale"], settings["softcap"])
