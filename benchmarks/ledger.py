"""Compares FLOPs of whole training stages: predicted from the recipe, metered while they ran, and counted by torch.

    OMP_NUM_THREADS=1 python benchmarks/ledger.py [--json PATH] [--markdown PATH] [--quick]

Every stage runs as in a study, dev evaluations included. Torch's count has the formulas of its FlopCounterMode. "Predicted" is the number
of `tadistill plan` (`plan.costs.Ledger`), "metered" the number in the stage's manifest (`train.monitoring`). Errors are those of the totals
against torch's count.

Known lengths: all models that sample have random weights. A sampled answer then ends before `max_new_tokens` only if <eos> is drawn by
chance, about once in as many tokens as the vocabulary has. The prediction knows this from the recipe. Unknown lengths: teacher, assistant
and student have each had a short SFT; predictions then use the references' lengths.

*Sampled* is the prediction's error in the number of logits that the student computed while sampling; below 0 the answers were longer than
predicted. Three stages contain chance that no prediction can know. `mix` draws at random whether an update samples. `replay` starts with
phi = 0 and raises it when the dev loss rises, while the prediction assumes phi = 1 (a high learning rate makes the loss rise here). KD's
batches contain random rows.
"""

import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page
import torch
import transformers
from ledger_counted import FAMILIES, counted, shaped

from tadistill.config import Recipe, validate
from tadistill.plan.arms import make_plan

COLUMNS = ("predicted", "metered", "counted")
SHAPES = {"t": (64, 3), "a": (48, 2), "s": (32, 2)}
"""Width and layers."""


def arms(most: int) -> dict[str, dict[str, Any]]:
    """Return the methods, with answers of at most `most` tokens; all but `dense` teach the student from one teacher."""
    sampling = {"max_new_tokens": most, "chunk": 16}
    rounds = {"max_new_tokens": most, "rollouts": 32, "inner_epochs": 2}
    minillm = {"objective": {"type": "minillm", "pt_kd_ratio": 0.5}, "sampler": {"type": "teacher_mixed"} | rounds}
    reverse = {"objective": {"type": "reverse_kl"}}
    return {
        "KD": {"path": "f > s", "objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}},
        "on-policy": {"path": "t > s", "sampler": {"type": "student"} | sampling} | reverse,
        "MiniLLM": {"path": "t > s"} | minillm,
        "dense MiniLLM": {"path": "t > a > s", "dense": {}} | minillm,
        "pair": {"path": "t > s", "objective": {"type": "contrastive"}, "sampler": {"type": "pair"} | sampling},
        "replay": {
            "path": "t > s",
            "sampler": {"type": "replay", "capacity": 64, "tolerance": 0, "increment": 1} | sampling,
            "optim": {"lr": 0.1},  # the dev loss rises at once, which sets phi to 1
            "select": {"every": 2},
        }
        | reverse,
        "mix": {"path": "t > s", "sampler": {"type": "mix", "lam": 0.5} | sampling} | reverse,
    }


def recipe(family: str, *, updates: int, trained: int | None) -> Recipe:
    """Return a study of all methods.

    Args:
        updates: of each method.
        trained: updates of SFT that teacher, assistant and student have had; None for random weights, beside a teacher `f` with
            `updates` of SFT, which KD needs and which samples nothing.
    """
    optim = {"lr": 5e-3, "batch": 16, "warmup": 10}

    def sft(steps: int) -> dict[str, Any]:
        return {"sft": {"optim": optim | {"steps": steps}, "select": {"metric": "loss", "every": 100}}}

    models = {name: shaped(family, *shape) | (sft(trained) if trained else {}) for name, shape in SHAPES.items()}
    models["f"] = shaped(family, *SHAPES["t"]) | sft(trained or updates) | {"seed": 2}
    return validate(
        {
            "study": "ledger",
            "seeds": [1],
            "models": models,
            "teacher": "t",
            "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "corpus": "tinyworld", "template": "plain"}
            | {"max_length": 48, "limit": {"train": 256, "dev": 32}, "world": {"people": 20}},
            "method": {"optim": {"steps": updates, "batch": 16}, "select": {"metric": "loss"}},
            "evaluate": {"also": {}, "max_new_tokens": 16},
            "arms": arms(16),
        }
    )


def measure_block(family: str, *, updates: int, trained: int | None) -> Iterator[dict[str, Any]]:
    """Return one row for the SFT of `f`, and one for the student's stage of every method."""
    plan = make_plan(recipe(family, updates=updates, trained=trained))
    with tempfile.TemporaryDirectory() as directory:
        for stage, flops, manifest in counted(plan, Path(directory)):
            if stage.model != ("f" if stage.kind == "sft" else "s"):
                continue  # SFT of the others, and the first edge of the dense path
            predicted, parts = stage.cost, manifest["ledger"]["parts"]
            assert predicted is not None
            metered = sum(part["flops"] for part in parts.values())
            rollout = "rollout/student"
            yield {
                "lengths": "unknown" if trained else "known",
                "family": family,
                "stage": "SFT" if stage.kind == "sft" else ", ".join(sorted(stage.arms)),
                "updates": stage.steps,
                "predicted": predicted.total,
                "metered": metered,
                "counted": flops,
                "predicted_error": predicted.total / flops - 1,
                "metered_error": metered / flops - 1,
                "sampled_error": predicted.parts[rollout].heads / parts[rollout]["heads"] - 1 if rollout in parts else None,
            }


def measure(quick: bool) -> dict[str, Any]:
    """Measure both blocks on both families."""
    start = time.process_time()
    updates, trained = (4, 20) if quick else (16, 200)
    rows = [row for known in (None, trained) for family in FAMILIES for row in measure_block(family, updates=updates, trained=known)]
    machine = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {"machine": machine | {"seconds": round(time.process_time() - start)}, "trained": trained, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of one block."""
    columns = ["family", "stage", "updates", *(f"{name} MFLOPs" for name in COLUMNS), "prediction %", "meter %", "sampled %"]
    cells = [
        (
            *(row["family"], row["stage"], row["updates"], *(f"{row[name] / 1e6:,.1f}" for name in COLUMNS)),
            *(f"{100 * row['predicted_error']:+.1f}", f"{100 * row['metered_error']:+.2f}"),
            "" if row["sampled_error"] is None else f"{100 * row['sampled_error']:+.1f}",
        )
        for row in rows
    ]
    return page.table(columns, cells, left=("family", "stage"))


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    machine, rows = result["machine"], result["rows"]
    known, unknown = ([row for row in rows if row["lengths"] == lengths] for lengths in ("known", "unknown"))
    shapes = ", ".join(f"{name} {width} x {layers}" for name, (width, layers) in SHAPES.items())

    def largest(block: list[dict[str, Any]]) -> str:
        texts = []
        for part in (block, [row for row in block if row["stage"] != "replay"]):
            row = max(part, key=lambda row: abs(row["predicted_error"]))
            texts.append(f"{100 * row['predicted_error']:+.1f} % ({row['family']}, {row['stage']})")
        meter = max(abs(row["metered_error"]) for row in block)
        return f"Largest error: prediction {texts[0]}, without replay {texts[1]}; meter {100 * meter:.2f} %."

    lines = [
        "# FLOPs of training stages: predicted, metered, counted",
        "",
        "This page compares the FLOPs that `tadistill plan` predicts with those that the meter and torch count.",
        "",
        f"```\n{result['command']}\n```",
        "",
        f"One run, {machine['seconds']} s of one core; Python {machine['python']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}. tinyworld, width x layers of the models: {shapes} (teacher, assistant, student; `dense MiniLLM` "
        "has both teachers). MiniLLM has its corpus term. `benchmarks/ledger.py` says what is counted, and how; the formulas are in "
        "[compute.md](../concepts/compute.md).",
        "",
        "The learning rate of `replay` raises the dev loss on purpose. With unknown lengths its prediction is too low, probably because a "
        "student with such a loss ends few answers; this was not measured separately. Errors of parts can cancel in a total.",
        "",
        "## Known lengths: models with random weights, which hardly ever end an answer",
        "",
        largest(known),
        "",
        table(known),
        "",
        f"## Unknown lengths: teacher, assistant and student after {result['trained']} updates of SFT",
        "",
        largest(unknown),
        "",
        table(unknown),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = page.parser(__doc__, "few updates").parse_args()
    page.write(options, {"command": page.command("OMP_NUM_THREADS=1 "), **measure(options.quick)}, markdown)


if __name__ == "__main__":
    main()
