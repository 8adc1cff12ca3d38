"""Measures time and memory of the fused objectives, full-logits autograd and TRL's chunked kernel.

    python benchmarks/losses.py [--json PATH] [--markdown PATH] [--quick] [--part time|memory]

Time: forward and backward from hidden states. The implementations take one step each in turn, round after round. The first round is dropped
and the others give the medians. A ratio is the median of the rounds' ratios, so other load on the machine affects both sides.

Memory: every divergence runs in a fresh process. The process builds the two heads and the hidden states, runs the same code once on a few
tokens (to load libraries and thread pools), and resets the peak. It reports

    extra = peak resident set - resident set before the call - one gradient of the student's head and of its hidden states

which is everything above weights, hidden states and the gradients that training needs anyway. The peak is VmHWM after writing 5 to
/proc/self/clear_refs. The plain function on whole logits would need several tensors of [tokens, vocabulary], so it is measured on a
sixteenth of the tokens and multiplied by 16.

The factor 1/tokens is part of the weights of the fused objective, so backward has nothing to scale and makes no copy of the head's
gradient. Megabytes are 10^6 bytes. Everything is float32. TRL is optional; its kernel has only the forward KL, the reverse KL and the JSD.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import page
import torch
from torch import Tensor

from tadistill import objectives as ob
from tadistill.objectives import Head, Hidden


class Size(NamedTuple):
    """Tokens, vocabulary, hidden size."""

    tokens: int
    vocab: int
    hidden: int


TIME, MEMORY = Size(1024, 49152, 576), Size(4096, 151936, 896)
QUICK_TIME, QUICK_MEMORY = Size(128, 8192, 64), Size(512, 32768, 64)
WARM_UP = Size(8, 1000, 64)
BOUND_MB = 300
FULL_SHARE = 16
"""Whole logits are measured on tokens / 16."""

DIVERGENCES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "forward_kl": (ob.forward_kl, {}),
    "reverse_kl": (ob.reverse_kl, {}),
    "jeffreys": (ob.jeffreys, {}),
    "jensen_shannon": (ob.jensen_shannon, {"beta": 0.5}),
    "skew_forward_kl": (ob.skew_forward_kl, {}),
    "skew_reverse_kl": (ob.skew_reverse_kl, {}),
    "total_variation": (ob.total_variation, {}),
    "adaptive_kl": (ob.adaptive_kl, {}),
    "alpha_beta": (ob.alpha_beta, {}),
    "alpha_mixture": (ob.alpha_mixture, {}),
    "taid": (ob.taid, {"t": 0.5}),
    "top_k_forward_kl": (ob.top_k_forward_kl, {}),
    "top_k_reverse_kl": (ob.top_k_reverse_kl, {}),
}
NAMES = [*DIVERGENCES, "cross_entropy"]
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}
INTRODUCTION = "This page shows time and memory of every objective: fused with the head, on whole logits, and by TRL's kernel."
TIME_COLUMNS = ["divergence", "fused ms", "full ms", "TRL ms", "fused/full", "fused/TRL"]
MEMORY_COLUMNS = ["divergence", "fused MB", "TRL MB", "full MB (scaled)", "fused <= bound"]


class Problem:
    """Random hidden states and heads of one size; the student's are leaves with gradients."""

    def __init__(self, size: Size):
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return torch.empty(rows, size.hidden).normal_(0, scale, generator=generator)

        self.size = size
        self.hidden, self.teacher_hidden = normal(size.tokens, 1).requires_grad_(), normal(size.tokens, 1)
        spread = 2 / size.hidden**0.5  # logits of standard deviation 2
        self.weight, self.teacher_weight = normal(size.vocab, spread).requires_grad_(), normal(size.vocab, spread)
        self.tokens = torch.randint(size.vocab, (size.tokens,), generator=generator)
        self.share = torch.full((size.tokens,), 1 / size.tokens)

    def gradient_bytes(self) -> int:
        """Return the size of one gradient of the student's head and of its hidden states."""
        return self.weight.nbytes + self.hidden.nbytes

    def step(self, name: str, way: str) -> float:
        """Return the mean loss of one forward and backward pass into fresh gradients."""
        self.hidden.grad = self.weight.grad = None
        loss = {"fused": self._fused, "full": self._full, "trl": self._trl}[way](name)
        loss.backward()
        return loss.item()

    def _fused(self, name: str) -> Tensor:
        head = Head(self.weight)
        if name == "cross_entropy":
            return ob.fused_head(
                self.hidden, head, lambda z, _, rows: ob.cross_entropy(z, self.tokens[rows]).unsqueeze(0), self.share.unsqueeze(0)
            )[0]
        divergence, parameters = DIVERGENCES[name]
        teacher = Hidden(self.teacher_hidden, Head(self.teacher_weight))
        return ob.fused_divergence(divergence, self.hidden, head, teacher, mask=self.share, **parameters)[0]

    def _full(self, name: str) -> Tensor:
        logits = self.hidden @ self.weight.t()
        if name == "cross_entropy":
            return ob.cross_entropy(logits, self.tokens).mean()
        divergence, parameters = DIVERGENCES[name]
        return divergence(logits, self.teacher_hidden @ self.teacher_weight.t(), **parameters).mean()

    def _trl(self, name: str) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        teacher = self.teacher_hidden, self.teacher_weight, None
        values, _ = ChunkedDivergenceFunction.apply(self.hidden, self.weight, None, *teacher, TRL_BETA[name])
        return values.mean()


# --- time ---------------------------------------------------------------------------------------------------------------


def time_row(problem: Problem, name: str, ways: list[str], rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of each way, the ratios, and the largest difference of the losses."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(rounds + 1):
        for way in ways:
            start = time.perf_counter()
            losses[way] = problem.step(name, way)
            taken[way].append(1000 * (time.perf_counter() - start))
    kept = {way: values[1:] for way, values in taken.items()}
    row: dict[str, Any] = {"divergence": name, **{f"{way}_ms": statistics.median(values) for way, values in kept.items()}}
    for way in ways[1:]:
        row[f"fused_over_{way}"] = statistics.median(ours / theirs for ours, theirs in zip(kept["fused"], kept[way], strict=True))
        row[f"loss_gap_{way}"] = abs(losses["fused"] - losses[way]) / abs(losses[way])
    return row


# --- memory -------------------------------------------------------------------------------------------------------------


def memory_row(name: str, size: Size, trl: bool) -> dict[str, Any]:
    """Return the extra megabytes of each way, each measured in its own process."""
    row: dict[str, Any] = {"divergence": name, "fused_mb": in_fresh_process(name, "fused", size)}
    if trl and name in TRL_BETA:
        row["trl_mb"] = in_fresh_process(name, "trl", size)
    part = size._replace(tokens=size.tokens // FULL_SHARE)
    row["full_mb_scaled"] = FULL_SHARE * in_fresh_process(name, "full", part)
    row["holds"] = row["fused_mb"] <= BOUND_MB
    return row


def in_fresh_process(name: str, way: str, size: Size) -> float:
    """Run `extra_mb` in a new interpreter."""
    command = [sys.executable, __file__, "--one", json.dumps([name, way, size])]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def extra_mb(name: str, way: str, size: Size) -> float:
    """Return the peak of one step above weights, hidden states and one set of gradients."""
    Problem(WARM_UP).step(name, way)
    problem = Problem(size)
    page.reset_peak()
    before = page.resident("VmRSS")
    problem.step(name, way)
    return (page.resident("VmHWM") - before - problem.gradient_bytes()) / 1e6


# --- report -------------------------------------------------------------------------------------------------------------


def cells(part: str, row: dict[str, Any]) -> list[str]:
    """Return a row as text, in the order of its columns; a cell is empty if nothing was measured."""

    def number(key: str, digits: int) -> str:
        return f"{row[key]:,.{digits}f}" if key in row else ""

    if part == "time":
        milliseconds = [number(f"{way}_ms", 1) for way in ("fused", "full", "trl")]
        return [row["divergence"], *milliseconds, number("fused_over_full", 2), number("fused_over_trl", 2)]
    megabytes = [number(key, 0) for key in ("fused_mb", "trl_mb", "full_mb_scaled")]
    return [row["divergence"], *megabytes, "yes" if row["holds"] else "NO"]


def headings(result: dict[str, Any]) -> dict[str, str]:
    """Describe each part in one line."""
    text = {}
    if "time" in result:
        text["time"] = "Forward and backward of {} tokens, vocabulary {}, hidden {}".format(*result["sizes"]["time"])
    if "memory" in result:
        size = Size(*result["sizes"]["memory"])
        text["memory"] = "Memory above weights, hidden states and gradients: {} tokens, vocabulary {}, hidden {}; ".format(*size)
        text["memory"] += f"one tensor of whole logits is {size.tokens * size.vocab * 4 / 1e6:,.0f} MB"
    return text


def verdict(result: dict[str, Any]) -> str:
    """Say whether the bound holds, and for which divergences it does not."""
    above = [row["divergence"] for row in result["memory"] if not row["holds"]]
    said = f"exceeded by {', '.join(above)}" if above else f"holds for {len(result['memory'])} of {len(result['memory'])}"
    return f"Bound of {BOUND_MB} MB: {said}."


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    commands = "\n".join(dict.fromkeys(result["commands"].values()))
    lines = [
        "# Losses: time and memory",
        "",
        INTRODUCTION,
        "",
        f"```\n{commands}\n```",
        "",
        f"Device: cpu; {environment(result)}; float32.",
    ]
    for part, title in headings(result).items():
        columns = TIME_COLUMNS if part == "time" else MEMORY_COLUMNS
        lines += ["", f"## {part.capitalize()}", "", f"{title}.", "", page.table(columns, [cells(part, row) for row in result[part]])]
    if "memory" in result:
        lines += ["", verdict(result)]
    return "\n".join([*lines, "", "`benchmarks/losses.py` says what is measured, and how.", ""])


def environment(result: dict[str, Any]) -> str:
    """Return versions and number of threads."""
    return f"torch {result['torch']}, TRL {result['trl'] or 'not installed'}, {result['threads']} threads"


def trl_version() -> str | None:
    """Return TRL's version, or None if it is not installed."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = page.parser("Time and memory of the fused objectives.", "small sizes, under half a minute")
    parser.add_argument("--part", choices=["time", "memory"], help="one half only; the other half of an existing --json file is kept")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after the one that is dropped")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # what a fresh process measures
    options = parser.parse_args()
    if options.one:
        name, way, size = options.one
        print(extra_mb(name, way, Size(*size)))
        return
    trl = trl_version()
    sizes = {"time": QUICK_TIME, "memory": QUICK_MEMORY} if options.quick else {"time": TIME, "memory": MEMORY}
    old = json.loads(options.json.read_text()) if options.part and options.json and options.json.exists() else {}
    result = old | {
        "torch": torch.__version__,
        "trl": trl,
        "threads": torch.get_num_threads(),
        "sizes": sizes,
        "bound_mb": BOUND_MB,
        "commands": old.get("commands", {}),
    }
    for part in [options.part] if options.part else ["time", "memory"]:
        result["commands"][part] = page.command()
        result[part] = []
        problem = Problem(sizes["time"]) if part == "time" else None
        for name in ["jensen_shannon"] if options.quick and part == "memory" else NAMES:
            ways = ["fused", "full", *(["trl"] if trl and name in TRL_BETA else [])]
            if problem is not None:
                row = time_row(problem, name, ways, options.rounds)
            else:
                row = memory_row(name, sizes["memory"], trl is not None)
            result[part].append(row)
            print(f"{part}: {', '.join(c for c in cells(part, row) if c)}", file=sys.stderr)
            page.keep(options, result)
    page.write(options, result, markdown)


if __name__ == "__main__":
    main()
