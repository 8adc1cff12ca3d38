"""Measures the time of sampling and of transformers' `model.generate`.

    python benchmarks/generate.py [--json PATH] [--markdown PATH] [--quick] [--rounds N] [--mixture]

Four ways to make 64 new tokens behind prompts of 32, of random Llama-shaped models (student 2 layers x 128, teacher 8 x 256), from
the whole vocabulary at temperature 1:

    own            tadistill's loop, the student alone
    generate       `student.generate(do_sample=True, top_k=0)`
    own mixed      tadistill's loop, 0.8 student + 0.2 teacher, with log-probabilities and the teacher's hidden states
    generate both  `generate` of the student and then of the teacher: the least that two models cost with it, because it cannot mix them

With `--mixture` two ways to sample from the mixture are timed instead, on a CPU in CPU time, so run it with OMP_NUM_THREADS=1:

    lazy           `tadistill.rollout.teacher_mixed_fast`, in which a model reads several tokens at a time, and only when it has to
    in step        the loop in which both models read every token; the tokens that it samples must be equal

No token ends a response, so all do equal work. In a round each of them runs once, one after the other. The first round is dropped and the
others give the medians. A ratio is the median of the rounds' ratios, so other load on the machine affects both sides.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import page
import step_sides
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from tadistill.rollout import teacher_mixed_fast
from tadistill.rollout.draw import Mixture
from tadistill.rollout.engine import sample


class Size(NamedTuple):
    """Vocabulary, sequences, prompt tokens, new tokens."""

    vocab: int
    batch: int
    prompt: int
    new: int


SIZES = [Size(vocab, batch, 32, 64) for vocab in (4096, 49152) for batch in (16, 64)]
QUICK = [Size(4096, 4, 8, 8)]
RATIOS = {"own": "generate", "own mixed": "generate both"}
MIXTURE_RATIOS = {"lazy": "in step"}
INTRODUCTION = "This page compares the time of tadistill's sampling loop with that of transformers' `generate`."
MIXTURE_INTRODUCTION = (
    "This page compares the times of two ways to sample the same tokens from 0.8 student + 0.2 teacher: "
    "`tadistill.rollout.teacher_mixed_fast`, and the loop in which both models read every token. Times on a CPU are CPU times."
)


class Problem:
    """Models, prompts and uniforms of one size."""

    def __init__(self, size: Size):
        self.size = size
        self.student, self.teacher = (
            step_sides.model(shape, size.vocab, ends=False).eval() for shape in (step_sides.STUDENT, step_sides.TEACHER)
        )
        generator = np.random.default_rng(0)
        ids = generator.integers(size.vocab, size=(size.batch, size.prompt))
        self.ids, self.prompts = torch.from_numpy(ids), [tuple(row) for row in ids.tolist()]
        self.uniforms = generator.random((size.batch, size.new))
        self.settings = GenerationConfig(max_new_tokens=size.new, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)

    def mixture_ways(self) -> dict[str, Callable[[], None]]:
        """Return what is timed with `--mixture`."""
        guide, possible, said = Mixture(self.teacher, 0.2), teacher_mixed_fast.possible, []

        def timed(allowed: bool) -> None:
            teacher_mixed_fast.possible = possible if allowed else lambda *_: False
            said.append([r.tokens for r in sample(self.student, self.prompts, self.uniforms, eos=(), vocab=self.size.vocab, guide=guide)])
            teacher_mixed_fast.possible = possible
            assert said[-1] == said[0]

        return {"lazy": lambda: timed(True), "in step": lambda: timed(False)}

    def ways(self) -> dict[str, Callable[[], None]]:
        """Return the ways of sampling that are timed."""

        def own(guide: Mixture | None) -> None:
            rollouts = sample(self.student, self.prompts, self.uniforms, eos=(), vocab=self.size.vocab, guide=guide)
            assert all(len(rollout.tokens) == self.size.new for rollout in rollouts)

        def generate(*models: PreTrainedModel) -> None:
            for model in models:
                out = model.generate(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), generation_config=self.settings)
                assert out.shape == (self.size.batch, self.size.prompt + self.size.new)

        return {
            "own": lambda: own(None),
            "generate": lambda: generate(self.student),
            "own mixed": lambda: own(Mixture(self.teacher, 0.2)),
            "generate both": lambda: generate(self.student, self.teacher),
        }


def measured(size: Size, rounds: int, mixture: bool) -> dict[str, Any]:
    """Return the median milliseconds of each way, and the ratios."""
    problem = Problem(size)
    ways, peers = (problem.mixture_ways(), MIXTURE_RATIOS) if mixture else (problem.ways(), RATIOS)
    clock = time.process_time if mixture else time.perf_counter
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, run in ways.items():
            start = clock()
            run()
            taken[way].append(1000 * (clock() - start))
    kept = {way: values[1:] for way, values in taken.items()}
    ratios = {way: statistics.median(a / b for a, b in zip(kept[way], kept[peer], strict=True)) for way, peer in peers.items()}
    return {**size._asdict(), "ms": {way: statistics.median(values) for way, values in kept.items()}, "ratios": ratios}


# --- report -------------------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any], peers: dict[str, str]) -> list[str]:
    """Return a row as text, in the order of the columns."""
    text = [f"{row['vocab']:,}", str(row["batch"])]
    for way, peer in peers.items():
        text += [f"{row['ms'][way]:,.0f}", f"{row['ms'][peer]:,.0f}", f"{row['ratios'][way]:.2f}"]
    return text


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    first = result["rows"][0]
    mixture = first["ratios"].keys() == MIXTURE_RATIOS.keys()
    peers = MIXTURE_RATIOS if mixture else RATIOS
    columns = ["vocabulary", "batch", *(name for way, peer in peers.items() for name in (f"{way} ms", f"{peer} ms", "ratio"))]
    lines = [
        "# Sampling from a mixture: time" if mixture else "# Sampling: time",
        "",
        MIXTURE_INTRODUCTION if mixture else INTRODUCTION,
        "",
        f"```\n{result['command']}\n```",
        "",
        f"{first['new']} new tokens behind prompts of {first['prompt']}. Device: cpu; torch {result['torch']}, "
        f"transformers {result['transformers']}, {result['threads']} threads; float32.",
        "",
        page.table(columns, [cells(row, peers) for row in result["rows"]], left=()),
        "",
        "`benchmarks/generate.py` says what is measured, and how.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = page.parser("Time of sampling beside transformers' generate.", "one small size, a few seconds")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after the one that is dropped")
    parser.add_argument("--mixture", action="store_true", help="time two ways to sample from a mixture instead")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "command": page.command(),
        "rows": [],
    }
    for size in QUICK if options.quick else SIZES:
        row = measured(size, options.rounds, options.mixture)
        result["rows"].append(row)
        print(", ".join(cells(row, MIXTURE_RATIOS if options.mixture else RATIOS)), file=sys.stderr)
        page.keep(options, result)
    page.write(options, result, markdown)


if __name__ == "__main__":
    main()
