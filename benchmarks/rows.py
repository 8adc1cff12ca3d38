"""Measures what a large training set costs before the first stage: CPU time and memory of `tadistill plan` and of the preflight.

    python benchmarks/rows.py [--rows 1000000] [--folder DIR] [--markdown PATH]

It writes rows of random words (about 140 bytes each) and a small model with a byte-level BPE of 8,000 tokens. Then each command runs in a
process of its own, twice. CPU time is user and system time of the process, memory is its peak resident set; both come from wait4.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import page

PREFLIGHT = """
from pathlib import Path
from tadistill.config import load
from tadistill.plan.arms import make_plan
from tadistill.runner.preflight import check_study
check_study(make_plan(load(Path({recipe!r}))))
"""
TOKENISE = """
from pathlib import Path
from transformers import AutoTokenizer
from tadistill.config import load
from tadistill.data.datasets import SplitRows
from tadistill.data.token_cache import keep
from tadistill.data.encoding_rules import Rules
data = load(Path({recipe!r})).data
rows, rules = SplitRows(data.train, "train", data.world, data.root), Rules(data.max_prompt, data.max_length, template=data.template)
keep(rows, AutoTokenizer.from_pretrained({model!r}), rules, name="train")
"""
RECIPE = """
study: rows
seeds: [1]
models:
  t: {{load: {model}}}
  s: {{load: {model}}}
data:
  train: {folder}/train.jsonl
  dev: {folder}/dev.jsonl
  test: [{folder}/test.jsonl]
  template: alpaca
  max_prompt: 128
  max_length: 256
method:
  objective: {{type: forward_kl}}
  sampler: {{type: dataset}}
  optim: {{lr: 1e-3, steps: 20, batch: 8}}
evaluate: {{seeds: [1], max_new_tokens: 32}}
arms: {{direct: t > s}}
"""


class Cost(NamedTuple):
    """What a process used."""

    cpu: float
    wall: float
    megabytes: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--folder", type=Path, help="keep the files here")
    options.add_argument("--markdown", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(given.folder or Path(temporary), given.rows)
    text = table(found)
    print(text)
    if given.markdown:
        given.markdown.write_text(text + "\n", encoding="utf-8")


def measure(folder: Path, rows: int) -> dict[str, Cost]:
    """Return the cost of every command, in the order in which a user meets them."""
    # in another process: a child's peak begins with the memory of the process that starts it
    subprocess.run(
        [sys.executable, "-c", f"import rows; rows.make(rows.Path({str(folder)!r}), {rows})"], cwd=Path(__file__).parent, check=True
    )
    recipe, model = str(folder / "recipe.yaml"), str(folder / "model")
    places = {"recipe": recipe, "model": model}
    plan = [sys.executable, "-m", "tadistill", "plan", recipe]
    preflight, tokenise = ([sys.executable, "-c", text.format(**places)] for text in (PREFLIGHT, TOKENISE))
    environment = os.environ | {"TADISTILL_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TADISTILL_RUNS": str(folder / "runs")}
    commands = [("plan", plan), ("preflight", preflight), ("plan, again", plan), ("preflight, again", preflight)]
    commands += [("first stage: tokenise", tokenise), ("later stages: open", tokenise), ("preflight, after a stage", preflight)]
    return {name: run(command, environment) for name, command in commands}


def run(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)[:80]} failed with status {status}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6)


def make(folder: Path, rows: int) -> None:
    """Write the rows, a tokenizer trained on them, a model, and the recipe."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(4, most)))

    for name, count in {"train": rows, "dev": 200, "test": 200}.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"instruction": text(10), "input": "", "output": text(12)}) + "\n" for _ in range(count))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator((text(12) for _ in range(20_000)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=1, pad_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, model=folder / "model"), encoding="utf-8")


def table(found: dict[str, Cost]) -> str:
    """Return the costs as a Markdown table."""
    rows = [(name, f"{cost.cpu:.1f}", f"{cost.wall:.1f}", f"{cost.megabytes:,.0f}") for name, cost in found.items()]
    return page.table(("command", "CPU s", "wall s", "peak MB"), rows)


if __name__ == "__main__":
    main()
