"""Checks and times tadistill on a GPU in at most 9 minutes: first correctness, then speed.

    bash benchmarks/gpu/run.sh                                          # on a machine with a GPU; README.md says what it needs
    python benchmarks/gpu/kit.py --device cpu --tiny                    # the same parts on a CPU, in less than two minutes
    python benchmarks/gpu/kit.py --only head,head_speed --budget 120

It prints every line at once and writes it to OUT/gpu.json, so a run that is killed keeps what it has. Parts run in the order of `--only`.
`page.py` makes docs/benchmarks/gpu.md from it. Each line of a part is a number, and some have a rule. The exit status is 1 if a rule of a
correctness part is broken, or if such a part failed or was left out for want of time. Broken rules of the other parts are printed.
"""

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CORRECT = ("losses", "head", "sampling", "resume", "freed", "study")
SPEED = ("card", "waits", "head_speed", "updates", "sampling_speed", "graphs")
PACKAGES = ("torch", "transformers", "accelerate", "huggingface_hub", "numpy", "triton", "trl", "liger_kernel", "vllm")
RESERVE = 10.0
"""No part starts with fewer seconds left."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time tadistill on a GPU.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: says that it runs and is right, not how fast")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*CORRECT, *SPEED], help="names of parts, with commas")
    parser.add_argument("--budget", type=float, default=520, help="seconds in all; a part that starts later is left out")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-kit")), help="folder of gpu.json")
    options = parser.parse_args(given)
    if wrong := [name for name in options.only if name not in (*CORRECT, *SPEED)]:
        parser.error(f"there is no part {', '.join(wrong)}; choose from {', '.join((*CORRECT, *SPEED))}")
    return options


def parts() -> dict[str, Callable[[Any], None]]:
    """Return the functions of all parts, in their order."""
    from card import card
    from graphs import graphs
    from heads import head, head_speed
    from samplers import sampling, sampling_speed, waits
    from training import freed, losses, resume, study
    from updates import updates

    functions = (losses, head, sampling, resume, freed, study, card, waits, head_speed, updates, sampling_speed, graphs)
    return {function.__name__: function for function in functions}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, and write the result after each of them."""
    import torch
    import transformers
    from bench import Kit

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; run this on a machine with one, or add --device cpu --tiny")
    kit = Kit(torch.device(options.device, *([0] if options.device == "cuda" else [])), options.tiny, options.budget)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if kit.cuda else "cpu", "tiny": kit.tiny, "budget": kit.budget}
    result |= {"command": " ".join(["python benchmarks/gpu/kit.py", *sys.argv[1:]]), "versions": versions(), "parts": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    functions = parts()
    for name in options.only:
        start, kit.lines = time.monotonic(), []
        part: dict[str, Any] = {"title": (functions[name].__doc__ or "").strip(), "correctness": name in CORRECT, "lines": kit.lines}
        part |= {"seconds": 0.0, "error": "the run ended during this part"}
        result["parts"][name] = part

        def write(part: dict[str, Any] = part, start: float = start) -> None:
            part["seconds"] = time.monotonic() - start
            (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")

        def said(line: dict[str, Any], write: Callable[[], None] = write) -> None:
            show(line)
            write()

        print(f"--- {name}: {part['title']}", flush=True)
        kit.said = said
        if kit.left() < RESERVE:
            part["error"] = "no time left"
        else:
            try:
                functions[name](kit)
                del part["error"]
            except Exception:
                part["error"] = traceback.format_exc()
            kit.free()
        write()
        print(f"{f'FAIL {name}: ' + part['error'] if 'error' in part else name} ({part['seconds']:.1f} s)", flush=True)
    return result


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(line: dict[str, Any]) -> None:
    """Print a line of a part: a rule with `pass` or `FAIL`, or a number without a rule."""
    word = {True: "pass", False: "FAIL", None: "    "}[line["ok"]]
    value = f"{line['value']:.4g}" if isinstance(line["value"], float) else str(line["value"])
    print(f"{word} {line['name']}: {value}{' (' + line['rule'] + ')' if line['rule'] else ''}", flush=True)


def broken(result: dict[str, Any], *, correctness: bool) -> list[str]:
    """Return the broken rules and the errors of the parts about correctness, or of the others."""
    found = []
    for name, part in result["parts"].items():
        if part["correctness"] == correctness:
            found += [f"{name}: {line['name']}" for line in part["lines"] if line["ok"] is False]
            found += [f"{name}: {part['error'].strip().splitlines()[-1]}"] if "error" in part else []
    return found


def main() -> int:
    options = arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as stages have it
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    result = run(options)
    wrong, slow = broken(result, correctness=True), broken(result, correctness=False)
    print("\n".join([f"BROKEN {name}" for name in wrong] + [f"not as fast or small as wanted: {name}" for name in slow]))
    rules = [line["ok"] for part in result["parts"].values() for line in part["lines"] if line["ok"] is not None]
    print(f"{sum(rules)} of {len(rules)} rules hold; the numbers are in {options.out / 'gpu.json'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
