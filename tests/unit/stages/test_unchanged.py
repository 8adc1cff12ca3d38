"""A stage refuses data, weights, tokenizers and code that have changed since the plan, and does not read large files again to find out."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from tests.byte_models import byte_model, byte_tokenizer

from tadistill import disk
from tadistill.config import DataRef, load
from tadistill.data import datasets, token_cache
from tadistill.data.datasets import SplitRows
from tadistill.data.encoding_rules import Rules
from tadistill.errors import DataError, StageFailed
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import HashedData, Loaded, Split, TokenizerFiles
from tadistill.plan.task import make_task
from tadistill.stages.context import Context
from tadistill.store import Store

RECIPE = """
study: small
seeds: [1]
models: {m: {load: ./model, sft: {optim: {steps: 8, batch: 4}, select: {metric: loss, every: 2}}}}
data: {train: rows.jsonl, dev: rows.jsonl, test: [rows.jsonl], template: plain, max_length: 40}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
arms: {sft: m}
"""


def write(path: Path, output: str) -> None:
    path.write_text(8 * (json.dumps({"instruction": "Say it", "output": output, "text": output}) + "\n"))
    os.utime(path, ns=(1, sum(output.encode())))  # no two of them at one time


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """The context of a planned fine-tuning of a local model on local rows, in the form in which a cluster job gets its task."""
    byte_model().save_pretrained(tmp_path / "model")
    byte_tokenizer(None).save_pretrained(tmp_path / "model")
    write(tmp_path / "rows.jsonl", "red")
    (tmp_path / "small.yaml").write_text(RECIPE)
    plan, store = make_plan(load(tmp_path / "small.yaml")), Store(tmp_path / "store")
    task = next(make_task(plan, stage, store) for stage in plan.stages.values() if stage.kind == "sft")
    disk._remembered.cache_clear()  # the stage runs in another process
    return Context(pickle.loads(pickle.dumps(task)), store, tmp_path, lambda *_: None, lambda _: None, lambda: False)


def readings(context: Context) -> dict[str, Callable[[], object]]:
    train: Split = context.spec.train
    tokenizer = TokenizerFiles(source="./model", at=model(context).at, revision="main", fingerprint=model(context).fingerprint)
    return {
        "split": lambda: context.split(train, byte_tokenizer(None)),
        "examples": lambda: [*context.examples(train)],
        "corpus": lambda: context.corpus(HashedData(ref=train.ref, fingerprint=train.fingerprint, known=train.known), byte_tokenizer(None)),
        "model": lambda: context.model(model(context)),
        "tokenizer": lambda: context.tokenizer(tokenizer),
    }


def model(context: Context) -> Loaded:
    return context.spec.student


@pytest.mark.parametrize("what", ["split", "examples", "corpus"])
def test_rows_that_changed_after_the_plan(context, what):
    readings(context)[what]()
    write(context.folder / "rows.jsonl", "green")
    with pytest.raises(StageFailed, match=r"/rows.jsonl has changed since this stage was planned; run the same command again, which makes"):
        readings(context)[what]()
    write(context.folder / "rows.jsonl", "red")
    os.utime(context.folder / "rows.jsonl")  # a copy with the same content
    readings(context)[what]()
    (context.folder / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"data set `rows.jsonl` does not exist"):
        readings(context)[what]()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
@pytest.mark.parametrize("change", [lambda: byte_model(seed=1), lambda: byte_tokenizer(eos="<bos>")])
def test_a_model_that_changed_after_the_plan(context, what, change):
    readings(context)[what]()
    change().save_pretrained(context.folder / "model")
    with pytest.raises(StageFailed, match=r"/model has changed since this stage was planned"):
        readings(context)[what]()


@pytest.mark.parametrize("output", ["bed", "green"])
def test_rows_that_change_while_a_stage_reads_them(context, output):
    rows = context.examples(context.spec.train)
    assert next(rows).references == ("red",)
    write(context.folder / "rows.jsonl", output)  # the next line that is read has two parts if the length is another one
    with pytest.raises(StageFailed, match=r"rows.jsonl has changed since this stage was planned"):
        list(rows)


def test_a_stage_does_not_read_an_unchanged_file_to_compare_it(context, monkeypatch):
    monkeypatch.setattr(datasets, "sha256", lambda path: pytest.fail("the file was read again"))
    readings(context)["split"]()


def test_rows_that_change_while_they_are_tokenised_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "rows.jsonl", "red")
    rows, file = SplitRows(DataRef(load=str(tmp_path / "rows.jsonl")), "train"), tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=r"d has changed while it was read; run the same command again"):
        token_cache.keep(rows, byte_tokenizer(None), Rules(30, 40, template="plain"), name="d", tick=lambda _: write(file, "green"))
    assert not [*(tmp_path / "cache").rglob("*.arrow")]


def test_rows_that_change_while_the_lock_is_acquired_are_not_kept(tmp_path, monkeypatch):
    """Another process may hold the lock for minutes. The file's name is the digest of the former rows."""
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "rows.jsonl", "red")
    rows, acquire = SplitRows(DataRef(load=str(tmp_path / "rows.jsonl")), "train"), FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda self: (write(tmp_path / "rows.jsonl", "green"), acquire(self)))
    with pytest.raises(DataError, match=r"d has changed while it was read; run the same command again"):
        token_cache.keep(rows, byte_tokenizer(None), Rules(30, 40, template="plain"), name="d")
    assert not [*(tmp_path / "cache").rglob("*.arrow")]


def test_fields_that_are_newer_than_a_pickled_task_have_their_defaults(context):
    train: Split = context.spec.train
    task = pickle.loads(pickle.dumps(context.task))
    for part, name in ((task.spec.train, "known"), (task.spec.train.ref, "extra"), (task.spec.optim, "packed"), (task.spec, "lora")):
        del part.__dict__[name]
    spec = pickle.loads(pickle.dumps(task)).spec
    assert spec == context.spec.model_copy(update={"train": train.model_copy(update={"known": None})})
    del task.spec.__dict__["seed"]  # it has no default
    assert not hasattr(pickle.loads(pickle.dumps(task)).spec, "seed")
