"""The batch script of every kind of stage on every site, word by word (UPDATE_GOLDEN=1 writes them anew), and how stages become jobs."""

import os
import sys
from pathlib import Path

import pytest

from tadistill.cluster import slurm
from tadistill.cluster.submit import Submission
from tadistill.config import load, validate
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.kinds import KINDS
from tadistill.plan.task import process_bytes

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
RUNS = Path("/scratch/runs")  # nothing is written there


@pytest.fixture
def plan():
    return make_plan(load(HERE / "recipe.yaml"))


@pytest.fixture(autouse=True)
def caches(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/scratch/hf")
    monkeypatch.setenv("TADISTILL_CACHE", "/scratch/cache")


def account(site: str) -> str | None:
    pattern = slurm.load_profile(site).account
    return None if not pattern else "aip-prof" if pattern.startswith("aip") else "def-prof"


def scripts(plan, site: str) -> list[tuple]:
    return list(Submission(plan, slurm.load_profile(site), RUNS, account=account(site)).scripts())


@pytest.mark.slow
@pytest.mark.parametrize("site", slurm.profile_names())
def test_golden(plan, site):
    first: dict[str, str] = {}
    for sent, text in scripts(plan, site):
        first.setdefault(sent.jobs[0].stages[0].kind, f"# {sent.text}\n{text.replace(sys.executable, 'python')}")
    report = Submission(plan, slurm.load_profile(site), RUNS, account=account(site)).requests.report()
    assert (report is None) == (slurm.load_profile(site).cpu is None)
    # `analyse` shares its jobs with `evaluate`; jobs never ask an API; and all models of this recipe have one tokenizer
    assert set(first) == {kind for kind, spec in KINDS.items() if spec.in_recipes} - {"analyse", "ask", "retokenise"}
    text = "\n".join(first[kind] for kind in sorted(first))
    path = GOLDEN / f"{site}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_several_processes_and_nodes(tmp_path):
    recipe = load(HERE / "recipe.yaml", ["resources={'sft xl': {processes: 8, nodes: 2, parallel: fsdp}}"])
    (text,) = [t for sent, t in scripts(make_plan(recipe), "rorqual") if sent.jobs[0].stages[0].label.startswith("sft xl")]
    for line in ("--gpus-per-node=h100:4", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=16", "--mem=496G"):
        assert f"#SBATCH {line}\n" in text
    assert "MASTER_ADDR=$(scontrol show hostnames" in text
    assert "srun --unbuffered --output" in text
    assert "--kill-on-bad-exit=1" in text


def test_seeds_share_arrays_and_wait_for_their_own(plan):
    found = {sent.jobs[0].stages[0].label: sent for sent, _ in scripts(plan, "narval")}
    kd = next(s for label, s in found.items() if label.startswith("distill xl -> s, forward_kl on dataset, 5000"))
    assert len(kd.jobs) == 3
    assert kd.settings["dependency"] == f"aftercorr:{found['sft s, seed 10'].id},afterok:{found['sft xl, seed 10'].id}"


def test_a_chain_has_an_array_of_segments_for_each_job(plan):
    found = scripts(plan, "trillium")
    assert all(len(sent.jobs) == 1 for sent, _ in found)
    assert all("%1\n" in text and "--no-requeue" in text for _, text in found)
    # segments that were cut off count as failed: children start after all and check their parents themselves
    assert not any("aftercorr" in text or "afterok" in text for _, text in found)
    assert any("afterany:@1" in text for _, text in found)


def test_caches_are_named_in_the_script_and_quoted(plan, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/scratch/my hf; ls")
    text = scripts(plan, "local")[0][1]
    assert "export HF_HOME='/scratch/my hf; ls'\n" in text
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/xdg")  # a job may find another one
    assert "export HF_HOME=/scratch/xdg/huggingface\n" in scripts(plan, "local")[0][1]


def test_a_short_job_is_told_in_time_to_have_worked_before():
    text = scripts(make_plan(load(HERE / "recipe.yaml", ["resources={default: {hours: 0.1}}"])), "local")[0][1]
    assert "--signal=USR2@90\n" in text


def test_every_stage_is_in_one_job_and_parents_come_first(plan):
    seen: set[str] = set()
    for sent, _ in scripts(plan, "fir"):
        for job in sent.jobs:
            assert job.parents <= seen
        seen |= {key for job in sent.jobs for key in job.keys}
    assert seen == set(plan.stages)


def test_teachers_of_one_family_have_their_own_sizes():
    """Two random models differ in their configuration alone."""

    def model(width: int) -> dict:
        config = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
        return {"load": "scratch:llama", "tokenizer": "tinyworld", "config": config | {"num_key_value_heads": 2}}

    plan = make_plan(validate({
        "study": "sizes",
        "seeds": [1],
        "models": {"xl": model(512), "s": model(64)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "limit": {"train": 8, "dev": 4, "test": 4}},
        "method": {"objective": {"type": "forward_kl"}, "optim": {"steps": 1, "batch": 4}},
        "arms": {"direct": "xl > s"},
    }))  # fmt: skip
    (analyse,) = [stage for stage in plan.stages.values() if stage.kind == "analyse" and stage.model == "s"]
    ledger = Ledger(plan.recipe)
    parameters = {name: size.total for name in ("xl", "s") if (size := ledger.size(name))}
    assert process_bytes(plan, analyse, cuda=True) == pytest.approx(4 * (parameters["xl"] + parameters["s"]) + ledger.measuring("s"))
