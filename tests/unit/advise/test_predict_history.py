"""What is read of finished studies: dev values of selected checkpoints, with the sign and cost that the predictor wants."""

import json
import zlib
from dataclasses import replace

import pytest

from tadistill.advise.history import EdgeMeasures, Settings, edge_record, family_of, history, path_edges
from tadistill.advise.twins import differing_keys, pair_up, unused
from tadistill.config import ModelConfig, load
from tadistill.config.key_help import explain
from tadistill.errors import StoreError
from tadistill.plan.arms import make_plan
from tadistill.results import measured
from tadistill.runner.local import ADVICE
from tadistill.store import store_of

SIZES = {"xl": 1200, "l": 400, "s": 100}
METHOD = "minillm (teacher_mixed)"


def stage(runs, key, kind, spec):
    folder = runs / "store" / key[:2] / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"kind": kind, "spec": spec}))
    return folder


def write(runs, study, arms, *, metric="rouge_l", values=None, unfinished=(), seeds=(1, 2), lr=1e-3, sft_lr=1e-3):
    """A study of arms (name, path, flops, compute); an arm's dev value is values[arm] + seed."""
    described = []
    for name, path, flops, compute in arms:
        final = {}
        for seed in seeds:
            start = f"{zlib.crc32(repr((seed, sft_lr)).encode()):016x}"
            key = f"{zlib.crc32(repr((name, path, flops, metric, start, lr)).encode()):016x}"
            final[str(seed)] = key
            if (name, seed) in unfinished:
                continue
            sft = {"seed": seed, "optim": {"lr": sft_lr, "steps": 9}, "student": {"load": "scratch:gpt2", "seed": seed}}
            stage(runs, start, "sft", sft)
            optim = {"lr": lr, "steps": flops, "warmup": flops, "epochs": None, "micro_batch": 4 if len(path) == 2 else None}
            select, taught = {"metric": metric, "every": flops}, {"teacher": {"stage": path[0]}, "student": {"stage": start}}
            taught |= {"over_spans": 3, "teacher_data": {"template": "chat"}} if len(path) == 2 else {}  # the direct teacher's tokenizer
            folder = stage(runs, key, "distill", {"seed": seed, "optim": optim, "select": select, **taught})
            (folder / "manifest.json").write_text(json.dumps({"best_value": (values or {}).get(name, 20.0) + seed, "files": {}}))
        nothing = {"evaluate": {}, "analyse": {}, "also": {}, "published": None}
        described.append(
            {"name": name, "path": path, "method": METHOD, "model": path[-1], "compute": compute, "flops": flops, "final": final, **nothing}
        )
    recipe = {
        "margin": 0.3,
        "evaluate": {"also": {}},
        "models": {name: {"load": f"hub/{name}", "init": None} for name in SIZES},
        "data": {"train": {"load": "dolly"}},
    }
    plan = {
        "study": study,
        "created": "",
        "command": "",
        "recipe_text": "",
        "recipe": recipe,
        "teacher": "xl",
        "stages": [],
        "arms": described,
    }
    folder = runs / study
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan | {"models": {name: {"parameters": n} for name, n in SIZES.items()}}))


ARMS = [
    ("sft", ["s"], 1.0, None),
    ("direct", ["xl", "s"], 10.0, None),
    ("takd", ["xl", "l", "s"], 25.0, None),
    ("twin", ["xl", "s"], 25.0, "as takd"),
]
ARMS = [(name, tuple(path), flops, compute) for name, path, flops, compute in ARMS]


def test_arms_become_observations_and_a_chain_is_paired_with_its_twin(tmp_path):
    write(tmp_path, "one", ARMS, values={"direct": 20.0, "takd": 24.0, "twin": 23.5})
    found = history(tmp_path)
    assert found.left_out == ()
    assert [(o.path, o.seed, o.cost, o.quality) for o in found.on("rouge_l")] == [
        (("xl", "s"), 1, 1.0, 21.0),
        (("xl", "s"), 2, 1.0, 22.0),
        (("xl", "l", "s"), 1, 2.5, 25.0),
        (("xl", "l", "s"), 2, 2.5, 26.0),
        (("xl", "s"), 1, 2.5, 24.5),
        (("xl", "s"), 2, 2.5, 25.5),
    ]
    (pair,) = pair_up(found.observations)
    assert pair.differences == (0.5, 0.5)
    assert pair.direct.measures.size_ratio == 12
    assert [e.measures.size_ratio for e in pair.edges] == [3, 4]
    assert pair.family == "hub/xl (1,200 parameters); dolly; minillm (teacher_mixed)"


def test_a_loss_changes_its_sign(tmp_path):
    write(tmp_path, "one", ARMS, metric="loss", values={"takd": 3.0, "twin": 2.0})
    (pair,) = pair_up(history(tmp_path).on("loss"))
    assert pair.differences == (-1.0, -1.0)


@pytest.mark.parametrize("metric", ["last", "reverse_kl"])
def test_metrics_that_do_not_compare_teachers_are_left_out(tmp_path, metric):
    write(tmp_path, "one", ARMS, metric=metric)
    found = history(tmp_path)
    assert found.observations == ()
    assert len(found.left_out) == 6
    assert f"was selected by `{metric}`" in found.left_out[0]


def test_what_cannot_be_used_is_named(tmp_path):
    write(tmp_path, "one", ARMS, unfinished={("takd", 2)})
    write(tmp_path, "two", [arm for arm in ARMS if arm[0] != "direct"], unfinished={("takd", 2)})
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "plan.json").write_text("{")
    found = history(tmp_path)
    assert len(found.observations) == 5
    assert "one: arm takd, seed 2, is not finished" in found.left_out
    assert any("two: arm takd has an unknown relative cost" in text for text in found.left_out)
    assert any("three" in text and "cannot be read" in text for text in found.left_out)
    with pytest.raises(StoreError, match="not a directory"):
        history(tmp_path / "nowhere")


def test_a_stage_of_two_studies_counts_once(tmp_path):
    write(tmp_path, "one", ARMS)
    write(tmp_path, "two", ARMS)
    assert len(history(tmp_path).observations) == 6


def set_aside(runs, study, key, arm, spread):
    """Move a study's plan to its earlier plans, with a report of one difference."""
    folder = runs / study / "earlier" / key
    folder.mkdir(parents=True)
    (runs / study / "plan.json").rename(folder / "plan.json")
    row = {"arm": arm, "metric": "rouge_l", "against": "direct", "mean": 0.0, "low": -1.96 * spread, "high": 1.96 * spread, "p": 1.0}
    (folder / "results.json").write_text(json.dumps({"comparisons": [row]}))


def test_earlier_plans_of_a_study_are_history(tmp_path):
    """The command "to learn more" about one chain replaces the arms of the one before, which it then proposed again."""
    write(tmp_path, "one", ARMS, values={"takd": 24.0, "twin": 23.5})
    set_aside(tmp_path, "one", "0a", "takd", 2.0)
    other = [("sft", ("s",), 1.0, None), ARMS[1], ("chain", ("xl", "s"), 10.0, "as direct")]
    write(tmp_path, "one", other, unfinished={("chain", 1), ("chain", 2)})
    edges = path_edges(("xl", "l", "s"), SIZES, {("xl", "l"): EdgeMeasures(reverse_kl=0.3, size_ratio=3.0)})
    (tmp_path / "one" / ADVICE).write_text(json.dumps({"edges": [edge_record(e) for e in edges]}))
    found = history(tmp_path)
    (pair,) = pair_up(found.observations)
    assert (pair.path, pair.seeds, pair.differences, pair.edges) == (("xl", "l", "s"), (1, 2), (0.5, 0.5), edges)
    assert pair.reported == pytest.approx(2.0, rel=0.01)
    assert {o.study for o in found.observations} == {"one"}


def test_fewer_seeds_in_the_last_command_lose_no_seed(tmp_path):
    write(tmp_path, "one", ARMS)
    whole = json.loads((tmp_path / "one" / "plan.json").read_text())
    set_aside(tmp_path, "one", "0a", "takd", 1.0)
    for arm in whole["arms"]:
        arm["final"].pop("2")
    (tmp_path / "one" / "plan.json").write_text(json.dumps(whole))
    set_aside(tmp_path, "one", "0b", "takd", 5.0)  # the report of one seed
    (tmp_path / "one" / "plan.json").write_text(json.dumps(whole))
    (pair,) = pair_up(history(tmp_path).observations)
    assert pair.seeds == (1, 2)
    assert pair.reported == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("other", [{"lr": 0.03}, {"sft_lr": 0.03}])
def test_chains_of_other_settings_are_compared_with_baselines_of_their_own(tmp_path, other):
    """A chain was compared with the baseline of another learning rate, and both chains were one with six seeds."""
    write(tmp_path, "one", ARMS, values={"takd": 24.0, "twin": 20.0})
    set_aside(tmp_path, "one", "0a", "takd", 2.0)
    write(tmp_path, "one", ARMS, values={"takd": 11.0, "twin": 10.0}, **other)
    assert sorted((pair.seeds, pair.differences) for pair in pair_up(history(tmp_path).observations)) == [
        ((1, 2), (1.0, 1.0)),
        ((1, 2), (4.0, 4.0)),
    ]


def test_a_study_whose_chain_has_no_baseline_is_named_with_the_setting(tmp_path):
    """Its chain has a learning rate of its own. Nothing said that the study was not used, and why."""
    own, both = [ARMS[1], ARMS[2]], {("direct", 1), ("direct", 2)}
    write(tmp_path, "one", ARMS)
    write(tmp_path, "two", own, unfinished=both, lr=0.03)
    write(tmp_path, "three", own, lr=0.02)
    write(tmp_path, "four", own, unfinished=both, sft_lr=0.03)
    found = history(tmp_path).observations
    fix = "to use it, run direct distillation with the same settings, seeds and compute"
    assert unused(found) == [
        f"Study {study}: xl > l > s is not used, because no finished direct run has its {what}; {fix}."
        for study, what in (("four", "`models.s.sft.optim.lr`"), ("three", "compute"), ("two", "`optim.lr`"))
    ]
    assert len(pair_up(found)) == 1


@pytest.mark.parametrize(
    ("finished", "what"), [((), "models, data, method and metric"), ([("direct", 1)], "seed"), ([("direct", 2)], "compute")]
)
def test_a_study_whose_direct_runs_are_not_finished_does_not_lack_them(tmp_path, finished, what):
    """The note said that no direct run has its seed, and to add direct distillation, which the study had."""
    write(tmp_path, "one", ARMS, unfinished={("takd", 1), *((arm, seed) for arm in ("direct", "twin") for seed in (1, 2))} - {*finished})
    assert unused(history(tmp_path).observations) == [
        f"Study one: xl > l > s is not used, because no finished direct run has its {what}; to use it, run direct distillation with the "
        "same settings, seeds and compute."
    ]


def test_a_chain_that_is_not_used_is_named_beside_one_of_the_same_path(tmp_path):
    write(tmp_path, "one", [*ARMS, ("again", ("xl", "l", "s"), 100.0, None)])
    found = history(tmp_path).observations
    (said,) = unused(found)
    assert (
        "one: xl > l > s with 10 times the compute of direct distillation is not used, because no finished direct run has its compute;"
        in said
    )
    assert len(pair_up(found)) == 1


def test_many_studies_that_are_not_used_are_counted(tmp_path):
    for i in range(5):
        write(tmp_path, f"s{i}", [ARMS[1], ARMS[2]], unfinished={("direct", 1), ("direct", 2)}, lr=0.01 + i)
    first, *_, last = said = unused(history(tmp_path).observations)
    assert first.startswith("Study s0: xl > l > s is not used")
    assert (len(said), last) == (4, "2 other studies have chains that are not used for such reasons.")


def test_many_chains_that_are_not_used_are_counted(tmp_path, monkeypatch):
    """40 of them gave a sentence of 2,673 characters."""
    for i in range(40):
        monkeypatch.setitem(SIZES, f"a{i}", 400 - i)
    write(tmp_path, "one", [ARMS[1], *((f"c{i}", ("xl", f"a{i}", "s"), 20.0 + i, None) for i in range(40))], seeds=(1,))
    assert unused(history(tmp_path).observations) == [
        "Study one: xl > a0 > s, xl > a1 > s, xl > a2 > s and 37 other chains are not used, because no finished direct run has their "
        "compute; to use them, run direct distillation with the same settings, seeds and compute."
    ]


ACROSS = """
study: across
seeds: [1]
models:
  xl: {load: "scratch:gpt2", tokenizer: tinyworld-bpe, config: {n_embd: 32, n_layer: 2, n_head: 2, n_positions: 256}}
  l: {load: "scratch:gpt2", tokenizer: tinyworld, config: {n_embd: 16, n_layer: 2, n_head: 2, n_positions: 256}}
  s: {load: "scratch:gpt2", tokenizer: tinyworld, config: {n_embd: 8, n_layer: 1, n_head: 2, n_positions: 256}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, world: {people: 20}, limit: {train: 20, dev: 2, test: 2}}
evaluate: {max_new_tokens: 8}
analyse: false
method: {sampler: {type: student, max_new_tokens: 8}, optim: {steps: 4, batch: 4}}
arms: {direct: xl > s, takd: xl > l > s, twin: {path: xl > s, compute: as takd}}
"""
CONTEXT = "context={template: '{output} {prompt}'}"
MINILLM = "method.objective={type: minillm, pt_weight: 0}"


def planned(folder, settings):
    """The settings of each arm of ACROSS with these settings."""
    recipe, store = folder / "r.yaml", store_of(folder)
    recipe.write_text(ACROSS)
    plan = make_plan(load(recipe, settings))
    for key, each in plan.stages.items():
        stage(folder, key, each.kind, each.spec.content())
    return {arm.name: next(Settings.read(store, key, 4) for key in arm.final.values()) for arm in plan.arms}


@pytest.mark.parametrize(
    ("settings", "differ"),
    [
        ([MINILLM], []),
        ([MINILLM, f"method.{CONTEXT}"], []),
        (["method.objective={type: reverse_kl}", f"method.{CONTEXT}"], []),
        (["method.objective={type: cross_entropy}", "method.sampler={type: teacher}", f"method.{CONTEXT}"], []),
        ([MINILLM, "arms.takd.objective={type: minillm, clip: 0.5}"], ["objective.clip"]),
        ([MINILLM, f"arms.takd.{CONTEXT}"], ["context"]),
        ([MINILLM, "arms.takd.optim={lr: 0.01}"], ["optim.lr"]),
    ],
)
def test_a_chain_and_its_baseline_across_tokenizers_have_the_settings_of_their_recipe(tmp_path, settings, differ):
    """The plan of a direct run over spans has another objective and another place for the context, so no such pair was history."""
    found = planned(tmp_path, settings)
    chain, twin = found["takd"], found["twin"]
    assert differing_keys(chain, twin) == differing_keys(twin, chain) == differ


def test_the_settings_of_each_stage_are_read_once(tmp_path, monkeypatch):
    """They were read again for the settings over spans."""
    read = []
    monkeypatch.setattr("tadistill.results.measured._stage", lambda *given, real=measured._stage: read.append(given[1]) or real(*given))
    arms = planned(tmp_path, [MINILLM, "models.s.sft={optim: {steps: 3}}"])
    assert len(read) == 2 * len(arms)  # the distillation, and the fine-tuning of its student
    assert [name for name, found in arms.items() if found.own != found.spans] == ["takd"]  # the others have them already


SFT = "models.s.sft={optim: {steps: 3}}"
OF_OTHER = (SFT, "models.s.load=null", "models.s.config={}", "models.s.tokenizer=null")
DEPTH, WIDTH = (*OF_OTHER, "models.s.init={from: l, layers: 1}"), (*OF_OTHER, "models.s.init={from: l, hidden: 8, heads: 1}")
PHASES = "method.phases=[{sampler: {type: dataset}, optim: {lr: 0.01}, share: 0.5}, {share: 0.5}]"


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (SFT, "data.max_length=60", ["data.max_length"]),
        (SFT, "data.world.people=21", ["data.world.people"]),
        (SFT, "evaluate.batch=7", ["evaluate.batch"]),
        (SFT, "models.s.config.n_head=1", ["models.STUDENT.config"]),
        (SFT, "models.s.sft.optim.steps=4", ["models.STUDENT.sft.optim.steps"]),
        (SFT, "models.s.sft.select.metric=rouge_l", ["models.STUDENT.sft.select.metric"]),
        (SFT, "models.s.sft=null", ["models.STUDENT.sft"]),
        (SFT, "models.s.lora={r: 2}", ["models.STUDENT.lora"]),
        (SFT, "method.select.metric=rouge_l", ["select.metric"]),
        (SFT, PHASES, ["phases"]),
        (PHASES, PHASES.replace("0.01", "0.02"), ["optim.lr"]),
        (DEPTH, "models.s.init.layers=[1]", ["models.STUDENT.init"]),
        (DEPTH, "models.l.sft={optim: {steps: 5}}", ["models.STUDENT.init"]),
        (WIDTH, "data.max_length=60", ["data.max_length"]),
        (WIDTH, "models.s.init.intermediate=10", ["models.STUDENT.init"]),
        (WIDTH, "models.s.init={from: l, layers: 1}", ["models.STUDENT.init"]),
    ],
)
def test_settings_that_differ_are_named_once_by_keys_of_a_recipe(tmp_path, one, other, differ):
    """Below the student's fine-tuning, `data.max_length` was also `models.STUDENT.sft.data.max_length`, which no recipe has."""
    first = [one] if isinstance(one, str) else one
    found, others = planned(tmp_path, first)["direct"], planned(tmp_path, [*first, other])["direct"]
    assert differing_keys(found, others) == differ
    assert sorted(differing_keys(others, found)) == differ
    assert all(explain(key.replace("STUDENT", "s")) for key in differ)


def test_studies_with_equal_settings_are_compared_whatever_their_names_and_seeds(tmp_path):
    write(tmp_path, "one", [ARMS[1], ARMS[3]], values={"twin": 20.0}, seeds=(1, 2, 3))
    write(tmp_path, "two", [ARMS[1], ARMS[2]], values={"takd": 24.0}, seeds=(3, 2))
    (pair,) = pair_up(history(tmp_path).observations)
    assert (pair.seeds, pair.differences) == ((3, 2), (4.0, 4.0))


def test_a_seed_counts_once_in_a_pair(tmp_path):
    """For example if a new version of a kind of stage trains the same seeds again."""
    write(tmp_path, "one", ARMS, values={"takd": 24.0})
    found = history(tmp_path).observations
    again = [replace(o, quality=o.quality + 1) for o in found]
    assert pair_up([*found, *again]) == pair_up(found)


def test_measures_of_other_models_with_the_same_names_are_not_used():
    (edge,) = path_edges(("xl", "l"), SIZES, {("xl", "l"): EdgeMeasures(reverse_kl=0.3, size_ratio=2.0)})
    assert edge.measures == EdgeMeasures(size_ratio=3.0)


def test_measures_of_a_study_are_read_back(tmp_path):
    write(tmp_path, "one", ARMS)
    measured = {("xl", "l"): EdgeMeasures(reverse_kl=0.3, overlap=0.7, size_ratio=3.0)}
    edges = path_edges(("xl", "l", "s"), SIZES, measured)
    (tmp_path / "one" / ADVICE).write_text(json.dumps({"edges": [edge_record(e) for e in edges]}))
    chain = next(o for o in history(tmp_path).observations if len(o.path) == 3)
    assert chain.edges == edges
    assert chain.edges[0].measures.reverse_kl == 0.3
    assert chain.edges[1].measures == EdgeMeasures(size_ratio=4.0)
    (tmp_path / "one" / ADVICE).write_text(json.dumps({"edges": [{"teacher": "xl"}]}))
    assert "is damaged" in history(tmp_path).left_out[0]


def test_families_of_models_that_are_made_of_others():
    """A checkpoint, a tempered and a pruned model are other teachers than their source, whatever a recipe calls them."""
    made = {
        "big": {"load": "hub/big"},
        "other": {"load": "hub/other"},
        "early": {"checkpoint": {"of": "big", "step": 200}},
        "soft": {"temper": {"of": "big", "tau": 0.8}},
        "alike": {"temper": {"of": "other", "like": "ta"}},
        "thin": {"init": {"from": "big", "layers": 6}},
        "thin early": {"init": {"from": "early", "layers": 6}},
    }
    models = {name: ModelConfig.model_validate(model) for name, model in made.items()}
    found = {name: family_of(models, dict.fromkeys(models, 1000), name, "dolly", METHOD) for name in models}
    assert len(set(found.values())) == len(made)
    assert not any("None" in family for family in found.values())
    assert found["early"] == f"hub/big after 200 updates (1,000 parameters); dolly; {METHOD}"
    assert found["soft"].startswith("hub/big tempered by 0.8 (")
    assert found["alike"].startswith("hub/other tempered like ta (")
    assert found["thin early"].startswith("hub/big after 200 updates pruned (")


def test_a_plan_whose_models_cannot_be_read_is_left_out(tmp_path):
    write(tmp_path, "one", ARMS)
    path = tmp_path / "one" / "plan.json"
    path.write_text(path.read_text().replace('"hub/xl"', "null"))
    (said,) = history(tmp_path).left_out
    assert said == f"the models in {path} cannot be read (1 problem); run `tadistill run RECIPE` to write it again"


@pytest.mark.parametrize(("good", "bad"), [('"hub/xl"', "null"), ('"created"', '"x"'), ("{", "")])
def test_an_earlier_plan_that_cannot_be_read_is_named_and_not_written_again(tmp_path, good, bad):
    """The advice was to run the recipe, which writes only the last plan."""
    write(tmp_path, "one", ARMS)
    set_aside(tmp_path, "one", "0a", "takd", 1.0)
    write(tmp_path, "one", ARMS)
    earlier = tmp_path / "one" / "earlier" / "0a"
    (earlier / "plan.json").write_text((earlier / "plan.json").read_text().replace(good, bad, 1))
    found = history(tmp_path)
    (said,) = found.left_out
    assert str(earlier / "plan.json") in said
    assert said.endswith(f"no command writes an earlier plan again, so restore this file, or delete {earlier}")
    assert len(found.observations) == 6
