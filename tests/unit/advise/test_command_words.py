"""Cautions, rules of thumb and the commands that advice ends with."""

import shlex
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
from tests.unit.advise.example import LOSS, RECIPE, SIZES, measures, verdict

from tadistill.advise.command import Commands, _advice, _finished, margin_on
from tadistill.advise.decide import SEEDS, Work, improvement, improvement_unit
from tadistill.advise.history import Candidate, History, Observation, path_edges
from tadistill.advise.measures import Mean, chain_settings, costs, edge_measures, ladder, twin_name, with_search, with_seeds
from tadistill.advise.words import command_notes, cost_text, lambda_sweeps, notes, rules, steps, sweep_text
from tadistill.config import load
from tadistill.plan.arms import make_plan


@pytest.fixture(scope="module")
def study():
    found = with_search(load(RECIPE, []))
    return found, ladder(found), costs(found)[1]


def one(settings):
    """The cost of a command, where it does not matter."""
    return 1.0


def test_the_predictor_gets_every_measure():
    found = edge_measures(measures())["xl", "l"]
    assert (found.size_ratio, found.bias) == (2.5, 0)
    assert found.loss_ratio == pytest.approx(LOSS["xl"] / LOSS["l"], rel=0.02)
    assert found.advantage == pytest.approx(0.2, abs=0.02)
    no_loss = replace(measures().pairs["xl", "l"], loss_ratio=Mean(inf, None, 20))
    assert edge_measures(replace(measures(), pairs={("xl", "l"): no_loss}))["xl", "l"].loss_ratio is None


def test_the_margin_is_in_the_metrics_unit(study):
    assert margin_on(study[0], "rouge_l") == 0.3
    assert margin_on(study[0], "loss") == pytest.approx(0.01)


def test_cautions(study):
    found, _, priced = study
    advice, nothing = verdict(priced), History((), ())

    def said(given, metric: str = "rouge_l", prompts: int = 20, past: History = nothing) -> str:
        return "\n".join(notes(found, list(priced), given, advice, past, metric, prompts))

    text = said(measures())
    assert "In wide steps, the teacher is more than 4 times as big as the learner: xl > s (10.0)." in text
    assert "In short steps, the teacher is less than 1.3 times as big as the learner: l > m (1.14)" in text
    assert "most likely tokens" not in text
    assert "No earlier study has a chain that can be used" in text
    assert "--prompts is" not in text
    assert "xl > s 0.5" in said(measures(mass=0.5))
    assert "--prompts is 256, but the dev set has only 20 prompts that are short enough" in said(measures(), prompts=256)
    assert "`last`, which cannot compare" in said(measures(), metric="last")
    assert "2 arms or seeds of earlier studies could not be used, for instance: a." in said(measures(), past=History((), ("a", "b")))
    assert "could not be used, for instance: ../runs/x/plan.json is damaged." in said(
        measures(), past=History((), ("../runs/x/plan.json is damaged.",))
    )
    models = found.models | {"l": found.models["l"].model_copy(update={"load": "gpt2", "config": {}, "sft": None})}
    bought = found.model_copy(update={"models": models})
    assert "Assistants that this study does not train: l. The" in "\n".join(
        notes(bought, list(priced), measures(), advice, nothing, "loss", 20)
    )


def test_rules_of_thumb(study):
    chosen = {rule.name: rule.path for rule in rules(measures(), replace(study[1], sizes=SIZES), None)}
    assert chosen["size law"] == ("xl", "l", "m", "s") or chosen["size law"][0] == "xl"
    assert chosen["geometric mean"] == ("xl", "m", "s")  # sqrt(1000 x 100) = 316
    scores = {name: np.exp(-loss) for name, loss in LOSS.items()}
    wanted = min(("l", "m"), key=lambda name: abs(scores[name] - (scores["xl"] + scores["s"]) / 2))
    assert chosen["performance mean"] == ("xl", wanted, "s")
    sweep = lambda_sweeps(measures())["exp(−loss)"]
    assert [c.assistant for c in sweep] == ["l", "m"]
    switch = (np.exp(-LOSS["l"]) - np.exp(-LOSS["m"])) / 0.05
    assert sweep[0].high == pytest.approx(switch, rel=0.05)
    assert sweep_text(sweep) == f"l up to {sweep[0].high:.2g}, then m"


def arms_of(command: str, *, start: str = "tadistill run") -> tuple[list[str], dict]:
    words = shlex.split(command)
    assert " ".join(words[:2]) == start
    planned = make_plan(load(words[2], words[3:]))
    return words, {arm.name: arm for arm in planned.arms}


def test_commands_are_recipes_that_plan(study):
    found, _, priced = study
    advice = verdict(priced)
    now, *more = steps(found, str(RECIPE), ["data.limit.train=100"], advice, priced, one)
    assert now.gain is None
    assert len(more) == len(advice.next)
    found_chain = {}
    for step, experiment in zip(more, advice.next, strict=True):
        words, arms = arms_of(step.command)
        assert "data.limit.train=100" in words
        name = "-".join(experiment.path)
        assert arms[name].arm.last == experiment.path
        assert arms[f"{name}-twin"].flops == pytest.approx(arms[name].flops, rel=0.05)
        assert len(arms[name].final) == experiment.seeds == 3
        assert (step.cost, step.gain) == (experiment.cost, experiment.gain)
        found_chain[name] = arms
    _, arms = arms_of(now.command)
    twin = next(name for name in arms if name.endswith("-twin"))
    assert set(arms) == {"direct", twin}


@pytest.mark.parametrize("more", [["budgets=[1,2]"], ["budgets.times=[1,2]", "budgets.arms=[direct]"], ["fair=true"]])
def test_commands_plan_in_a_recipe_that_adds_arms_itself(more):
    found = with_search(load(RECIPE, more))
    priced = costs(found)[1]
    advice = verdict(priced)
    now, *others = steps(found, str(RECIPE), more, advice, priced, one)
    assert {"direct", f"{'-'.join(advice.next[0].path)}-twin"} == set(arms_of(now.command)[1])
    for step, experiment in zip(others, advice.next, strict=True):
        name = "-".join(experiment.path)
        assert {"direct", name, f"{name}-twin"} <= set(arms_of(step.command)[1])


@pytest.mark.parametrize("budgets", ["budgets=[1,2]", "budgets={times: [1, 2], of: direct, arms: [direct]}"])
def test_commands_keep_the_budgets_that_other_arms_need(budgets):
    more = [budgets, "arms.again.path=xl > s", "arms.again.compute=as direct-2x"]
    found = with_search(load(RECIPE, more))
    priced = costs(found)[1]
    advice = verdict(priced)
    now, *others = steps(found, str(RECIPE), more, advice, priced, one)
    assert {"direct", "direct-2x", "again", f"{'-'.join(advice.next[0].path)}-twin"} == set(arms_of(now.command)[1])
    name = "-".join(advice.next[0].path)
    assert {"direct", "direct-2x", "again", name, f"{name}-twin"} == set(arms_of(others[0].command)[1])


def test_the_direct_run_now_is_the_stage_that_the_chains_twin_will_be(study):
    """Nothing is trained twice when the chain is tried after all."""
    found, _, priced = study
    advice = verdict(priced)
    now, first, *_ = steps(found, str(RECIPE), [], advice, priced, one)
    _, alone = arms_of(now.command)
    _, beside = arms_of(first.command)
    name = f"{'-'.join(advice.next[0].path)}-twin"
    assert alone[name].final[1] == beside[name].final[1]


def test_a_finished_run_is_not_proposed_again(study):
    found, _, priced = study
    advice = verdict(priced)
    wanted = advice.next[0].path
    now, *more = steps(found, str(RECIPE), [], advice, priced, one, {twin_name(wanted)})
    assert now.text == f"now: nothing to run; direct distillation with the compute of {' > '.join(wanted)} (1 seed) is finished"
    assert now.command == ""
    assert more == list(steps(found, str(RECIPE), [], advice, priced, one)[1:])


@pytest.fixture(scope="module")
def plans(study):
    """The commands of the recipe, and the plan of the experiment on xl > l > s with its stages of training."""
    priced = study[2]

    def commands(*finished, history=(), overrides=(), direct=priced["xl", "s"].flops):
        store, past = SimpleNamespace(finished=set(finished).__contains__), History((), (), frozenset(history))
        own = load(RECIPE, [*overrides])
        return Commands(own, lambda settings: make_plan(load(RECIPE, [*overrides, *settings])), store, past, direct)

    def plan(seeds, overrides=()):
        recipe = load(RECIPE, [*overrides])
        made = make_plan(load(RECIPE, [*overrides, *with_seeds(recipe, chain_settings(recipe, ("xl", "l", "s")), seeds)]))
        return made, {key: stage.flops for key, stage in made.stages.items() if stage.flops}

    return commands, plan, Candidate(("xl", "l", "s"), priced["xl", "l", "s"].multiple, ())


def test_an_experiment_costs_what_its_command_still_trains(plans):
    """Its cost counted stages that all seeds share once for each seed and arm, counted finished stages, and left out the direct arm."""
    commands, plan, chain = plans
    made, flops = plan(SEEDS)
    whole = commands().work(chain)
    assert {arm.name for arm in made.arms} == {"direct", "xl-l-s", "xl-l-s-twin"}
    assert whole == Work(SEEDS, SEEDS, pytest.approx(sum(flops.values()) / commands().direct))
    fresh = {key: value for key, value in flops.items() if made.stages[key].kind == "distill"}
    started = commands(*(flops.keys() - fresh.keys())).work(chain)
    assert started.cost == pytest.approx(sum(fresh.values()) / commands().direct)
    assert started.cost < whole.cost < 2 * SEEDS * chain.cost
    assert commands(*flops).work(chain) == Work(SEEDS, SEEDS, 0)  # only to be evaluated


def test_an_experiment_that_history_has_is_proposed_with_further_seeds(plans):
    commands, plan, chain = plans
    made, _ = plan(2 * SEEDS)
    finals = [[key for seed, key in arm.final.items() if seed in made.recipe.seeds[:SEEDS]] for arm in made.arms if arm.name != "direct"]
    assert [len(keys) for keys in finals] == [SEEDS, SEEDS]
    known = commands(history=[*finals[0], *finals[1]]).work(chain)
    assert (known.seeds, known.new) == (2 * SEEDS, SEEDS)
    partly = commands(history=[*finals[0], *finals[1][:1]]).work(chain)  # one seed of both arms
    assert (partly.seeds, partly.new) == (SEEDS + 1, SEEDS)


def test_an_experiment_has_as_many_new_seeds_whatever_the_recipe_has(plans):
    """With five seeds of the recipe in history, six were proposed, of which one was new."""
    commands, plan, chain = plans
    five = ["seeds=[10,20,30,40,50]"]
    known = [key for arm in plan(5, five)[0].arms if arm.name != "direct" for key in arm.final.values()]
    work = commands(history=known, overrides=five).work(chain)
    assert (work.seeds, work.new) == (5 + SEEDS, SEEDS)


PATIENT = ["arms.xl-l-s.path=xl > l > s", "arms.xl-l-s.select.patience=2"]


def test_a_command_that_the_recipe_refuses_is_not_proposed(plans):
    """It ended the command, after all measurements. The equal-compute baseline of an arm that may stop early is such a command."""
    commands, _, chain = plans
    patient = commands(overrides=PATIENT)
    assert patient.work(chain) is None
    assert patient.cost(chain_settings(patient.recipe, chain.path)) is None
    assert patient.work(replace(chain, path=("xl", "m", "s"))).new == SEEDS
    (note,) = command_notes([*patient.refused], [])
    assert note.startswith("1 command is not proposed, for instance: arms.xl-l-s-twin has `compute: as xl-l-s`, but")


def test_the_run_to_start_now_may_be_refused(study):
    found, _, priced = study
    advice = verdict(priced)
    now, *more = steps(found, str(RECIPE), [], advice, priced, lambda settings: None)
    assert now.command == ""
    assert now.text.endswith("which the arms of the recipe do not allow (see the notes)")
    assert len(more) == len(advice.next)


def test_a_metric_that_compares_no_teachers_gives_no_experiments(plans):
    """A finished experiment was proposed first, as its trainings are never history and cost nothing."""
    recipe = with_search(load(RECIPE, ["method.select.metric=last"]))
    paths, priced = costs(recipe)
    commands = plans[0]()
    advice, metric = _advice(paths, ladder(recipe), priced, edge_measures(measures()), commands)
    assert (metric, advice.next) == ("last", ())
    said = notes(recipe, list(priced), measures(), advice, History((), ()), metric, 20)
    assert any("so no experiment is proposed" in note for note in said)


def test_what_a_command_costs_in_words():
    assert cost_text(2.66) == "costs as much compute as 2.7 direct runs of one seed"
    assert cost_text(0.02) == "costs as much compute as 0.02 direct runs of one seed"
    assert cost_text(0) == "needs no training"


def test_arms_of_unknown_cost_are_named(plans):
    """They cost nothing, without a word."""
    commands, plan, _ = plans
    made, flops = plan(1)
    own = replace(made, stages={key: replace(stage, cost=None) if "direct" in stage.arms else stage for key, stage in made.stages.items()})
    alone = [key for key, stage in made.stages.items() if stage.arms == {"direct"} and key in flops]
    others = {key for key, stage in made.stages.items() if "direct" in stage.arms} - set(alone)
    assert commands(*others).unpriced(own) == ["direct"]
    assert commands(*flops).unpriced(own) == []
    assert command_notes([], ["direct"]) == ("The compute of a training is not known for direct, so the cost of no command contains it.",)


def test_a_command_with_further_seeds_says_how_many_are_new(study):
    found, _, priced = study
    advice = verdict(priced)
    more = replace(advice, next=(replace(advice.next[0], seeds=2 * SEEDS),))
    _, step = steps(found, str(RECIPE), [], more, priced, one)
    assert step.text.endswith("with direct at equal compute, 6 seeds (3 of them new)")
    assert "seeds=[1,2,3,4,5,6]" in step.command


def test_a_run_is_finished_with_all_stages_of_its_arms(study):
    plan = costs(study[0])[0]
    last = {stage.kind: stage for stage in plan.stages.values() if stage.arms}
    for kind in ("distill", "evaluate", "analyse"):
        others = SimpleNamespace(finished=lambda key, missing=last[kind].key: key != missing)
        assert _finished(plan, others) == {arm.name for arm in plan.arms} - last[kind].arms


@pytest.mark.parametrize(
    ("metric", "said"),
    [("rouge_l", "improvement in ROUGE-L"), ("loss", "decrease of the reference loss"), ("last", "improvement")],
)
def test_improvements_say_their_direction(metric, said):
    """The forecast of a loss is positive if the loss is lower, so it must not be called a difference of the loss."""
    assert improvement(metric) == said
    assert improvement_unit(metric) == {"rouge_l": "points", "loss": "nats/token", "last": ""}[metric]


def test_a_chain_that_has_proven_itself_is_run_beside_its_twin(study):
    found, _, priced = study
    history = []
    for number in range(8):
        for seed in range(4):
            for path, gain in ((("xl", "s"), 0.0), (("xl", "l", "s"), 6.0)):
                edges = path_edges(path, SIZES, edge_measures(measures()))
                quality = 20 + number + gain + 0.1 * seed * len(path)
                cost = priced["xl", "l", "s"].multiple
                history.append(Observation(f"family {number}", path, seed, edges, cost, quality, "rouge_l", "earlier"))
    advice = verdict(priced, history)
    assert advice.verdict == "chain"
    (now,) = steps(found, str(RECIPE), [], advice, priced, one)
    _, arms = arms_of(now.command)
    name = "-".join(advice.path)
    assert {name, f"{name}-twin", "direct"} == set(arms)
