"""What a site would refuse is refused before anything is submitted, with the rule and the fix."""

from pathlib import Path

import pytest

from tadistill.cluster import slurm
from tadistill.cluster.submit import Submission, submit
from tadistill.config import load
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.terminal import Terminal

RECIPE = Path(__file__).with_name("recipe.yaml")


def scripts(site: str, *resources: str, account: str = "def-prof", runs: Path = Path("/scratch/runs")):
    chosen = [f"resources={{{', '.join(resources)}}}"] if resources else []
    return list(Submission(make_plan(load(RECIPE, chosen)), slurm.load_profile(site), runs, account=account).scripts())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "resources", "message"),
    [
        ("narval", "sft: {gpu: h100}", "gpu is `h100`, but narval has no such GPU; use one of a100, a100_3g.20gb"),
        ("fir", "sft: {gpu: h100_3g.40gb}", "use one of h100, nvidia_h100_80gb_hbm3_3g.40gb"),  # long names only
        ("rorqual", "sft: {gpu: h100_3g.40gb, processes: 2}", "a job can use only one slice"),
        ("rorqual", "sft: {processes: 8}", "a node of rorqual has 4 x h100; use more nodes"),
        ("rorqual", "sft: {gpu: h100, cpus: 65}", "65 cores on a node, but rorqual gives at most 64"),
        ("rorqual", "sft: {gpu: h100_1g.10gb, memory: 31}", "31 GB of memory on a node, but rorqual gives at most 15"),
        ("trillium", "sft: {hours: 25}", "hours is 25, but trillium allows 0.25 to 24"),
        ("narval", "sft: {hours: 0.5}", "hours is 0.5, but narval allows 1 to 168"),
        ("local", "sft: {gpu: h100}", "profile local has no GPUs"),
        ("narval", "sft: {processes: 3}", "`optim.batch` is 64, but it must be a multiple of the 3 processes"),
    ],
)
def test_requests(site, resources, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        scripts(site, resources)


def test_a_model_that_fits_nowhere_says_how_to_spread_it():
    big = "models.xl.config={n_embd: 4096, n_layer: 40, n_head: 32, n_positions: 1024}"
    plan = make_plan(load(RECIPE, [big]))
    with pytest.raises(
        ConfigError, match=r"sft xl, seed 10 needs about \d+ GB on a GPU, but the largest GPU of narval has 40 GB; .* spread the stage"
    ):
        list(Submission(plan, slurm.load_profile("narval"), Path("/scratch/runs"), account="def-prof").scripts())
    spread = load(RECIPE, [big, "resources={sft xl: {processes: 4, parallel: fsdp}, default: {teacher: offloaded}}"])
    text = next(
        t for sent, t in Submission(make_plan(spread), slurm.load_profile("rorqual"), Path("/scratch/r"), account="def-a").scripts()
    )
    assert "--gpus-per-node=h100:4" in text


def test_whole_nodes_are_rounded_up():
    text = next(text for _, text in scripts("tamia", account="aip-prof"))
    assert "#SBATCH --gpus=h100:4\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text
    text = next(text for _, text in scripts("trillium", "sft: {processes: 2}"))
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert "--mem" not in text


def test_accounts(monkeypatch):
    with pytest.raises(ConfigError, match="narval needs an account; give --account NAME"):
        scripts("narval", account="")
    with pytest.raises(ConfigError, match="account `def-prof` is not an account of vulcan; accounts there look like aip-PROF"):
        scripts("vulcan")
    monkeypatch.setenv("SBATCH_ACCOUNT", "def-other")
    with pytest.raises(ConfigError, match="SBATCH_ACCOUNT=def-other in the environment overrides it; unset SBATCH_ACCOUNT"):
        scripts("narval")
    assert all("--account=def-other" in text for _, text in scripts("narval", account=""))


@pytest.mark.parametrize(("cpu", "reports"), [("{}", 1), ("null", 0)])
def test_too_many_jobs_are_refused_and_a_report_counts_only_where_it_has_a_job(cpu, reports, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"about: mine\nmax_hours: 3\nmax_jobs: 1\ncpu: {cpu}\n")
    submission = Submission(make_plan(load(RECIPE)), slurm.load_profile(str(own)), tmp_path, account=None)
    jobs = submission.jobs(submission.todo)
    with pytest.raises(ConfigError, match=f"^{len(jobs) + reports} new jobs and 2 jobs in the queue are more than the 1 that a user may"):
        submission._check_number(jobs, 2)


def test_home_is_no_place_for_jobs(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"on trillium home and project folders are read-only in jobs; change to .SCRATCH"):
        scripts("trillium", runs=tmp_path / "runs")
    with pytest.raises(ConfigError, match="the runs directory is /project/u/runs, but on trillium"):
        scripts("trillium", runs=Path("/project/u/runs"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"this folder is .*, but on rorqual jobs cannot be submitted from the home directory"):
        scripts("rorqual")
    assert scripts("narval", runs=tmp_path / "runs")


def test_profiles(tmp_path):
    with pytest.raises(ConfigError, match="no cluster profile `cedar`; use one of fir, killarney"):
        slurm.load_profile("cedar")
    own = tmp_path / "own.yaml"
    own.write_text("about: mine\nmax_hour: 3\n")
    with pytest.raises(ConfigError, match=r"own.yaml: max_hours: Field required"):
        slurm.load_profile(str(own))
    own.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        slurm.load_profile(str(own))
    own.write_bytes(b"about: caf\xe9\nmax_hours: 3\n")
    with pytest.raises(ConfigError, match=r"own.yaml is not UTF-8; save the file as UTF-8"):
        slurm.load_profile(str(own))
    own.write_text("about: mine\nmax_hours: 3\n")
    assert slurm.load_profile(str(own)).name == "own"


def test_a_cluster_must_be_named():
    with pytest.raises(ConfigError, match="--cluster is not given; use one of fir, killarney"):
        submit(load(RECIPE), text="", command="", cluster=None, account=None, runs=Path("x"), dry_run=True, console=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ("training: {}", "resources.training is neither `default` nor a kind of stage"),
        ("sft xxl: {}", "resources.sft xxl names the model `xxl`, which is not in the recipe"),
        ("evaluate: {processes: 2}", "stages of kind evaluate run in one process"),
        ("sft: {processes: 3, nodes: 2}", "processes 3 is not a multiple of nodes 2"),
        ("sft: {parallel: fsdp}", "`parallel: fsdp` splits a model over several processes, but `processes` is 1"),
        ("sft: {gpus: 2}", "gpus"),
    ],
)
def test_a_recipes_resources(resources, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(load(RECIPE, [f"resources={{{resources}}}"]))


def test_nothing_to_submit_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tadistill.store.Store.finished", lambda self, key: True)
    monkeypatch.setattr("tadistill.cluster.slurm.queued", dict)
    profiles = tmp_path / "own.yaml"
    profiles.write_text("about: mine\nmax_hours: 3\n")
    for dry_run in (True, False):
        given = {"cluster": str(profiles), "account": None, "runs": tmp_path, "dry_run": dry_run}
        submit(load(RECIPE), text="", command="", console=Terminal(width=300), **given)
        assert "all 87 stages are done; write the report with tadistill report" in capsys.readouterr().out
    page = tmp_path / load(RECIPE).study / "report.html"
    page.parent.mkdir(exist_ok=True)
    page.touch()
    submit(load(RECIPE), text="", command="", console=Terminal(width=300), **given)
    assert f"all 87 stages are done; the report is {page} (tadistill report" in capsys.readouterr().out
