"""Wrong recipes and wrong data by the thousand: each must be accepted, or refused in sentences that name their place, before any stage.

    python benchmarks/fuzz.py                                  # 300 recipes and 60 data files, as the tests do
    python benchmarks/fuzz.py --recipes 10000 --data 500       # the long form
    python benchmarks/fuzz.py --recipes 0 --data 0 --run 100   # stages of accepted changes to a small recipe: none may fail

Everything runs in one process: the recipe is read, planned and checked as `tadistill run` does before its first stage. The output counts
the outcomes and lists every problem: a traceback, a late failure, a hang, or a message without a place.
"""

import argparse
import collections
import copy
import json
import math
import os
import random
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tadistill.config import Recipe, parse
from tadistill.errors import ConfigError, DataError, ModelError, TadistillError
from tadistill.plan.arms import make_plan

ROOT = Path(__file__).resolve().parents[1]
BASES = ("recipes/quickstart.yaml", "tests/e2e/recipe.yaml", "tests/e2e/edges.yaml", "tests/e2e/interrupted.yaml",
         "recipes/takd/tinyworld-all-paths.yaml", "recipes/methods/gkd.yaml", "recipes/methods/seqkd.yaml")  # fmt: skip
HANG = 30
"""Seconds after which a recipe counts as a hang."""
PLACE = re.compile(
    r"`|line \d|data set|models\.|arms\.|data\.|objective|sampler|scratch:|seed|optim|row \d|stage|more problems? |\b(xl|l|s)\b"
)
SMALL = """\
study: small
seeds: [1]
models:
  xl:
    load: "scratch:llama"
    tokenizer: tinyworld
    seed: 1
    config: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 32}
  s: {init: {from: xl, layers: [1]}, sft: {optim: {steps: 2, batch: 4}, select: {every: 1}}}
data:
  train: tinyworld
  dev: tinyworld
  test: [tinyworld]
  template: plain
  max_length: 64
  world: {people: 20}
  limit: {train: 20, dev: 4, test: 4}
method:
  objective: {type: jensen_shannon}
  sampler: {type: student, max_new_tokens: 4}
  optim: {steps: 2, batch: 4, lr: 1e-3}
  select: {metric: rouge_l, every: 2}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
arms: {direct: xl > s}
"""

# --- values -------------------------------------------------------------------------------------------------------------

NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3, 1e30, -1e30, 10**400, 2**63, 2**64, 1.5, 0.1 + 0.2, -0.0, 5e-324, True, False]
WORDS = [
    *("", " ", "\n", "a\nb", "../x", "../../etc/passwd", "/abs", "a/b", "a b", "é", "😀", "\u202eabc", "\x00", "\x7f", "\x1b[2J", "$(id)"),
    *("`id`", "; id", "' \"", "${oc.env:HOME}", "${study}", "${", "xl > s", "xl > xl", "> s", "xl >", " then ", "xl > l > s then xl > s"),
    *("as takd", "as as", "1e3", "0x10", "yes", "~", "x" * 100_000, "a.b", ".", "..", "CON", "-x", "store", "tinyworld", "scratch:"),
    *("scratch:nope", "scratch:bert", "scratch:t5", "wheel://", "wheel://a==1/../x", "x.gguf", "a/b/c", "=1+1", "minillm", "last"),
]
OTHERS = [
    *(None, [], {}, [[]], {"a": 1}, [1, "a", None], {"type": "minillm"}, {"type": "nope"}, {"type": None}, {"type": []}),
    *({"load": "scratch:llama"}, [math.nan], [True], [1, 1], ["a", "a"], [-1], [2**70], [1.5], {"": 1}, {None: 1}, {1: 2}),
]
VALUES = [*NUMBERS, *WORDS, *OTHERS]
KEYS = [
    "",
    "a.b",
    "a b",
    "😀",
    "../x",
    "type",
    "from",
    "a\nb",
    "${study}",
    "__class__",
    "model_config",
    "x" * 3000,
    "[0]",
    "-",
    "\u202e",
    "con",
]


def places(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every part of a tree, except its root."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in parts:
        yield (*at, key)
        yield from places(value, (*at, key))


def get(tree: Any, at: tuple) -> Any:
    """Return the part at a path."""
    for key in at:
        tree = tree[key]
    return tree


def mutate(tree: Any, draw: random.Random) -> Any:
    """Return a copy with one to three random changes: a value, a deletion, another key, another nesting, a swap, a repetition."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = draw.choice([*places(tree)])
        holder, key = get(tree, at[:-1]), at[-1]
        change = draw.choice(["value"] * 6 + ["delete", "rename", "wrap", "nest", "add", "repeat", "swap"])
        if change == "value":
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif change == "delete":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            holder[draw.choice(KEYS)] = holder.pop(key)
        elif change == "wrap":
            holder[key] = [holder[key]]
        elif change == "nest":
            holder[key] = {draw.choice(KEYS): holder[key]}
        elif change == "add" and isinstance(holder[key], dict):
            holder[key][draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        elif change == "repeat" and isinstance(holder[key], list) and holder[key]:
            holder[key].append(copy.deepcopy(holder[key][-1]))
        elif change == "swap":
            other = draw.choice([*places(tree)])
            mine, theirs = copy.deepcopy(holder[key]), copy.deepcopy(get(tree, other))
            holder[key] = theirs
            if at != other[: len(at)]:
                get(tree, other[:-1])[other[-1]] = mine
    return tree


def bases() -> list[Any]:
    """Return the recipes that are changed, with few rows, and one with every key written out."""
    found = [yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in BASES]
    small = yaml.safe_load(SMALL)
    whole = json.loads(parse(SMALL, source="small").model_dump_json(by_alias=True))
    for tree in found:
        local = "tinyworld" in str(tree["data"]["train"])
        tree["data"] |= {"limit": {"train": 20, "dev": 4, "test": 4}, "world": {"people": 20}} if local else small["data"]
        tree["seeds"] = tree["seeds"][:2]
    return [*found, small, whole, whole]


# --- data ---------------------------------------------------------------------------------------------------------------

ROW = {"instruction": "Say hi", "input": "", "output": "hi there"}
TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
INSERTED = [b"null", b"[", b"{", b"\\u0000", b"\\ud800", b'"', b"1e999", b"\xff", b"true", b",", b"-0", b"[[]]", b"\x1b[2J", b"\n", b"\r"]


def _line(row: Any) -> bytes:
    return (json.dumps(row) + "\n").encode()


def data_files() -> dict[str, bytes]:
    """Return odd data files by name."""
    good, odd = _line(ROW), [None, True, 3, 1.5, "", [], [1], [["a"]], {"a": 1}, "a" * 10_000, "\x00", "=1+1", math.nan, math.inf, 10**400]
    columns = (*ROW, "facts", "choices", "messages", "completion", "text")
    files = {f"{column} {i}": _line({**ROW, column: value}) for column in columns for i, value in enumerate(odd)}
    files |= {f"prompt {i}": _line({"prompt": value, "completion": "y"}) for i, value in enumerate(odd)}
    files |= {f"turn {i}": _line({"messages": [{"role": "user", "content": value}, TURNS[1]]}) for i, value in enumerate(odd)}
    files |= {f"role {i}": _line({"messages": [{"role": value, "content": "x"}, TURNS[1]]}) for i, value in enumerate(odd)}
    return files | {
        "empty": b"",
        "blank": b"\n\n \n",
        "byte order mark": b"\xef\xbb\xbf" + good,
        "utf16": good.decode().encode("utf-16"),
        "latin1": '{"instruction":"caf\xe9","output":"\xe9"}\n'.encode("latin-1"),
        "nul": good + b"\x00\x00\n",
        "binary": bytes(range(256)) * 20,
        "gzip": b"\x1f\x8b\x08\x00" + good,
        "LFS": b"version https://git-lfs.github.com/spec/v1\n",
        "crlf": good.replace(b"\n", b"\r\n"),
        "cut": good + b"{",
        "array": b"[1]\n",
        "string": b'"x"\n',
        "JSON array": json.dumps([ROW]).encode(),
        "pretty": json.dumps(ROW, indent=1).encode(),
        "two rows in a line": good.strip() * 2,
        "same key twice": b'{"instruction":"a","instruction":"b","output":"y"}\n',
        "half a character": b'{"instruction":"x \\ud800 y","output":"z"}\n',
        "half in the answer": b'{"instruction":"x","output":"z \\udfff"}\n',
        "separators": '{"instruction":"x\u2028\x85","output":"y"}\n'.encode(),
        "deep": b'{"instruction":"x","output":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "deep elsewhere": b'{"instruction":"x","output":"y","z":' + b"[" * 990 + b"]" * 990 + b"}\n",
        "big number": b'{"instruction":"x","output":' + b"9" * 5000 + b"}\n",
        "long prompt": _line({**ROW, "instruction": "word " * 100_000}) + good,
    }


def changed_bytes(draw: random.Random) -> bytes:
    """Return a good data file with one to four random changes of bytes."""
    rows = [ROW, {"prompt": "x", "completion": ["a", "b"]}, {"messages": TURNS}, {**ROW, "choices": ["hi there", "b"]}]
    content = bytearray(b"".join(map(_line, rows)))
    for _ in range(draw.randint(1, 4)):
        at, change = draw.randrange(len(content)), draw.random()
        if change < 0.4:
            content[at] = draw.randrange(256)
        elif change < 0.6:
            del content[at : at + draw.randint(1, 12)]
        elif change < 0.8:
            content[at:at] = draw.choice(INSERTED)
        else:
            content[at:at] = content[draw.randrange(len(content)) :][: draw.randint(1, 30)]
    return bytes(content)


# --- trying -------------------------------------------------------------------------------------------------------------


class Tries:
    """Outcomes of many tries, and the problems among them."""

    def __init__(self) -> None:
        prepared(SMALL)  # imports packages: an alarm in an import would leave half a package, and break later tries
        self.count: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []

    def go(self, name: str, text: str, work: Callable[[], object]) -> None:
        """Try one recipe, and note what comes of it."""
        try:
            with _alarm():
                work()
            self.count["accepted"] += 1
        except TimeoutError:
            self._note("hang", name, f"more than {HANG} s", text)
        except (ConfigError, DataError, ModelError) as error:
            self.count[type(error).__name__] += 1
            for problem in error.problems:
                if not PLACE.search(problem) or len(problem) > 3000 or not problem.isprintable():
                    self._note("message without a place", name, problem, text)
        except TadistillError as error:
            self._note("late failure", name, str(error), text)
        except Exception as error:  # what this is looking for
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "tadistill" in f.filename]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            self._note("traceback", name, f"{type(error).__name__} at {where}: {str(error)[:200]!r}", text)

    def _note(self, kind: str, name: str, what: str, text: str) -> None:
        self.count[kind] += 1
        self.problems.append(f"{kind}: {name}: {what}\n{text[:9000]}")


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prepared(text: str) -> Recipe:
    """Do what `tadistill run` does before its first stage."""
    from tadistill.plan.task import check_entries
    from tadistill.runner.preflight import check_study

    recipe = parse(text, source="r.yaml")
    check_entries(recipe)
    check_study(make_plan(recipe))
    return recipe


def fuzz_recipes(count: int, seed: int, tries: Tries) -> None:
    """Try `count` changed recipes."""
    draw, trees = random.Random(seed), bases()
    done = 0
    while done < count:
        tree = mutate(draw.choice(trees), draw)
        try:
            text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
        except (yaml.YAMLError, UnicodeError, ValueError):
            continue
        done += 1
        tries.go(f"recipe {done} of seed {seed}", text, lambda text=text: prepared(text))


def fuzz_data(count: int, seed: int, tries: Tries) -> None:
    """Try the odd data files, then changed ones up to `count`."""
    draw, odd = random.Random(seed), [*data_files().items()]
    draw.shuffle(odd)
    made = [*odd, *((f"bytes {i}", changed_bytes(draw)) for i in range(max(0, count - len(odd))))][:count]
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, content) in enumerate(made):
            path = Path(folder) / f"d{i}.jsonl"
            path.write_bytes(content)
            tree = yaml.safe_load(SMALL)
            tree["data"] |= {draw.choice(["train", "dev"]): str(path), "test": [str(path)], "limit": {}}
            tries.go(f"data {name}", repr(content[:500]), lambda tree=tree: prepared(yaml.safe_dump(tree)))


def fuzz_runs(count: int, seed: int, tries: Tries) -> None:
    """Run all stages of `count` accepted changes to the small recipe: what preflight accepts must not fail."""
    from tadistill.plan.task import make_task
    from tadistill.stages.execute import run_stage
    from tadistill.store import Store

    def run(recipe: Recipe, folder: Path) -> None:
        plan = make_plan(recipe)
        for stage in plan.stages.values():
            run_stage(make_task(plan, stage, Store(folder)), progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)

    draw, tree, done = random.Random(seed), bases()[-1], 0
    while done < count:
        try:
            text = yaml.safe_dump(mutate(tree, draw), allow_unicode=True, sort_keys=False)
            recipe = prepared(text)
        except (TadistillError, yaml.YAMLError, UnicodeError, ValueError):
            continue
        done += 1
        with tempfile.TemporaryDirectory() as folder:
            before = tries.count["accepted"]
            tries.go(f"run {done} of seed {seed}", text, lambda recipe=recipe, folder=folder: run(recipe, Path(folder)))
            if tries.count["accepted"] == before and not tries.problems[-1].startswith(("hang", "traceback", "late")):
                tries.problems.append(f"late failure: run {done}\n{text[:9000]}")


def main() -> None:
    """Parse the arguments, try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=int, default=300)
    parser.add_argument("--data", type=int, default=60)
    parser.add_argument("--run", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TADISTILL_CACHE": tempfile.mkdtemp()}
    os.chdir(tempfile.mkdtemp())
    for what, count in (("recipes", given.recipes), ("data", given.data), ("run", given.run)):
        if count:
            tries, start = Tries(), time.monotonic()
            {"recipes": fuzz_recipes, "data": fuzz_data, "run": fuzz_runs}[what](count, given.seed, tries)
            print(f"{what}: {count} in {time.monotonic() - start:.0f} s: {dict(tries.count)}", flush=True)
            for problem in tries.problems:
                print(problem, "\n")


if __name__ == "__main__":
    main()
