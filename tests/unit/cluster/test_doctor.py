"""What doctor says of a machine, with fake programs on PATH."""

import contextlib
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.cluster import doctor, slurm
from tadistill.cluster.doctor import examine, table
from tadistill.config import parse

ROOT = Path(__file__).parents[3]
ALLIANCE = "(def|rrg|rpp|ctb)-.+"
USAGE = """                            Description                Space           # of files
                     /home (user2)              280 kB/47 GB             25/500k
                  /scratch (user2)              17.5 TB/18 TB              1/1000k
       /project (project def-prof)       9600 GB/9536 GB          0/500k
"""


def test_python():
    assert doctor.python("3.12.1", ">=3.11").state == "ok"
    assert doctor.python("3.10.9", ">=3.11").fix == "create the environment again with a Python version >=3.11"


def test_packages(monkeypatch):
    versions = {"torch": "2.11.0+computecanada", "rich": "13.1"}

    def version(name):
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    fine = doctor.packages(["torch>=2.11", "trl<1.17,>=1.16; extra == 'dev'"])
    assert (fine.state, fine.found) == ("ok", "torch 2.11.0+computecanada; all 1 are new enough")
    bad = doctor.packages(["torch>=2.12", "rich>=13.9", "gguf>=0.17"])
    assert bad.state == "problem"
    assert bad.found == "torch 2.11.0+computecanada (wanted >=2.12); rich 13.1 (wanted >=13.9); gguf is not installed (wanted >=0.17)"


def test_wheelhouse(programs):
    assert doctor.wheelhouse(["torch>=2.11"]) is None
    programs("avail_wheels", 'while read line; do case $line in rouge*) echo "rouge_score  0.1.2";; esac; done < "$2"')
    lacking = doctor.wheelhouse(["torch>=2.11", "rouge-score>=0.1.2", "trl>=1.16; extra == 'dev'"])
    assert lacking
    assert (lacking.state, lacking.found) == ("warning", "the wheelhouse does not have rouge-score")
    fine = doctor.wheelhouse(["torch>=2.11"])
    assert fine
    assert fine.state == "ok"


def test_gpus(programs):
    assert doctor.gpus().found.startswith("none")
    programs("nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB'")
    assert doctor.gpus().found == "NVIDIA H100 80GB HBM3, 81559 MiB"
    programs("nvidia-smi", "echo 'no devices'; exit 9")
    assert doctor.gpus().found.startswith("none")


def test_slurm(programs):
    assert doctor.slurm(None).state == "ok"
    assert doctor.slurm("narval").state == "problem"
    for name in ("sbatch", "squeue", "scancel"):
        programs(name, "echo slurm 24.05.4")
    assert doctor.slurm(None).found == "not on PATH: sacct"
    programs("sacct", "")
    assert doctor.slurm("narval") == doctor.Check("slurm", "ok", "slurm 24.05.4")


def test_account(programs):
    assert doctor.account(ALLIANCE, {"SBATCH_ACCOUNT": "def-prof"}).state == "ok"
    assert doctor.account(ALLIANCE, {"SLURM_ACCOUNT": "prof"}).fix.endswith("correct SLURM_ACCOUNT")
    assert doctor.account(ALLIANCE, {"SLURM_ACCOUNT": "def-a", "SBATCH_ACCOUNT": "def-b"}).state == "problem"
    assert doctor.account(None, {}) == doctor.Check("account", "ok", "no account is set")
    assert doctor.account(ALLIANCE, {}).fix.startswith("export SBATCH_ACCOUNT=NAME")
    programs("sacctmgr", "echo 'def-old_cpu|'")
    assert doctor.account(ALLIANCE, {}).found == "no account is set; your accounts: def-old"
    programs("sshare", "echo def-prof_cpu; echo def-prof_gpu; echo other")
    asked = doctor.account(ALLIANCE, {})
    assert (asked.state, asked.found) == ("warning", "no account is set; your accounts: def-prof")
    assert asked.fix == "export SBATCH_ACCOUNT=def-prof, or submit with --account"


def test_a_program_that_hangs_is_left(programs, monkeypatch):
    monkeypatch.setattr("tadistill.cluster.slurm._SECONDS", 0.2)
    programs("sshare", "exec /bin/sleep 30")
    start = time.monotonic()
    assert doctor.account(ALLIANCE, {}).found == "no account is set"
    assert time.monotonic() - start < 20


def test_modules(monkeypatch):
    wanted = ("StdEnv/2023", "gcc", "arrow/23.0.1")
    assert doctor.modules(wanted, {"LOADEDMODULES": "StdEnv/2023:gcc/12.3:arrow/24.0.0"}).state == "ok"
    absent = doctor.modules(wanted, {"LOADEDMODULES": "StdEnv/2023"})
    assert (absent.state, absent.found) == ("warning", "not loaded: gcc, arrow/23.0.1")
    assert doctor.modules((), {}).state == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.modules(wanted, {}).fix.startswith("run module load StdEnv/2023 gcc arrow/23.0.1 before")


def test_quota(programs, tmp_path):
    assert doctor.quota({"runs": tmp_path}) == []
    programs("lfs", f"echo '{tmp_path} 950 0 1000 - 1 0 500 -'")
    assert [(c.state, c.found) for c in doctor.quota({"runs": tmp_path})] == [("warning", "runs 950k/1000k 1/500")]
    programs("lfs", f"echo '{tmp_path} 950 0 0 - 1 0 0 -'")  # no limit
    assert doctor.quota({"runs": tmp_path}) == []
    (tmp_path / "usage").write_text(USAGE)
    programs("diskusage_report", f"/bin/cat {tmp_path / 'usage'}")
    assert [c.state for c in doctor.quota({})] == ["ok", "warning", "problem"]


def test_space_and_caches(tmp_path, monkeypatch):
    free = {"bytes": 50e9}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free["bytes"]}))
    place = tmp_path / "not" / "there"
    assert doctor.space("runs", place).found == f"50.0 GB free at {place}"
    assert doctor.cache("hub cache", "HF_HOME", place, None, {}).state == "ok"
    assert doctor.cache("hub cache", "HF_HOME", place, "narval", {}).state == "warning"
    assert doctor.cache("hub cache", "HF_HOME", place, "narval", {"HF_HOME": "x"}).state == "ok"
    for free["bytes"], state in ((5e9, "warning"), (1e6, "problem")):
        assert doctor.space("runs", place).state == state
        assert doctor.cache("hub cache", "HF_HOME", place, None, {}).state == state


def test_store(tmp_path):
    found = doctor.store(tmp_path / "runs" / "store")
    assert [(c.name, c.state) for c in found] == [("store", "ok"), ("locks", "ok"), ("clock", "ok")]
    assert list((tmp_path / "runs" / "store").iterdir()) == []  # nothing is left there
    (tmp_path / "file").write_text("")
    (bad,) = doctor.store(tmp_path / "file" / "store")
    assert bad.state == "problem"
    assert "cannot be written" in bad.found


def test_a_lock_that_holds_nobody_off_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FileLock", lambda path, timeout: contextlib.nullcontext())
    assert doctor.store(tmp_path)[1].found == "two processes can have the same file lock at the same time"


def test_a_clock_that_is_off_is_told(tmp_path, monkeypatch):
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() - 60)
    clock = doctor.store(tmp_path)[2]
    assert clock.state == "warning"
    assert re.match(r"the disk's clock differs from this machine's clock by \+(59\.9|60\.\d) s", clock.found)


def test_data_root(tmp_path):
    assert doctor.data_root(None).state == doctor.data_root(str(tmp_path)).state == "ok"
    assert doctor.data_root(str(tmp_path / "none")).state == "problem"
    assert doctor.data_root("~nobody-here/x").state == "problem"


def test_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "compare", lambda recipe, runs: (["model `gpt2` at revision `main` is not on this disk; run it"], []))
    text = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    recipe = parse(text, source="recipe")
    asked = doctor.fetched(recipe, tmp_path, "narval")
    assert (asked.state, asked.found) == ("problem", "not on this disk: model `gpt2` at revision `main`")
    assert doctor.fetched(recipe, tmp_path, None).state == "warning"
    monkeypatch.setattr(doctor, "compare", lambda recipe, runs: ([], []))
    assert doctor.fetched(recipe, tmp_path, "narval").state == "ok"
    monkeypatch.setattr(doctor, "compare", lambda recipe, runs: ([], ["it moved"]))
    assert doctor.fetched(recipe, tmp_path, None).found == "it moved"


def test_a_local_file_that_is_missing_or_cannot_be_read_is_no_fetched_model(tmp_path, monkeypatch):
    """Local files were not looked at: everything was on this disk."""
    text = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    recipe = parse(text, ["models.xl={load: tiny.gguf, config: {}}"], source="recipe", folder=tmp_path)
    found = doctor.fetched(recipe, tmp_path, None)
    assert (found.state, "tiny.gguf` does not exist" in found.found) == ("problem", True)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("tadistill.models.model_files.version", lambda name: "5.22.2")
    found = doctor.fetched(recipe, tmp_path, None)
    assert (found.state, "needs transformers 5.23 or newer, because version 5.22.2" in found.found) == ("problem", True)


def test_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path))
    found = examine(runs=tmp_path / "runs", profile=slurm.load_profile("narval"))
    assert {"gpus", "slurm", "account", "modules", "runs", "hub cache", "cache", "store", "locks", "clock", "data"} <= {
        c.name for c in found
    }
    assert table(found).row_count == len(found)


@pytest.mark.parametrize(("data", "code"), [(".", 0), ("/no/such/folder", 1)])
def test_the_command_fails_where_there_is_a_problem(tmp_path, monkeypatch, programs, data, code):
    monkeypatch.setenv("TADISTILL_DATA", data)
    monkeypatch.setattr("tadistill.cluster.doctor.packages", lambda requirements: doctor.Check("packages", "ok", ""))
    monkeypatch.setattr("tadistill.cluster.doctor.space", lambda name, path: doctor.Check(name, "ok", ""))
    result = CliRunner().invoke(app, ["doctor", str(ROOT / "recipes" / "quickstart.yaml"), "--runs", str(tmp_path)])
    assert result.exit_code == code, result.output
    assert "everything is on this disk" in " ".join(result.output.split())
