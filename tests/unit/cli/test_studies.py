"""Commands about a finished study."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tests.e2e.inprocess import tadistill
from tests.unit.report.builder import SMALL, StudySpec, build_study
from tests.unit.runner.small import small

from tadistill.api import compare
from tadistill.config import parse
from tadistill.config.load import study_in
from tadistill.errors import ConfigError
from tadistill.metrics import METRICS
from tadistill.plan.arms import make_plan
from tadistill.results.study import find_study, load_plan
from tadistill.runner.run_study import save_plan
from tadistill.store import command_for, key_of, store_of

RECIPE = small("s")


def test_a_recipe_that_has_changed_since_the_run_says_so(tmp_path):
    file, runs = tmp_path / "small.yaml", tmp_path / "runs"
    file.write_text(RECIPE)
    save_plan(make_plan(parse(RECIPE, source="small.yaml")), runs, recipe_text=RECIPE, command="tadistill run small.yaml seeds=[3]")
    same = tadistill("status", str(file), "--runs", str(runs))
    assert (same.code, "has changed" in same.out) == (0, False)
    file.write_text(RECIPE + "# another learning rate\n")
    other = " ".join(tadistill("status", str(file), "--runs", str(runs)).out.split())
    assert "small.yaml has changed since the last run of the study, `tadistill run small.yaml seeds=[3]`; the following is about" in other
    assert "has changed" not in tadistill("status", "small", "--runs", str(runs)).out


QUESTION = "data: {train: t.jsonl, test: [{load: t.jsonl, instruction: Is it good?, columns: {output: label}}]}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"study: ours\n{QUESTION}\n", "ours"),  # PyYAML's own loader refuses `?,`
        ("\ufeffstudy: ours\n", "ours"),
        ("study: ours\nseeds: [1]\nseeds: [2]\nteacher: ${x}\n? [a]\n: b\n", "ours"),  # edited since the run
        ("study: 010\n", "010"),
        ("study:\n", None),
        ("study: {a: b}\n", None),
        ("- study\n", None),
        ("study: ours\ndata: {train\n", None),
        (f"study: ours\ndata: {'[' * 500}{']' * 500}\n", None),
    ],
)
def test_the_study_of_a_recipe_is_read_as_recipes_are(tmp_path, text, name):
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    assert study_in(file) == name


def test_the_teacher_of_a_recipe_is_known_without_its_analysis(tmp_path):
    """In `big > s then mid > s`, the last path does not begin with the original teacher."""
    recipe = RECIPE.replace("study: small", "study: small\nteacher: s\nanalyse: false")
    study = save_plan(make_plan(parse(recipe, source="small.yaml")), tmp_path, recipe_text=recipe, command="")
    assert load_plan(study).teacher == "s"


def test_a_study_whose_metric_has_a_name_that_is_refused_today_can_be_read(tmp_path, monkeypatch):
    """Names become keys of predictions.jsonl in later versions."""
    monkeypatch.setattr("tadistill.metrics.METRICS", dict(METRICS))
    study = save_plan(make_plan(parse(RECIPE, source="small.yaml")), tmp_path, recipe_text=RECIPE, command="")
    content = json.loads((study / "plan.json").read_text())
    content["recipe"]["metrics"] = [{"function": "own:turns"}]
    (study / "plan.json").write_text(json.dumps(content))
    assert load_plan(study).study == "small"


def reported(place: str, *options: str) -> str:
    """What `tadistill report` says about a study."""
    done = tadistill("report", place, *options)
    return " ".join((done.out + done.err).split())


def rows(study: Path) -> int:
    return len(json.loads((study / "results.json").read_text())["rows"])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A finished study in the runs directory `work`; the working directory is another one, with a runs directory of its own."""
    study = build_study(tmp_path / "work", StudySpec(SMALL)).study_dir
    (tmp_path / "elsewhere" / "runs" / "store").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return study


@pytest.mark.slow
def test_a_study_is_read_with_the_store_beside_it(elsewhere):
    Path("link").symlink_to(elsewhere)
    said = reported("../work/demo")
    assert "tadistill watch demo --runs ../work" in said
    assert rows(elsewhere) > 0
    (elsewhere / "results.json").write_text('{"rows": []}')  # as an earlier version emptied it
    assert "tadistill watch demo --runs" in reported("link")
    assert rows(elsewhere) > 0


@pytest.mark.parametrize("command", ["report", "status", "watch", "export", "human", "cancel"])
def test_a_study_in_another_runs_directory_than_the_given_one_is_refused(elsewhere, command):
    arguments = [command, str(elsewhere), *(["chain", "copy"] if command == "export" else []), "--runs", "runs"]
    done = tadistill(*arguments)
    assert (
        f"study {elsewhere} lies in the runs directory {elsewhere.parent}, which has more of its stages than runs; leave out --runs"
        in done.err
    )
    assert done.code == 2


def test_an_empty_report_never_replaces_one_with_scores(elsewhere):
    (elsewhere / "results.json").write_text('{"rows": [{"value": 1}]}')
    shutil.copytree(elsewhere, "runs/demo")  # without the stages
    said = reported("demo")
    assert "numbers of stages of study demo that are not in the store at runs/store, so the report is not replaced by one without" in said
    assert "to make them again" not in said  # the rows do not say of which stage they are, as those of an earlier version
    assert rows(Path("runs/demo")) == 1


@pytest.mark.slow
def test_a_poorer_report_never_replaces_one_with_more_stages(elsewhere):
    """The store beside a copy shares some of the study's evaluations."""
    reported(str(elsewhere))
    shutil.copytree(elsewhere, "runs/demo")
    before, content = rows(elsewhere), json.loads((elsewhere / "results.json").read_text())
    for key in {row["stage"] for row in content["rows"] if row["arm"] == "direct"}:
        shutil.copytree(store_of(elsewhere.parent).folder(key), store_of(Path("runs")).folder(key))
    said = reported("demo")
    assert "that are not in the store at runs/store, so the report is not replaced by one without them; give --runs with the" in said
    assert rows(Path("runs/demo")) == before
    (Path("runs/demo") / "results.json").unlink()
    reported("demo")
    assert 0 < rows(Path("runs/demo")) < before


@pytest.mark.slow
def test_a_report_follows_the_store_in_which_its_study_was_last_run(elsewhere):
    """Until a damaged stage, which the user was told to delete, ran again, no report was written."""
    plan, runs = json.loads((elsewhere / "plan.json").read_text()), str(elsewhere.parent.resolve())
    (elsewhere / "plan.json").write_text(json.dumps(plan | {"runs": runs}))
    reported(str(elsewhere))
    before = rows(elsewhere)
    shutil.rmtree(store_of(elsewhere.parent).folder(json.loads((elsewhere / "results.json").read_text())["rows"][0]["stage"]))
    assert "report.html" in reported(str(elsewhere))
    assert 0 < rows(elsewhere) < before


def test_where_a_study_is(tmp_path, monkeypatch):
    study, other = tmp_path / "a" / "s", tmp_path / "b" / "s"
    earlier = study / "earlier" / "0123abcd"
    for folder in (study, earlier, other):
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
        (folder.parent / "store").mkdir()
    (study / "earlier" / "store").rmdir()
    monkeypatch.chdir(study.parent)
    store = study.parent / "store"

    def found(name: str, runs: str | None = None) -> tuple[Path, Path]:
        folder, of = find_study(name, runs)
        return folder.resolve(), of.root.resolve()

    assert found("s") == found("../a/s") == found("s", "../a") == found(str(study)) == (study, store)
    assert found("s/earlier/0123abcd") == found("s/earlier/0123abcd", ".") == (earlier, store)
    assert found("s", "../b") == (other, tmp_path / "b" / "store")  # the given directory comes before a folder of this name
    monkeypatch.chdir(study)
    assert found(".") == (study, store)
    assert command_for("export", earlier, "ARM") == f"tadistill export s/earlier/0123abcd ARM --runs {study.parent}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/a/s") == (study, store)


def placed(folder: Path, *homes: Path, shared: Path | None = None) -> Path:
    """A study in `folder`, with its stages in the stores of `homes`, and one of them, such as a teacher's training, in that of `shared`."""
    folder.mkdir(parents=True)
    keys = [key_of([folder.name, number]) for number in range(3)]
    (folder / "plan.json").write_text(json.dumps({"stages": [{"key": key} for key in keys]}))
    for home, have in [*((home, keys) for home in homes), *([(shared, keys[:1])] if shared else [])]:
        for key in have:
            store_of(home).folder(key).mkdir(parents=True)
    return folder


def test_the_store_that_has_the_stages_of_a_study_is_read(tmp_path, monkeypatch):
    """A folder named `store` beside the study, the copy or the link may belong to something else."""
    study, mine = placed(tmp_path / "a" / "s", tmp_path / "a"), placed(tmp_path / "w" / "mine", tmp_path / "w" / "runs")
    for folder in (tmp_path / "w" / "store", tmp_path / "w" / "runs" / "store", tmp_path / "c" / "store"):
        folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "w")
    Path("runs/s").symlink_to(study)
    assert find_study("mine", None)[1].root.resolve() == find_study("mine", "runs")[1].root.resolve() == tmp_path / "w" / "runs" / "store"
    folder, store = find_study("s", None)
    assert (folder.resolve(), store.root) == (study, tmp_path / "a" / "store")
    with pytest.raises(
        ConfigError, match=f"study runs/s lies in the runs directory {study.parent}, which has more of its stages than runs; leave"
    ):
        find_study("s", "runs")
    assert find_study(str(mine), "../a")[1].root == Path("../a/store")
    shutil.rmtree("runs/store")
    assert find_study("mine", "../c")[1].root == Path("../c/store")  # no store has its stages


def test_a_store_that_only_shares_a_stage_with_a_study_is_not_its_store(tmp_path, monkeypatch):
    """Its finished report was replaced by one without most arms."""
    study = placed(tmp_path / "a" / "s", tmp_path / "a", shared=tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    Path("runs/s").symlink_to(study)
    assert find_study("s", None)[1].root.resolve() == tmp_path / "a" / "store"
    with pytest.raises(ConfigError, match="which has more of its stages than runs; leave out --runs"):
        find_study("s", "runs")


def test_a_study_that_runs_again_elsewhere_is_read_there(tmp_path, monkeypatch):
    """The store of the finished run has more of its stages."""
    study = placed(tmp_path / "new" / "s", shared=tmp_path / "new")
    placed(tmp_path / "runs" / "s", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    plan = json.loads((study / "plan.json").read_text())
    (study / "plan.json").write_text(json.dumps({**plan, "runs": str(tmp_path / "new")}))
    assert find_study("new/s", None)[1].root == Path("new/store")
    shutil.copytree("new/s", "copies/s")
    for key in plan["stages"][:1]:
        store_of(Path("copies")).folder(key["key"]).mkdir(parents=True)
    assert find_study("copies/s", None)[1].root == Path("runs/store")  # a store beside a copy may share stages


def test_a_plan_names_its_runs_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = save_plan(make_plan(parse(RECIPE, source="small.yaml")), Path("new"), recipe_text=RECIPE, command="")
    assert json.loads((study / "plan.json").read_text())["runs"] == str(tmp_path / "new")


def test_a_store_without_permission_has_no_stages(tmp_path, monkeypatch):
    placed(tmp_path / "c" / "s", tmp_path / "runs", shared=tmp_path / "c")
    (tmp_path / "c" / "looked" / "x.json").mkdir(parents=True)
    (tmp_path / "c" / "looked" / "search.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    real = os.stat

    def stat(path, *arguments, **options):
        if "c/store/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("os.stat", stat)
    assert find_study("c/s", None)[1].root == Path("runs/store")
    assert find_study("c/looked", None, searches=True)[1].root == Path("c/store")


def test_a_printed_command_finds_the_same_study_and_store(tmp_path, monkeypatch):
    placed(tmp_path / "runs" / "s", tmp_path / "runs"), placed(tmp_path / "far" / "t", tmp_path / "far")
    for folder in ("mine", "t", "s"):
        placed(tmp_path / folder)
    placed(tmp_path / "far" / "mine")
    monkeypatch.chdir(tmp_path)
    Path("runs/t").symlink_to(tmp_path / "far" / "t")
    for study, runs in (
        ("runs/s", None),
        ("s", None),
        ("s", "runs"),
        ("mine", None),
        ("./mine", "far"),
        ("runs/t", None),
        ("t", "far"),
        ("t", None),
    ):
        folder, store = find_study(study, runs)
        words = command_for("watch", folder, store=store).split()
        again, other = find_study(words[2], words[4] if len(words) > 3 else None)
        assert (again.resolve(), other.root.resolve()) == (folder.resolve(), store.root.resolve()), (study, runs, words)
    assert command_for("watch", Path("mine"), store=store_of(Path("runs"))) == "tadistill watch mine"


def test_the_variable_comes_before_a_folder_of_the_same_name_but_not_before_a_path(tmp_path, monkeypatch):
    study = placed(tmp_path / "far" / "s", tmp_path / "far")
    here = placed(tmp_path / "s")
    (tmp_path / "s.yaml").write_text(small("s").replace("study: small", "study: s"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TADISTILL_RUNS", "far")

    def found(name: str) -> Path:
        return find_study(name, None)[0].resolve()

    assert [found(name) for name in ("s", "s.yaml", "./s.yaml", "far/s", "./far/s")] == [study] * 5
    assert [found(name) for name in ("./s", "s/", str(here))] == [here] * 3  # a path names a folder
    monkeypatch.chdir(here)
    monkeypatch.setenv("TADISTILL_RUNS", str(tmp_path / "far"))
    assert [found(name) for name in ("s", "../s", ".")] == [study, here, here]


def test_a_search_given_as_a_dot_is_named(tmp_path, monkeypatch):
    (tmp_path / "looked").mkdir()
    (tmp_path / "looked" / "search.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "looked")
    with pytest.raises(ConfigError, match=f"^looked is a search, .*`tadistill status {tmp_path}/looked --runs .`"):
        find_study(".", ".")


@pytest.mark.parametrize("seeds", ["²", "1,²", "one", ""])
def test_seeds_that_are_no_numbers(seeds):
    done = tadistill("eval", "gpt2", "--on", "dolly", "--seeds", seeds)
    assert (done.code, f"--seeds is `{seeds}`; give whole numbers separated by commas" in done.err) == (2, True)


@pytest.mark.parametrize("models", [["gpt2"], ["gpt2", "gpt2-medium"]])
def test_no_message_names_a_line_of_a_recipe_that_the_user_did_not_write(models):
    done = tadistill("compare" if len(models) > 1 else "eval", *models, "--on", "dolly", "--seeds", "9" * 20)
    assert re.match(r"error: tadistill (eval|compare): `evaluate.seeds`: the largest whole number is ", done.err)
    with pytest.raises(ConfigError, match=r"^tadistill.compare: `evaluate.seeds`: "):
        compare(["gpt2", "gpt2-medium"], seeds=[10**20])


def test_a_copy_can_go_to_the_home_folder(tmp_path, monkeypatch):
    study = build_study(tmp_path / "runs", StudySpec(SMALL)).study_dir
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tadistill.report.export.export", lambda results, arm, seed, target, **_: copied.append(target))
    copied: list[Path] = []
    tadistill("export", str(study), "chain", "~/copy")
    assert copied == [tmp_path / "home" / "copy"]
