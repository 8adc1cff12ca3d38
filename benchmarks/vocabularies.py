"""Measures time and memory of a divergence between two models with different tokenizers, beside the same step with one tokenizer.

    python benchmarks/vocabularies.py [--markdown PATH] [--quick]
    python benchmarks/vocabularies.py --texts ROWS.jsonl STUDENT_TOKENIZER TEACHER_TOKENIZER

The student has a vocabulary of SmolLM2's size (49,152), and the teacher one of Gemma's (262,144). Tokens are made by joining random earlier
tokens, as in byte-pair encoding. The first 30,000 are the same for both models. A text consists of random tokens of the student, mostly
short ones. ULD and GOLD have spans of their own: each tenth has two tokens on both sides. The steps with one tokenizer have the same
tokens and hidden sizes, and the student's or the teacher's vocabulary on both sides. Every step is a fresh process: forward and backward
from hidden states and heads.

    extra = peak resident set - resident set before the call - one gradient of the student's head and of its hidden states

The peak is VmHWM after writing 5 to /proc/self/clear_refs. A first step on a few tokens loads libraries. Times are CPU times of the
process. Megabytes are 10^6 bytes. Everything is float32. The bound on memory is 1.3 times the step with one tokenizer and the same student.

The second form measures no time. It aligns the outputs of 200 rows, and counts spans. It also reads every beginning of a text again, and
counts the beginnings whose spans, up to so many tokens before their end, are not those of the whole text. This is how often a reward that
is paid so many tokens late (`span_rewards(delay=...)`) depends on later text.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import page
import torch
from torch import Tensor

from tadistill import objectives as ob
from tadistill.data.alignment import align, read_again
from tadistill.data.token_bytes import TokenBytes, token_bytes
from tadistill.objectives import Head, Hidden, SharedVocabulary, SpanTokens
from tadistill.objectives.next_symbol import SpelledPair
from tadistill.objectives.spelling import SpelledText, SpelledVocabulary

STUDENT, TEACHER, SHARED = 49152, 262144, 30000
HIDDEN = (576, 640)
BOUND = 1.3


class Size(NamedTuple):
    """Tokens, and both vocabularies."""

    tokens: int
    student: int
    teacher: int


WAYS: dict[str, tuple[str, bool]] = {
    "one tokenizer, the student's": ("reverse_kl", False),
    "one tokenizer, the teacher's": ("reverse_kl", False),
    "reverse_kl over spans": ("reverse_kl", True),
    "jensen_shannon over spans": ("jensen_shannon", True),
    "sorted_distance (ULD)": ("sorted_distance", True),
    "hybrid_distance (GOLD)": ("hybrid_distance", True),
}
"""Name of a step: its function, and True for two tokenizers."""


def size_of(way: str, tokens: int) -> Size:
    """Return the sizes of a step."""
    both = {"one tokenizer, the student's": (STUDENT, STUDENT), "one tokenizer, the teacher's": (TEACHER, TEACHER)}
    return Size(tokens, *both.get(way, (STUDENT, TEACHER)))


def prepared(way: str, size: Size) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return the loss of a step as a function, and the tensors that get a gradient."""
    torch.manual_seed(0)
    states = [torch.randn(size.tokens, hidden) for hidden in HIDDEN]
    heads = [torch.randn(vocab, hidden) / hidden**0.5 for vocab, hidden in zip(size[1:], HIDDEN, strict=True)]
    states[0].requires_grad_()
    heads[0].requires_grad_()
    sides = [Hidden(s, Head(w)) for s, w in zip(states, heads, strict=True)]
    name, two = WAYS[way]
    share = torch.full((size.tokens,), 1 / size.tokens)
    if not two:
        return lambda: ob.fused_divergence(getattr(ob, name), states[0], sides[0].head, sides[1], mask=share)[0], [states[0], heads[0]]
    if name in ("sorted_distance", "hybrid_distance"):
        return lambda: of_distances(name, size, sides, share), [states[0], heads[0]]
    pair = pair_of(size)
    mine, theirs = (Hidden(h.states[: len(t.tokens)], h.head) for h, t in zip(sides, (pair.student, pair.teacher), strict=True))
    weights = torch.full((len(pair.follows),), 1 / len(pair.follows))
    return lambda: ob.fused_span_divergence(getattr(ob, name), mine, theirs, pair, weights=weights)[0], [states[0], heads[0]]


def of_distances(name: str, size: Size, sides: list[Hidden], share: Tensor) -> Tensor:
    """Return the loss of ULD or GOLD. Of 11 tokens, the last two are one span."""
    many = min(SHARED, min(size[1:]) // 2)
    shared = SharedVocabulary(torch.randperm(size.student)[:many], torch.randperm(size.teacher)[:many], size[1:])
    spans = (torch.arange(size.tokens) % 11 != 10).long().cumsum(0) - 1
    pairs = torch.randint(many, (size.tokens,))
    mine, theirs = (SpanTokens(side, ids[pairs], spans) for side, ids in zip(sides, (shared.student_ids, shared.teacher_ids), strict=True))
    more: dict[str, Any] = {"shared": shared} if name == "hybrid_distance" else {}
    return ob.fused_span_distance(getattr(ob, name), mine, theirs, size[1:], weights=share[: int(spans[-1]) + 1], **more)[0]


def merged(size: int, shared: Sequence[bytes], seed: int) -> list[bytes]:
    """Return a vocabulary of a size: tokens that it shares with another one, and joined random tokens."""
    draw, found = random.Random(seed), dict.fromkeys([*(bytes([byte]) for byte in range(256)), *shared])
    tokens = list(found)[:size]
    while len(tokens) < size:
        token = tokens[draw.randrange(len(tokens) // 2 + 1)] + tokens[draw.randrange(min(2000, len(tokens)))]
        if len(token) < 16 and token not in found:
            found[token] = None
            tokens.append(token)
    return tokens


def longest(text: bytes, known: Mapping[bytes, int]) -> list[int]:
    """Return the tokens of a text: at each place, the longest one."""
    found, place = list[int](), 0
    while place < len(text):
        token = next(text[place : place + n] for n in range(16, 0, -1) if text[place : place + n] in known)
        found.append(known[token])
        place += len(token)
    return found


def pair_of(size: Size) -> SpelledPair:
    """Return a text in the tokens of both models. The student has about `size.tokens` tokens."""
    shared = merged(min(SHARED, min(size[1:]) // 2), (), 0)
    tokens = [merged(n, shared, seed) for seed, n in enumerate(size[1:], 1)]
    known = [{token: i for i, token in enumerate(own)} for own in tokens]
    ends = [[(known[1 - k][token[:n]], n) for token in own for n in [first_length(token, known[1 - k])]] for k, own in enumerate(tokens)]
    roots = [roots_of(k, ends, tokens) for k in range(2)]
    draw = random.Random(5)
    text = b"".join(tokens[0][draw.randrange(min(len(tokens[0]), 2 ** draw.randint(8, 15)))] for _ in range(size.tokens - size.tokens // 8))
    sides = [longest(text, each)[: size.tokens] for each in known]
    places = [np.cumsum([len(tokens[k][i]) for i in own]) for k, own in enumerate(sides)]
    common = np.intersect1d(places[0], places[1])
    texts = []
    for k, own in enumerate(sides):
        kept = places[k] <= common[-1]
        no = np.zeros(int(kept.sum()), bool)
        spelled = SpelledVocabulary.of(tokens[k], 257, roots[k])
        texts.append(SpelledText(spelled, np.array(own)[kept], np.searchsorted(common, places[k][kept]), no, no))
    return SpelledPair.of(texts[0], texts[1], np.arange(len(common)) > 0, np.ones(len(common), bool))


def first_length(token: bytes, known: Mapping[bytes, int]) -> int:
    """Return the length of the longest token that a text begins with."""
    return next(n for n in range(len(token), 0, -1) if token[:n] in known)


def roots_of(side: int, links: list[list[tuple[int, int]]], tokens: list[list[bytes]]) -> list[tuple[int, int]]:
    """Return the cell and the length of the root of each token: the first token of both that it leads to."""
    found = []
    for token in range(len(tokens[side])):
        here, place = side, token
        while len(tokens[1 - here][links[here][place][0]]) < len(tokens[here][place]) or here:
            here, place = 1 - here, links[here][place][0]
        found.append((place, len(tokens[0][place])))
    return found


def measure(way: str, tokens: int) -> dict[str, float]:
    """Return the extra megabytes and the CPU seconds of one step in this process."""
    prepared(way, Size(22, 1000, 2000 if WAYS[way][1] else 1000))[0]().backward()
    loss, leaves = prepared(way, size_of(way, tokens))
    page.reset_peak()
    before, start = page.resident("VmRSS"), time.process_time()
    loss().backward()
    seconds = time.process_time() - start
    peak = page.resident("VmHWM")
    return {"mb": (peak - before - sum(4 * leaf.numel() for leaf in leaves)) / 1e6, "seconds": seconds}


def rows(tokens: int, rounds: int) -> list[list[str]]:
    """Return a table row for each step. The steps take turns; a number is the median of its rounds."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, taken in found.items():
            command = [sys.executable, __file__, "--one", json.dumps([way, tokens])]
            taken.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]))
    median = {way: {key: statistics.median(t[key] for t in taken) for key in ("mb", "seconds")} for way, taken in found.items()}
    one = median["one tokenizer, the student's"]
    return [
        [way, f"{m['mb']:,.0f}", f"{m['mb'] / one['mb']:.2f}", f"{m['seconds']:.1f}", f"{m['seconds'] / one['seconds']:.2f}"]
        for way, m in median.items()
    ]


def texts(path: Path, student: str, teacher: str) -> None:
    """Print the numbers of spans, and how many tokens it takes until they are fixed."""
    from transformers import AutoTokenizer

    own, other = (token_bytes(AutoTokenizer.from_pretrained(name)) for name in (student, teacher))
    with path.open(encoding="utf-8") as lines:
        outputs = [json.loads(line)["output"] for line, _ in zip(lines, range(200), strict=False)]
    counts: Counter[str] = Counter()
    for output in outputs:
        whole = spans_of(own.read(output).ids, own, other)
        counts["spans"] += len(whole)
        counts["spans of one token on both sides"] += sum(single for _, single, _ in whole)
        ids = own.read(output).ids
        for length in range(1, len(ids)):
            begun = spans_of(ids[:length], own, other)
            counts["beginnings"] += 1
            for late in range(4):
                known = [[span for span in spans if span[0] <= length - late] for spans in (whole, begun)]
                counts[f"not fixed {late} tokens late"] += known[0] != known[1]
    for name, count in counts.items():
        print(f"{name}: {count:,}")


def spans_of(ids: Sequence[int], own: TokenBytes, other: TokenBytes) -> list[tuple[int, bool, list[int]]]:
    """Return for each span: the number of the student's tokens before its end, whether it is single, and the teacher's tokens."""
    mine, theirs = read_again(ids, own, other)
    found = align(mine, theirs)
    ends, counts = {span: place + 1 for place, span in enumerate(found.student)}, Counter(found.student)
    tokens: dict[int, list[int]] = {}
    for token, span in zip(theirs.ids, found.teacher, strict=True):
        tokens.setdefault(span, []).append(token)
    return [(ends[k], counts[k] == len(tokens[k]) == 1, tokens[k]) for k in range(len(found.ends))]


COLUMNS = ["step", "extra MB", "memory ratio", "CPU s", "time ratio"]


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    tokens = result["tokens"]
    lines = [
        "# Different tokenizers: time and memory",
        "",
        "This page compares a step between two models with different tokenizers with the same step between models with one tokenizer. [The "
        "page about different tokenizers](../concepts/tokenizers.md) explains the losses.",
        "",
        f"```\n{result['command']}\n```",
        "",
        f"{tokens:,} tokens, vocabularies {STUDENT:,} (student) and {TEACHER:,} (teacher), hidden sizes {HIDDEN[0]} and {HIDDEN[1]}. One "
        f"tensor [tokens, vocabulary] of the teacher's logits would take {tokens * TEACHER * 4 / 1e6:,.0f} MB. torch {torch.__version__}, "
        f"CPU, {torch.get_num_threads()} thread; float32. The ratios are to the first row.",
        "",
        page.table(COLUMNS, result["rows"]),
        "",
        "`benchmarks/vocabularies.py` says what is measured, and how.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = page.parser("Time and memory of divergences between models with different tokenizers.", "few tokens")
    parser.add_argument("--rounds", type=int, default=1, help="a number is the median of so many rounds")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # what a fresh process measures
    parser.add_argument("--texts", nargs=3, metavar=("ROWS", "STUDENT", "TEACHER"), help="count spans of texts instead")
    options = parser.parse_args()
    if options.texts:
        texts(Path(options.texts[0]), *options.texts[1:])
        return
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    tokens = 44 if options.quick else 1100
    found = rows(tokens, options.rounds)
    page.write(options, {"command": page.command(), "tokens": tokens, "rows": found}, markdown)
    above = [row[0] for row in found[2:4] if float(row[2]) > BOUND]
    print(f"Bound of {BOUND} on memory: {'exceeded by ' + ', '.join(above) if above else 'holds'}.")


if __name__ == "__main__":
    main()
