"""Every block of docs/start.md and docs/how-to, in the order of a page: files are written, commands are run, Python is executed.

A block's `title` is the file that it is. Commands run in this process, with few updates on few rows. Models of the hub are replaced by tiny
ones. A block that cannot run here as it is has a mark, `test=WAY`; `Page.run` says what each way does instead.
"""

import contextlib
import importlib
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import pytest
import yaml
from tests.byte_models import byte_model, byte_tokenizer, save
from tests.e2e import inprocess
from tests.e2e.inprocess import Done, tadistill

from tadistill.errors import Interrupted
from tadistill.plan.task import make_task
from tadistill.stages.execute import run_stage

ROOT = Path(__file__).parents[2]
HOW_TO = sorted(path for path in (ROOT / "docs" / "how-to").glob("*.md") if path.stem != "index")
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WAYS = {"replaced", "extra", "plan", "dry-run", "after-submit", "interrupted", "patched", "served"}
SMALLER = {"steps": 4, "every": 2, "batch": 4, "micro_batch": 2, "rollouts": 4, "inner_epochs": 1, "max_new_tokens": 4}
SAYS = {
    "custom-metric": "brief answers",
    "right-answers": "choice accuracy",
    "custom-sampler": "ramp",
    "lora": "models/with-lora",
    "out-of-memory": "signal",
    "resume": "1 will be continued.",
    "slurm": "#SBATCH",
    "stop-early": "done",
    "watch": "http://127.0.0.1:",
}
"""A word of what the commands of a page print."""


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str
    title: str
    way: str
    text: str

    @property
    def lines(self) -> list[list[str]]:
        """The commands of a shell block, as lists of words."""
        return [words for line in self.text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page; those of `text` are what a command prints."""
    found = []
    for language, info, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        given = dict(re.findall(r'(\w+)="?([^"\s]+)"?', info))
        assert set(given) <= {"title", "test"}, info
        assert given.get("test", "plan") in WAYS, info
        found.append(Block(language, given.get("title", ""), given.get("test", ""), text))
    return [block for block in found if block.language != "text"]


class Page:
    """A page that is being tried in a folder."""

    def __init__(self, page: Path, folder: Path, hub: Path):
        self.page, self.folder, self.hub, self.out = page, folder, hub, ""
        self.recipes: list[str] = []

    def follow(self) -> None:
        """Do everything that the page says."""
        for block in blocks(self.page):
            match block.language:
                case "bash":
                    self.shell(block)
                case "diff":
                    self.patch(block)
                case _ if block.title:
                    (self.folder / block.title).write_text(self.small(block.text) if block.language == "yaml" else block.text)
                    self.recipes += [block.title] if block.language == "yaml" else []
                case "python":
                    with contextlib.redirect_stdout(None):
                        exec(compile(block.text, self.page.name, "exec"), {"__name__": "__page__"})
                case _:
                    pytest.fail(f"{self.page.name}: a block of {block.language} without a title; write title=FILE")

    def small(self, recipe: str) -> str:
        """Return a recipe with few updates, few rows and tiny models."""
        for key, value in SMALLER.items():
            recipe = re.sub(rf"\b{key}: \d+", f"{key}: {value}", recipe)
        recipe = re.sub(r"HuggingFaceTB/SmolLM2-(\d+M|1.7B)-Instruct", lambda found: str(self.hub / found[1]), recipe)
        recipe = recipe.replace("train: tinyworld,", "limit: {train: 8, dev: 4, test: 4}, train: tinyworld,")
        return recipe.replace("layers: 10}", "layers: 2}").replace("seeds: [10, 20, 30]", "seeds: [10]")

    def shell(self, block: Block) -> None:
        if block.way == "after-submit":  # nothing was submitted: run it here
            self.run(["run", self.recipes[-1]], block.way)
        for number, words in enumerate(block.lines):
            if words[0] == "tadistill":
                self.run(words[1:], "" if block.way == "interrupted" and number else block.way)
            elif block.way == "extra":
                (name,) = re.findall(r"tadistill\[(\w+)\]", words[-1])
                assert f"\n{name} = [" in (ROOT / "pyproject.toml").read_text()
            elif block.way != "replaced":
                subprocess.run(shlex.join(words).replace("'&&'", "&&"), shell=True, check=True)

    def run(self, words: list[str], way: str) -> None:
        """Run a command of the page in its own way."""
        if way == "plan" and words[0] == "run":
            words = ["plan", *words[1:]]
        if words[0] == "submit" and "--dry-run" not in words:
            words = [*words, "--dry-run"]
        command: Callable[..., Done] = {"interrupted": interrupted, "patched": self.patched, "served": served}.get(way, tadistill)
        done = command(*words, *(["--set", "data.limit.test=4"] if words[0] in ("eval", "compare") else []))
        code = {"doctor": 1, "cancel": 2}.get(words[0], 130 if way == "interrupted" else 0)  # no Slurm is found
        assert done.code in (0, code), f"{shlex.join(words)}\n{done.out}\n{done.err}"
        self.out += done.out + done.err

    def patch(self, block: Block) -> None:
        """Apply the hunks of a diff, whose lines all stand in the file, to a copy of the package."""
        copy = self.folder / "src"
        if not copy.exists():
            shutil.copytree(ROOT / "src", copy)  # compiled files too: only the patched ones are compiled again
        file = self.folder / block.title
        text = file.read_text()
        for hunk in block.text.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(line[1:] or "\n" for line in lines if line[:1] != sign) for sign in "+-")
            assert text.count(before) == 1, f"{self.page.name}: {block.title} has no single\n{before}"
            text = text.replace(before, after)
        file.write_text(text)

    def patched(self, *words: str) -> Done:
        """Run a command with the copy of the package, in a forked process that has torch but no module of the package."""
        context = multiprocessing.get_context("fork")
        found, done = context.Pipe(duplex=False)
        process = context.Process(target=_patched, args=(self.folder / "src", words, done))
        process.start()
        done.close()
        code, out, err = found.recv()
        process.join()
        return Done(code, out, err)


def _patched(source: Path, words: tuple[str, ...], done: Connection) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tadistill" or name == inprocess.__name__]:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    ran = importlib.import_module(inprocess.__name__).tadistill(*words)
    done.send((ran.code, ran.out, ran.err))


def interrupted(*words: str) -> Done:
    """Run a command and stop it in its first stage, as Ctrl-C does."""
    asked = []

    def run_here(plan, store, *, jobs, console) -> None:
        stage = next(iter(plan.stages.values()))
        try:
            task = make_task(plan, stage, store)
            run_stage(task, progress=lambda *_: None, alarm=lambda _: None, stop=lambda: asked.append(1) or len(asked) > 3)
        except Interrupted:
            raise KeyboardInterrupt from None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inprocess, "run_here", run_here)
        return tadistill(*words)


def served(*words: str) -> Done:
    """Run a command that serves a page, ask for the page once, and end the command as Ctrl-C does."""

    def once(server) -> NoReturn:
        asked = threading.Thread(target=server.handle_request)
        asked.start()
        with urllib.request.urlopen(server.url) as page:
            assert "quickstart" in page.read().decode()
        asked.join()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tadistill.watch.server.Server.serve_forever", once)
        return tadistill(*words, "--port", "0")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Save tiny models in place of those of the hub, with more layers for bigger ones."""
    folder = tmp_path_factory.mktemp("hub")
    for name, layers in {"135M": 3, "360M": 4, "1.7B": 5}.items():
        save(folder / name, byte_model(num_hidden_layers=layers, max_position_embeddings=2048), byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory, hub) -> Path:
    """Follow docs/start.md, with an example of two arms in place of `make quickstart`; returns the folder with its models and runs."""
    folder = tmp_path_factory.mktemp("desk")
    example = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    del example["models"]["l"]
    example |= {"seeds": [10], "arms": {"teacher": "xl", "sft": "s"}, "evaluate": {"seeds": [10], "max_new_tokens": 4, "also": {}}}
    example["data"] |= {"test": ["tinyworld"], "limit": {"train": 8, "dev": 4, "test": 4}}
    for model in example["models"].values():
        model["sft"] = {"optim": {"steps": 2, "batch": 4}, "select": {"metric": "last"}}
    with contextlib.chdir(folder):
        (folder / "quickstart.yaml").write_text(yaml.safe_dump(example))
        assert tadistill("run", "quickstart.yaml").code == 0
        Page(ROOT / "docs" / "start.md", folder, hub).follow()
    return folder


@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_everything_on_a_how_to_page_works(path, desk, hub, tmp_path, monkeypatch):
    folder = tmp_path / "desk"
    shutil.copytree(desk, folder)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    page = Page(path, folder, hub)
    page.follow()
    assert SAYS.get(path.stem, "") in page.out
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 110
