"""Fetching a recipe's models and data sets, what of them is missing, and loading all of it from the hub's cache without network."""

import hashlib
import json
import socket
from io import StringIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from tests.conftest import tiny_model
from tests.unit.models.conftest import write_gguf

from tadistill.cluster import fetch
from tadistill.config import DataRef, load, parse
from tadistill.data import datasets, survey, tinyworld
from tadistill.errors import DataError, ModelError
from tadistill.models import sources
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.models.parameter_counts import read_config
from tadistill.models.served_model import read_head
from tadistill.terminal import Terminal

ONE, TWO = "1" * 40, "2" * 40
ROWS = "".join(json.dumps({"instruction": f"say {i}", "output": str(i), "text": f"text {i}"}) + "\n" for i in range(4)).encode()
RECIPE = """
study: tiny
seeds: [1]
models:
  t: {load: org/teacher}
  s: {load: org/teacher}
data: {train: org/set, dev: {load: org/set, split: train}, test: [dolly], corpus: org/set}
arms: {direct: t > s}
"""


def lay(cache: Path, repository: str, files: dict[str, bytes], commit: str = ONE, kind: str = "datasets") -> Path:
    """A repository as the hub's cache holds it: refs, blobs, and a snapshot of links."""
    folder = cache / f"{kind}--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict[str, bytes]:
    """A tiny model in several shards, and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), tinyworld.tokenizer(seed=0, people=10)
    tiny_model("llama", vocab=len(tokenizer)).save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache in a home of its own, and no local data sets."""
    folder = tmp_path / "home" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def lay_all(cache: Path, model_files: dict[str, bytes], commit: str = ONE) -> Path:
    """Everything that RECIPE reads; returns the model's snapshot."""
    lay(cache, "org/set", {"train.jsonl": ROWS, "README.md": b"# rows"}, commit)
    lay(cache, "MiniLLM/dolly", {"valid.jsonl": ROWS}, commit)
    return lay(cache, "org/teacher", model_files, commit, kind="models")


def recipe(text: str = RECIPE):
    return parse(text, source="recipe")


def run(runs: Path, text: str = RECIPE) -> str:
    """What `tadistill fetch` prints."""
    screen = StringIO()
    fetch.fetch_recipe(recipe(text), runs, Terminal(file=screen, width=200))
    return screen.getvalue()


def test_everything_is_named_once():
    assert [(n.kind, n.shown) for n in fetch.needs(recipe())] == [
        ("model", "org/teacher"),
        ("data set", "org/set"),
        ("data set", "MiniLLM/dolly/valid.jsonl"),
    ]


def test_embedded_and_random_sources_need_nothing(tmp_path):
    text = (Path(__file__).parents[3] / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert fetch.compare(recipe(text), tmp_path)[0] == []
    assert "needs no downloads" in run(tmp_path, text)


def test_gguf_files_are_converted_so_that_a_plan_knows_their_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf")
    text = RECIPE.replace("t: {load: org/teacher}", f"t: {{load: {file}}}").replace("org/teacher", f"scratch:llama, tokenizer: {file}")
    found = recipe(text)
    assert [need.kind for need in fetch.conversions(found)] == ["model", "tokenizer"]
    assert all("tiny.gguf" not in sentence for sentence in fetch.compare(found, tmp_path)[0])
    monkeypatch.setattr(fetch, "needs", lambda recipe: [])
    assert read_config(str(file)) is None
    assert "converted" in run(tmp_path, text)
    assert (read_config(str(file)) or {})["hidden_size"] == 16
    assert "already here" in run(tmp_path, text)


def test_missing_names_what_revision_and_command(cache, tmp_path, model_files):
    model, rows, dolly = fetch.compare(recipe(), tmp_path)[0]
    assert model == "model `org/teacher` at revision `main` is not on this disk; run `tadistill fetch RECIPE` with network access"
    assert rows.startswith("data set `org/set` at revision `main`")
    assert dolly.startswith("data set `MiniLLM/dolly/valid.jsonl` at revision `main`")
    lay_all(cache, model_files)
    assert fetch.compare(recipe(), tmp_path)[0] == []


@pytest.mark.parametrize("lost", ["model-00002-of", "config.json", "tokenizer"])
def test_a_snapshot_without_a_shard_or_its_tokenizer_is_missing(cache, tmp_path, model_files, lost):
    snapshot = lay_all(cache, model_files)
    gone = [path for path in snapshot.iterdir() if path.name.startswith(lost)]
    assert gone
    for path in gone:
        path.unlink()
    assert ["org/teacher" in line for line in fetch.compare(recipe(), tmp_path)[0]] == [True]


def test_a_tokenizer_from_elsewhere_is_not_asked_of_the_model(cache, tmp_path, model_files):
    lay_all(cache, {name: content for name, content in model_files.items() if "tokenizer" not in name})
    text = RECIPE.replace("{load: org/teacher}", "{load: org/teacher, tokenizer: org/words}")
    assert [line[:25] for line in fetch.compare(recipe(text), tmp_path)[0]] == ["tokenizer `org/words` at "]
    lay(cache, "org/words", {name: content for name, content in model_files.items() if "tokenizer" in name}, kind="models")
    lay(cache, "org/words", {"config.json": b"{}"}, kind="models")
    assert fetch.compare(recipe(text), tmp_path)[0] == []


SERVED = RECIPE.replace("t: {load: org/teacher}", "t: {load: org/teacher, serve: http://127.0.0.1:8001}").replace(
    "s: {load: org/teacher}", "s: {load: 'scratch:llama', tokenizer: tinyworld}"
)


@pytest.mark.parametrize(("gives", "shards"), [("hidden", 1), ("top_k", 0)])
def test_of_a_served_teacher_only_the_output_head_and_the_tokenizer_are_fetched(gives, shards, cache, tmp_path, model_files, monkeypatch):
    text = SERVED.replace("serve: http://127.0.0.1:8001", f"serve: {{at: 'http://127.0.0.1:8001', gives: {gives}}}")
    rows = lay(cache, "org/set", {"train.jsonl": ROWS})
    lay(cache, "MiniLLM/dolly", {"valid.jsonl": ROWS})
    weights = {name for name in model_files if name.endswith(".safetensors")}

    def download(repository, file=None, repo_type=None, **_):
        if repo_type == "dataset":
            return rows
        asked = {file} if file else set(model_files) - weights
        return lay(cache, repository, {name: model_files[name] for name in asked}, kind="models")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert ["org/teacher" in line for line in fetch.compare(recipe(text), tmp_path)[0]] == [True]
    assert "fetched" in run(tmp_path, text)
    snapshot = sources.locate("org/teacher", weights=False)
    assert len(weights) > 2
    assert len([*snapshot.glob("*.safetensors")]) == shards
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch.compare(recipe(text), tmp_path)[0] == []
    assert "already here" in run(tmp_path, text)
    if shards:
        assert read_head("org/teacher", "main", torch.float32).weight.shape[0] > 100
        next(snapshot.glob("*.safetensors")).unlink()
        assert len(fetch.compare(recipe(text), tmp_path)[0]) == 1


def test_a_served_teacher_from_a_python_package_is_found_before_it_was_recorded(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(fetch, "locate_part", lambda name, revision, gives: tmp_path)
    found = fetch.look(fetch.Need("model", "wheel://p==1.0/x.gguf", "main", gives="hidden"), {})
    assert found == fetch.Found(None, 1, ("model.safetensors",))


def test_a_served_teacher_that_is_pruned_to_the_student_is_fetched_whole():
    assert fetch.needs(recipe(SERVED))[0].gives == "hidden"
    pruned = SERVED.replace("s: {load: 'scratch:llama', tokenizer: tinyworld}", "s: {init: {from: t, layers: 1}}")
    assert fetch.needs(recipe(pruned))[0].gives is None


def test_a_data_set_whose_link_points_nowhere_is_missing(cache, tmp_path, model_files):
    lay_all(cache, model_files)
    (cache / "datasets--org--set" / "snapshots" / ONE / "train.jsonl").resolve().unlink()
    assert [line[:18] for line in fetch.compare(recipe(), tmp_path)[0]] == ["data set `org/set`"]


def test_fetch_records_commits_and_then_needs_no_network(cache, tmp_path, model_files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    real, asked = huggingface_hub.snapshot_download, []

    def download(name, **options):
        if options.get("local_files_only"):
            return real(name, **options)
        asked.append((name, options["max_workers"]))
        return str(lay_all(cache, model_files)) if name == "org/teacher" else real(name, **{**options, "local_files_only": True})

    def download_file(name, file, **options):
        asked.append((name, 1))
        return str(cache / "datasets--MiniLLM--dolly" / "snapshots" / ONE / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_file)
    shown = run(tmp_path / "runs")
    assert asked == [("org/teacher", 1), ("org/set", 1)]  # dolly came with the first of them
    assert shown.count("1" * 12) == 3
    assert shown.count("fetched") == 2
    record = json.loads((tmp_path / "runs" / "fetched.json").read_text())
    assert record["model org/teacher@main"]["commit"] == ONE
    assert record["data set org/set@main"]["files"] == ["README.md", "train.jsonl"]
    assert record["data set MiniLLM/dolly/valid.jsonl@main"]["bytes"] == len(ROWS)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    asked.clear()
    assert run(tmp_path / "runs").count("already here") == 3
    assert asked == []
    (cache / "datasets--org--set" / "snapshots" / ONE / "README.md").unlink()  # the record knows what belongs to it
    assert [line[:18] for line in fetch.compare(recipe(), tmp_path / "runs")[0]] == ["data set `org/set`"]


def test_a_revision_that_moved_is_told(cache, tmp_path, model_files):
    lay_all(cache, model_files)
    run(tmp_path)
    assert fetch.compare(recipe(), tmp_path)[1] == []
    lay_all(cache, model_files, TWO)
    told = fetch.compare(recipe(), tmp_path)[1]
    assert len(told) == 3
    assert told[0].startswith("model org/teacher: revision `main` has moved from commit 111111111111 to 222222222222; ")
    assert told[0] in run(tmp_path).splitlines()
    assert fetch.compare(recipe(), tmp_path)[1] == []  # told once, and recorded


def test_all_failures_are_told_at_once(cache, tmp_path, model_files):
    lay(cache, "MiniLLM/dolly", {"valid.jsonl": ROWS})
    with pytest.raises(ModelError) as caught:
        run(tmp_path)
    model, rows = str(caught.value).splitlines()
    assert model.startswith("model `org/teacher` at revision `main` is not in the local Hugging Face cache, and HF_HUB_OFFLINE=1 forbids")
    assert rows.endswith("run `tadistill fetch RECIPE` on a machine with network access")
    assert list(json.loads((tmp_path / "fetched.json").read_text())) == ["data set MiniLLM/dolly/valid.jsonl@main"]


def test_an_unreachable_hub_is_one_sentence(cache, tmp_path, monkeypatch):
    def unreachable(*names, **options):
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ModelError, match=r"data set `org/set` at revision `main` cannot be downloaded .*; check its name and the network"):
        run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "student").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"the network\. As a path, there is no `teacher` in \S+/org; correct the path") as caught:
        run(tmp_path)
    assert "`org/teacher` at revision `main` cannot be downloaded (the Hub does not answer)" in str(caught.value)


def test_a_file_that_is_no_data_set(cache):
    with pytest.raises(DataError, match=r"data set `rows\.jsonl` does not exist"):
        fetch.needs(recipe(RECIPE.replace("test: [dolly]", "test: [rows.jsonl]")))


@pytest.fixture
def no_network(monkeypatch):
    """Let every connection of this process to another machine fail."""

    def connect(self, address, real=socket.socket.connect):
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"network: {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.usefixtures("no_network")
def test_everything_loads_from_the_cache_without_network(cache, tmp_path, model_files):
    lay_all(cache, model_files)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load("recipe.yaml")
    assert fetch.compare(recipe, Path("runs")) == ([], [])
    assert load_model("org/teacher").config.num_hidden_layers == 2
    assert load_tokenizer("org/teacher").eos_token == "<eos>"
    data = recipe.data
    roles = ((data.train, "train"), (data.dev, "dev"), (data.test[0], "test"))
    assert [len(datasets.load(ref, role, data)) for ref, role in roles] == [4, 4, 4]
    assert next(survey.texts(data.corpus, data.world, data.root)) == "text 0"
    said = (
        "at revision `main` is not in the local Hugging Face cache, and HF_HUB_OFFLINE=1 forbids downloads; run `tadistill fetch RECIPE` "
    )
    with pytest.raises(DataError) as other:
        datasets.load(DataRef(load="org/other"), "test", data)
    assert str(other.value) == f"data set `org/other` {said}on a machine with network access"
    with pytest.raises(DataError) as vicuna:
        datasets.load(DataRef(load="vicuna"), "test", data)
    assert str(vicuna.value).startswith("data set `vicuna` (split test) is not on this disk")
    assert str(vicuna.value).endswith(f"data set `MiniLLM/Vicuna/valid.jsonl` {said}on a machine with network access")


def test_the_base_of_an_adapter_is_fetched_too(cache, tmp_path):
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": "v2"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    recipe = parse(RECIPE.replace("t: {load: org/teacher}", "t: {load: ./lora}"), source="r", folder=tmp_path)
    assert fetch.Need("model", "org/base", "v2") in fetch.needs(recipe)
    assert any("model `org/base` at revision `v2` is not on this disk" in sentence for sentence in fetch.compare(recipe, tmp_path)[0])
