"""Compares the predicted memory of stages with the memory that they use: the largest stage of shipped recipes, in a small form.

    python benchmarks/memory.py [--only minillm/gpt2-120M] [--folder DIR] [--markdown PATH]

A small form has the recipe's methods, precisions and model families, and its vocabulary sizes. Its models are narrower, have fewer layers
and random weights. Texts are random words. Batches are small, and there are two updates. The measured stage has a process of its own, which
sees no GPU. Its memory is the largest resident anonymous memory, sampled every few milliseconds, minus that at the stage's start, when
everything is imported.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_EVERY = 0.003
"""Seconds between two samples of the resident memory."""
_GPT2 = ("scratch:gpt2", "n_embd", "n_layer", "n_head", {"n_positions": 512})
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_OPT = ("scratch:opt", *_SIZES, {"max_position_embeddings": 512})
_LLAMA = ("scratch:llama", *_SIZES, {"max_position_embeddings": 512})
_QWEN2 = ("scratch:qwen2", *_SIZES, {"tie_word_embeddings": True})
_SMOL = ("scratch:llama", *_SIZES, {"max_position_embeddings": 512, "tie_word_embeddings": True})


_GEMMA = ("scratch:gemma3_text", *_SIZES, {"max_position_embeddings": 512, "num_key_value_heads": 1, "head_dim": 64})


class Small(NamedTuple):
    """How a recipe is made small."""

    arm: str
    """The only arm that is kept. Its stages include the recipe's largest one."""
    family: tuple[str, str, str, str, dict[str, Any]]
    vocab: int
    models: dict[str, tuple[int, int, int]]
    """Width, layers and heads of each loaded model. The feed-forward width is 4 times (GPT-2, OPT) or 3 times the width."""
    others: dict[str, tuple[tuple[str, str, str, str, dict[str, Any]], int]] = {}
    """Family and vocabulary size of each model that differs from the others. Its tokenizer has the same first words."""
    stage: str = ""
    """How the label of the compared stage begins. Empty for any stage."""


RECIPES = {
    "minillm/gpt2-120M": Small("minillm", _GPT2, 50257, {"teacher": (512, 8, 8), "init": (384, 6, 6), "base": (384, 6, 6)}),
    "minillm/opt-1.3B": Small("minillm", _OPT, 50272, {"teacher": (640, 8, 8), "init": (384, 6, 6), "base": (384, 6, 6)}),
    "minillm/llama-7B": Small("kd", _LLAMA, 32000, {"teacher": (640, 8, 8), "init": (512, 8, 8), "base": (512, 8, 8)}),
    "minillm/qwen2.5-1.5B": Small("minillm", _QWEN2, 151936, {"teacher": (320, 8, 5), "init": (192, 6, 3), "base": (192, 6, 3)}),
    "smollm2_dolly": Small("kd", _SMOL, 49152, {"xl": (384, 12, 6)}),
    "bridge/smollm2-gemma": Small(
        "direct", _SMOL, 49152, {"gemma": (128, 6, 2), "l": (384, 12, 6)}, {"gemma": (_GEMMA, 262144)}, "distill gemma -> s"
    ),
}


class Row(NamedTuple):
    """The predicted and the measured bytes of one stage."""

    recipe: str
    stage: str
    estimate: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.estimate / self.measured


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", action="append", choices=[*RECIPES], help="a recipe; may be given several times")
    options.add_argument("--folder", type=Path, help="keep the files here")
    options.add_argument("--markdown", type=Path)
    options.add_argument("--stage", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.stage:
        print(json.dumps(measured(pickle.loads(given.stage.read_bytes()))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = []
        for name in given.only or RECIPES:
            found.append(compare(name, (given.folder or Path(temporary)) / name))
            print(table(found[-1:], head=len(found) == 1), flush=True)
    if given.markdown:
        given.markdown.write_text(table(found) + "\n", encoding="utf-8")


def compare(name: str, folder: Path) -> Row:
    """Run the stages of a small form up to its largest one. Return the predicted and the measured memory of the largest stage."""
    from tadistill.config import parse
    from tadistill.plan.arms import make_plan
    from tadistill.plan.graph import with_ancestors
    from tadistill.plan.task import make_task, planned_memory
    from tadistill.store import Store

    folder.mkdir(parents=True, exist_ok=True)
    _texts(folder, RECIPES[name])
    recipe = parse(small(name, folder), source=name, folder=folder)
    plan, store = make_plan(recipe), Store(folder / "store")
    needs = {key: estimated(memory) if (memory := planned_memory(plan, stage)) else 0 for key, stage in plan.stages.items()}
    largest = max((key for key in needs if plan.stages[key].label.startswith(RECIPES[name].stage)), key=lambda key: needs[key])
    for key in plan.stages:
        if key in with_ancestors(plan.stages, [largest]):
            used = _in_process(pickle.dumps(make_task(plan, plan.stages[key], store)), folder)
    return Row(name, plan.stages[largest].label, needs[largest], used)


def _in_process(task: bytes, folder: Path) -> float:
    file = folder / "task.pkl"
    file.write_bytes(task)
    command, hidden = [sys.executable, __file__, "--stage", str(file)], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=hidden)
    return float(json.loads(done.stdout.splitlines()[-1]))


def estimated(memory: Any) -> float:
    """Return the predicted bytes of a stage on a CPU. `memory` is a `tadistill.models.flops_and_memory.Memory`."""
    import torch

    from tadistill.objectives.tiles import tile_bytes

    return memory.peak(cuda=False, tile=tile_bytes(torch.device("cpu")))


def measured(task: Any) -> float:
    """Run a stage in this process. Return its largest memory in bytes, minus the memory at its start."""
    import torch

    import tadistill.runner.preload  # noqa: F401 (the imports of every stage's process)
    from tadistill.models.flops_and_memory import keep_freed_memory
    from tadistill.stages.execute import run_stage

    torch.set_num_threads(1)
    quiet: dict[str, Any] = {"progress": lambda *_: None, "alarm": lambda text: print(text, file=sys.stderr), "stop": lambda: False}
    if task.spec.steps:  # a training, as in `tadistill run`
        keep_freed_memory()
    with _sampled() as most:
        before = most[0]
        run_stage(task, **quiet)
    return float(most[0] - before)


@contextlib.contextmanager
def _sampled() -> Iterator[list[int]]:
    most, ended = [_resident()], threading.Event()

    def sample() -> None:
        while not ended.wait(_EVERY):
            most[0] = max(most[0], _resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _resident() -> int:
    # anonymous pages only: the pages of mapped files are freed when memory is short
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this kernel does not tell the anonymous memory of a process (RssAnon of /proc/self/status)")


def small(name: str, folder: Path) -> dict[str, Any]:
    """Return the small form of a shipped recipe as plain data."""
    form = RECIPES[name]
    raw = yaml.safe_load((Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    for model, entry in raw["models"].items():
        (load, width, layers, heads, more), vocab = form.others.get(model, (form.family, form.vocab))
        inner = {"scratch:gpt2": ("n_inner", 4), "scratch:opt": ("ffn_dim", 4)}.get(load, ("intermediate_size", 3))
        if "load" in entry:
            size = form.models[model]
            config = dict(zip((width, layers, heads), size, strict=True)) | {inner[0]: inner[1] * size[0]} | more
            if load == "scratch:qwen2":
                config["num_key_value_heads"] = 1
            if load == "scratch:opt":
                config["word_embed_proj_dim"] = size[0]
            entry |= {"load": load, "tokenizer": str(_tokenizer(folder, vocab)), "config": config}
        elif "init" in entry:
            entry["init"]["layers"] = form.models[entry["init"]["from"]][1] // 2
    _shorten(raw)
    files = {part: str(folder / f"{part}.jsonl") for part in ("train", "dev", "test")}
    data = {"train": files["train"], "dev": files["dev"], "test": [files["test"]], "max_prompt": 128, "max_length": 256}
    raw["data"] |= data | ({"corpus": files["train"]} if "corpus" in raw["data"] else {})
    raw["seeds"] = raw["seeds"][:1]
    raw["arms"] = {form.arm: raw["arms"][form.arm]}
    raw["evaluate"] |= {"max_new_tokens": 16, "seeds": [1], "batch": 8, "also": {}}
    raw["analyse"] = False
    return raw


def _shorten(part: Any) -> None:
    # two updates instead of epochs
    if not isinstance(part, dict):
        return
    for name, value in part.items():
        if name == "optim":
            value.pop("epochs", None)
            value |= {"steps": 2, "batch": 8, "micro_batch": 4, "warmup": 0}
        elif name == "select":
            part[name] = {"metric": "loss", "every": 2}
        elif name == "sampler" and ("max_new_tokens" in value or "rollouts" in value):
            value |= {"max_new_tokens": 64} | ({"rollouts": 16} if "rollouts" in value else {})
        else:
            _shorten(value)


def _tokenizer(folder: Path, vocab: int) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = folder / f"tokenizer-{vocab}"
    if not made.exists():
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", "<unk>", *_words(vocab)])}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(made)
    return made


def _words(vocab: int) -> list[str]:
    return [f"w{i}" for i in range(vocab - 2)]


def _texts(folder: Path, form: Small) -> None:
    draw, words = random.Random(1), _words(form.vocab)
    for part, rows in {"train": 64, "dev": 8, "test": 8}.items():
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(rows):
                prompt, answer = (" ".join(draw.choices(words, k=draw.randint(40, 100))) for _ in range(2))
                file.write(json.dumps({"instruction": prompt, "output": answer, "text": f"{prompt} {answer}"}) + "\n")


def table(rows: list[Row], *, head: bool = True) -> str:
    """Return the comparison as a Markdown table."""
    lines = [f"| {r.recipe} | {r.stage} | {r.estimate / 1e6:,.0f} | {r.measured / 1e6:,.0f} | {r.ratio:.2f} |" for r in rows]
    top = ["| recipe | largest stage | estimate MB | measured MB | estimate / measured |", "|---|---|---:|---:|---:|"] if head else []
    return "\n".join([*top, *lines])


if __name__ == "__main__":
    main()
