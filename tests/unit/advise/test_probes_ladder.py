"""The ladder of a recipe, what its paths cost, the stages that probe it, and mistakes, which are one sentence before any work."""

import io
import re
from pathlib import Path

import pytest

from tadistill.advise import command
from tadistill.advise.measures import TOP_K, costs, ladder, probe_plan, with_search
from tadistill.config import load
from tadistill.errors import ConfigError, DataError, ModelError
from tadistill.plan.arms import make_plan
from tadistill.runner import preflight, schedule
from tadistill.store import Store
from tadistill.terminal import Terminal

RECIPE = Path(__file__).parents[2] / "e2e" / "advice.yaml"
ALL = "search={teacher: xl, assistants: [l, m], student: s}"
PATHS = [("xl", "s"), ("xl", "l", "s"), ("xl", "m", "s"), ("xl", "l", "m", "s")]


def recipe(*overrides: str):
    return with_search(load(RECIPE, overrides))


def test_without_search_everything_between_the_ends_may_assist():
    found = recipe().search
    assert found is not None
    assert (found.teacher, found.assistants, found.student) == ("xl", ("l", "m"), "s")
    assert recipe().model_dump() == recipe(ALL).model_dump()


def test_a_search_decides():
    found = ladder(recipe("search={teacher: l, assistants: [m], student: s}"))
    assert (found.teacher, found.assistants, found.student) == ("l", ("m",), "s")
    assert list(found.sizes.values()) == sorted(found.sizes.values(), reverse=True)


def test_costs_are_those_of_the_studys_ledger():
    plan, found = costs(recipe())
    assert list(found) == PATHS
    arms = {arm.name: arm for arm in plan.arms}
    direct = arms["xl-s"].flops
    for path, cost in found.items():
        assert cost.flops == arms["-".join(path)].flops
        assert cost.multiple == pytest.approx(cost.flops / direct)
        if path != ("xl", "s"):
            twin = arms[f"{'-'.join(path)}-twin"]
            assert twin.flops == pytest.approx(cost.flops, rel=0.05)  # whole updates
            assert cost.twin == (twin.method.optim.steps, twin.method.select.every)
    assert found["xl", "s"].twin is None


def test_a_recipe_is_read_once_for_all_paths(monkeypatch):
    """A trial of each arm with a budget read all tokenizers and the methods of all arms again: minutes for 256 paths."""
    read = []
    monkeypatch.setattr("tadistill.plan.study_tokens.contexts_of", lambda recipe: read.append("contexts") or {})
    monkeypatch.setattr("tadistill.plan.arms.check_entries", lambda recipe: read.append("entries"))
    costs(recipe())
    assert sorted(read) == ["contexts"] * 2 + ["entries"] * 2  # to price the paths, and with their baselines


def test_limits_leave_paths_out():
    one = costs(recipe("search={teacher: xl, assistants: [l, m], student: s, max_assistants: 1}"))[1]
    assert list(one) == PATHS[:3]
    cheap = costs(recipe("search={teacher: xl, assistants: [l, m], student: s, budget: 1.2}"))[1]
    assert list(cheap) == [("xl", "s"), ("xl", "m", "s")]


def test_before_the_probes_nothing_is_said_about_stages_that_advise_does_not_run(tmp_path, monkeypatch):
    """It named test sets with training prompts, and the budgets of arms, but it only measures models on dev prompts."""
    found = recipe()
    probes, plan, store, asked = probe_plan(found, ladder(found), 256), make_plan(found), Store(tmp_path), []
    monkeypatch.setattr(preflight, "check_study", lambda plan, console, stages, show: asked.append([s.key for s in stages]) or 1)
    monkeypatch.setattr(schedule, "announced", lambda plan, store, stages: (f"{s.kind} is priced." for s in stages if s.kind == "distill"))
    monkeypatch.setattr(schedule, "seen_notes", lambda recipe: ["a test set is a training set."])
    monkeypatch.setattr(schedule, "off_budget", lambda plan: ["an arm misses its budget."])
    monkeypatch.setattr(command, "run_stages", lambda *_, **__: None)

    def said(check) -> list[str]:
        output = io.StringIO()
        check(Terminal(file=output, width=200))
        return re.findall("priced|training set|budget", output.getvalue())

    assert said(lambda console: command._run(plan, probes, store, console)) == []
    assert asked == [list(probes.plan.stages)]
    every = [*plan.stages.values()]
    trains = [stage for stage in every if not stage.spec.measures]  # as `search`
    assert said(lambda console: schedule.check_first(plan, store, console, trains)) == ["budget", "priced"]
    assert said(lambda console: schedule.check_first(plan, store, console, every)) == ["budget", "training set", "priced"]


def test_probes_stand_on_the_studys_own_fine_tuning():
    found = recipe()
    probes = probe_plan(found, ladder(found), 256)
    kinds = [stage.kind for stage in probes.plan.stages.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"sft": 4, "probe": 4, "pair": 6}
    study = costs(found)[0]
    assert {k for k, s in probes.plan.stages.items() if s.kind == "sft"} <= set(study.stages)
    for (teacher, learner), key in probes.beside.items():
        stage = probes.plan.stages[key]
        assert stage.parents["answers"] == probes.alone[learner]
        assert stage.parents["teacher"] == probes.plan.stages[probes.alone[teacher]].parents["model"]
        assert (stage.spec.dev.limit, stage.spec.k) == (12, TOP_K)
        assert "sets" not in stage.spec.content()  # no test set


def test_a_new_candidate_leaves_the_old_probes():
    few, all_ = recipe("search={teacher: xl, assistants: [l], student: s}"), recipe(ALL)
    old, new = (set(probe_plan(r, ladder(r), 8).plan.stages) for r in (few, all_))
    assert old < new


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["search={teacher: xl, assistants: [m, l], student: s}"], "from big to small, but l .* comes after m"),
        (["search={teacher: xl, assistants: [l], student: s, budget: 0.5}"], "budget is 0.5 .* xl > s, costs 1.00"),
        (["arms.other=m"], None),
        (["arms.other=xl > l"], "students s, l"),
        (["arms.direct=xl > l"], "no model has a size between teacher xl .* and student l"),
        (["search={teacher: xl, assistants: [who], student: s}"], "`who`, which is not a model"),
    ],
)
def test_mistakes_in_the_lattice(overrides, sentence):
    if sentence is None:
        costs(recipe(*overrides))
        return
    with pytest.raises(ConfigError, match=sentence):
        costs(recipe(*overrides))


def test_mistakes_in_data_and_models(tmp_path):
    found = recipe()
    with pytest.raises(ConfigError, match="--prompts is 1"):
        probe_plan(found, ladder(found), 1)
    empty = tmp_path / "dev.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="is empty"):
        probe_plan(recipe(f"data.dev={empty}"), ladder(found), 8)
    with pytest.raises(ModelError, match="does not exist"):
        recipe("search={teacher: xl, assistants: [n], student: s}", f"models.n={{load: {tmp_path / 'nothing'}}}")
    with pytest.raises(ConfigError, match="n takes its temperature from arm direct"):
        recipe("search={teacher: xl, assistants: [n], student: s}", "models.n={temper: {of: xl, like: direct}}")
    many = [f"models.n{i}={{temper: {{of: xl, tau: {1 + i}}}}}" for i in range(9)]
    with pytest.raises(ConfigError, match="9 assistants make 512 paths"):
        recipe(f"search={{teacher: xl, assistants: [{', '.join(f'n{i}' for i in range(9))}], student: s}}", *many)


def test_fewer_prompts_are_other_probes_of_the_same_models():
    found = recipe()
    few, all_ = (probe_plan(found, ladder(found), n).plan.stages for n in (4, 256))
    assert {stage.kind for key, stage in few.items() if key in all_} == {"sft"}
