"""The kit for a GPU, on a CPU: all its parts with small sizes, its page, and a study on a pretended GPU."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from tests.e2e import forked

from tadistill.config.objective import Objective

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"


def script(name: str) -> ModuleType:
    """Import a script of the kit that needs no other."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KIT, PAGE = script("kit"), script("page")


def run_forked(command: Any, *, original: Any = subprocess.run, **options: Any) -> subprocess.CompletedProcess:
    """Run `python -m tadistill …` without the imports of two processes, which take longer than the kit's study."""
    if command[:3] != [sys.executable, "-m", "tadistill"]:
        return original(command, **options)
    code, text = forked.run(*command[3:])
    return subprocess.CompletedProcess(command, code, text, "")


def run_kit(out: Path) -> None:
    """Run the kit in this process, and end it with the kit's exit status."""
    torch.set_num_threads(torch.get_num_threads())  # a forked process makes torch's pool anew; two threads must not do so at once
    sys.path.insert(0, str(FOLDER))
    sys.argv = ["kit.py", "--device", "cpu", "--tiny", "--out", str(out)]
    with open(out / "log", "w") as log, contextlib.redirect_stdout(log), mock.patch.object(subprocess, "run", run_forked):
        status = KIT.main()
    sys.exit(status)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Run all parts in a forked process: the kit's modules have short names, and it changes the environment."""
    out = tmp_path_factory.mktemp("kit")
    process = multiprocessing.get_context("fork").Process(target=run_kit, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == 0, (out / "log").read_text()[-6000:]
    return json.loads((out / "gpu.json").read_text())


def names(result, part: str) -> list[str]:
    return [line["name"] for line in result["parts"][part]["lines"]]


@pytest.mark.slow
def test_all_parts_run_and_all_rules_of_correctness_hold(result):
    assert set(result["parts"]) == {*KIT.CORRECT, *KIT.SPEED}
    assert [name for name, part in result["parts"].items() if "error" in part] == []
    for name in KIT.CORRECT:
        assert {line["ok"] for line in result["parts"][name]["lines"]} <= {True, None}
        assert any(line["ok"] for line in result["parts"][name]["lines"])


@pytest.mark.slow
def test_bf16_has_the_gradients_of_float32_for_every_objective(result):
    """A training step by the training loop, with the same text: the cosine of the gradients is 0.98 or more."""
    lines = {line["name"]: line for line in result["parts"]["losses"]["lines"]}
    found = [kind.model_fields["type"].default for kind in typing.get_args(typing.get_args(Objective)[0])]
    found.remove("gold")  # only between two tokenizers
    between = ("forward_kl", "reverse_kl", "jensen_shannon", "gold", "minillm")
    for name in (*found, *(f"{name} over spans" for name in between)):
        cosine, loss = lines[f"qwen2 {name}: cosine of gradients, bf16 and float32"], lines[f"qwen2 {name}: loss, bf16 against float32"]
        assert 0.98 <= cosine["value"] < 1 - 1e-9  # below 1, because bf16 rounds
        assert 0 < loss["value"] <= 5e-3


@pytest.mark.slow
def test_peers_are_measured_where_they_are_installed(result):
    assert any("TRL" in name for name in names(result, "head_speed"))
    assert any("TRL: s an update" in name for name in names(result, "updates"))
    assert any("generate: tokens/s" in name for name in names(result, "sampling_speed"))


@pytest.mark.slow
def test_steps_of_sampling_are_repeated_as_a_graph_repeats_them(result):
    """On a CPU without a recording: the tokens are equal."""
    equal = [line for line in result["parts"]["graphs"]["lines"] if "tokens that are equal" in line["name"]]
    assert [line["value"] for line in equal] == [1.0, 1.0]


@pytest.mark.slow
def test_the_page_of_a_run(result):
    text = PAGE.page(result | {"device": "a card"})
    assert "one GPU: a card." in text
    assert all(f"## {name}" in text for name in result["parts"])
    assert "| qwen2 minillm: gradient, device against CPU | 0 | at most 0.001 | yes |" in text
    assert PAGE.page(result) == PAGE.page(None)  # a CPU's numbers are not those of a GPU


def test_the_committed_page_is_that_of_the_committed_result():
    kept = PAGE.DOCS / "gpu.json"
    expected = PAGE.page(json.loads(kept.read_text()) if kept.exists() else None)
    assert (PAGE.DOCS / "gpu.md").read_text() == expected
    assert set(PAGE.described()) == {*KIT.CORRECT, *KIT.SPEED}
    assert all(PAGE.described().values())


def test_a_broken_rule_of_correctness_is_an_error_and_a_slow_part_is_not():
    def part(correctness: bool, ok: bool, **more: str) -> dict:
        return {
            "title": "",
            "seconds": 1.0,
            "correctness": correctness,
            "lines": [{"name": "x", "value": 1.0, "rule": "r", "ok": ok}],
            **more,
        }

    made = {"device": "a card", "versions": {}, "parts": {"head": part(True, True), "updates": part(False, False)}}
    assert (KIT.broken(made, correctness=True), KIT.broken(made, correctness=False)) == ([], ["updates: x"])
    assert "1 of 2 rules hold. These do not: `updates`: x." in PAGE.page(made)
    made["parts"] |= {"losses": part(True, False), "resume": part(True, True, error="no time left")}
    assert KIT.broken(made, correctness=True) == ["losses: x", "resume: no time left"]


def test_a_part_of_several_calls_keeps_what_each_of_them_found():
    def call(value: float, *names: str) -> dict:
        part = {"title": "", "seconds": 1.0, "correctness": True, "lines": [{"name": "kept", "value": value, "rule": "", "ok": None}]}
        return {"device": "a card", "versions": {}, "command": "kit.py --only freed", "parts": dict.fromkeys(names, part)}

    found = PAGE.joined([call(1.0, "freed", "head"), call(2.0, "freed"), call(3.0, "freed")])
    assert [line["value"] for line in found["parts"]["freed"]["lines"]] == [3.0]
    assert [[line["value"] for line in lines] for lines in found["parts"]["freed"]["earlier"]] == [[1.0], [2.0]]
    assert "earlier" not in found["parts"]["head"]
    assert PAGE.page(found).count("The same part in an earlier call:") == 2


def run_cut(out: Path) -> None:
    """Run a part that ends the process, after a part that stands later in the kit's own list."""

    def cut(kit: Any) -> None:
        """A part."""
        kit.note("before the end", 1)
        os._exit(9)

    sys.path.insert(0, str(FOLDER))
    options = KIT.arguments(["--device", "cpu", "--tiny", "--only", "card,head", "--out", str(out)])
    with mock.patch.object(KIT, "parts", return_value={"head": cut, "card": lambda kit: kit.note("first", 2)}):
        KIT.run(options)


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_every_line(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=run_cut, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    card, head = json.loads((tmp_path / "gpu.json").read_text())["parts"].items()
    assert (card[0], [line["name"] for line in card[1]["lines"]], "error" in card[1]) == ("card", ["first"], False)
    assert (head[0], [line["name"] for line in head[1]["lines"]]) == ("head", ["before the end"])
    assert head[1]["error"] == "the run ended during this part"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_study_on_a_pretended_gpu_mixes_no_devices_and_a_planted_mixing_is_found(tmp_path):
    found = tmp_path / "seen.json"
    command = [sys.executable, str(FOLDER / "detect.py"), "--short", "--planted", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr[-4000:]  # the planted mixing
    seen = json.loads(found.read_text())
    assert {stage["kind"] for stage in seen["stages"]} >= {"sft", "distill", "temper", "generate", "signal", "evaluate", "analyse"}
    assert all(stage["operations"] > 1000 for stage in seen["stages"])
    forward, backward = seen["mixings"]
    assert "own.py:12 < train/step.py:" in forward
    assert backward == "aten.mul.Tensor at the backward pass"
    assert {stage["stage"] for stage in seen["stages"] if stage["mixings"]} == {
        "distill xl -> s, own:planted on dataset, 2 updates, seed 1"
    }
