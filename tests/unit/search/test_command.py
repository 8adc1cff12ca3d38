"""`tadistill search`: mistakes before any work, rounds that share the store, resuming, and the recipe that confirms the choice."""

import io
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tests.e2e.inprocess import run_here

from tadistill.config import load, validate
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.runner.run_study import run_study
from tadistill.search import command as module
from tadistill.search.choice import write_choice
from tadistill.search.command import affordable, find_path, path_arms, path_flops
from tadistill.store import Store
from tadistill.terminal import Terminal

pytestmark = pytest.mark.slow

GPT2 = {"n_layer": 1, "n_head": 2, "n_positions": 128}


def model(width: int, steps: int = 8, **more) -> dict:
    sft = {"optim": {"steps": steps, "lr": 3e-3}, "select": {"metric": "last"}}
    return {"load": "scratch:gpt2", "tokenizer": "tinyworld", "config": GPT2 | {"n_embd": width}, "sft": sft, **more}


def recipe(strategy: str = "best_prefix", select: str = "loss", **changes):
    """Teacher t, assistants a and b, student s: 4 paths, 7 trainings, of which best_prefix needs 6."""
    found = {
        "study": "lattice",
        "seeds": [1, 2],
        "models": {"t": model(32, seed=1), "a": model(24), "b": model(16), "s": model(8)},
        "data": {
            "train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain", "max_length": 64,
            "world": {"people": 20}, "limit": {"train": 200, "dev": 12, "test": 4},
        },
        "method": {
            "objective": {"type": "forward_kl"},
            "optim": {"steps": 8, "batch": 16, "lr": 3e-3},
            "select": {"metric": select, "every": 4},
        },
        "evaluate": {"seeds": [1], "max_new_tokens": 8, "also": {}},
        "search": {"teacher": "t", "assistants": ["a", "b"], "student": "s", "strategy": strategy, **changes.pop("search", {})},
    }  # fmt: skip
    return validate(found | changes)


def find(runs: Path, *args, **more):
    console = Terminal(width=140, record=True, file=io.StringIO())
    return find_path(recipe(*args, **more), runs=runs, console=console), console.export_text()


def manifests(runs: Path) -> dict[str, str]:
    """Key -> kind of every finished stage."""
    found = [json.loads(path.read_text()) for path in runs.glob("store/*/*/manifest.json")]
    return {m["key"]: m["kind"] for m in found}


@pytest.fixture(scope="module", autouse=True)
def _without_workers():
    """Run stages one by one in this process: starting workers would take most of the time (tests/e2e has a search with workers)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_stages", partial(run_here, alarm=pytest.fail))
        patch.setattr("tadistill.runner.schedule.prepared", nullcontext)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    choice, text = find(runs)
    return runs, choice, text, manifests(runs)


def test_best_prefix_trains_what_it_must_and_nothing_else(finished):
    _, choice, _, done = finished
    # fine-tuning: t once, a, b and s per seed; (n + 1)(n + 2) / 2 = 6 distillations per seed, and no stage that looks at the test set
    assert Counter(done.values()) == {"sft": 7, "distill": 12}
    assert choice.distillations == 12
    assert [len(r.paths) for r, _ in choice.rounds] == [3, 2, 1]


def test_the_choice_is_the_best_mean_of_the_manifests(finished):
    runs, choice, _, _ = finished
    record = json.loads((runs / "lattice" / "search.json").read_text())
    assert [len(t["path"]) for t in record["paths"]] == [len(t.path) for t in choice.tried]
    store, r = Store(runs / "store"), recipe()
    arms = {">".join(t.path): " > ".join(t.path) for t in choice.tried}
    plan = make_plan(r.model_copy(update={"arms": recipe(arms=arms).arms, "search": None}))
    means = {}
    for arm, tried in zip(plan.arms, choice.tried, strict=True):
        values = [store.manifest(key)["best_value"] for key in arm.final.values() if key]
        assert tried.values == tuple(values)
        assert tried.flops == arm.flops
        means[tried.path] = sum(values) / 2
    assert choice.path == min(means, key=means.__getitem__)  # a loss
    assert record["chosen"] == list(choice.path)
    assert record["higher_is_better"] is False


def test_c_search_counts_every_stage_once(finished):
    _, choice, text, _ = finished
    paths = {path for round_, _ in choice.rounds for path in round_.paths}
    plan = make_plan(recipe(arms={">".join(p): " > ".join(p) for p in paths}))
    flops = [s.flops for s in plan.stages.values() if s.kind in ("sft", "distill")]
    assert choice.trained == pytest.approx(sum(f for f in flops if f))
    used = {k for k, s in plan.stages.items() if ">".join(choice.path) in s.arms and s.kind in ("sft", "distill")}
    assert choice.discarded == pytest.approx(
        sum(s.flops or 0 for k, s in plan.stages.items() if s.kind in ("sft", "distill") and k not in used)
    )
    assert "The search cost (C_search) is" in text
    assert "It pays for 12 distillations" in text
    assert "too optimistic, because it is the best of" in text


def test_a_second_run_trains_nothing_and_writes_the_same(finished, monkeypatch):
    runs, choice, _, done = finished
    before = (runs / "lattice" / "search.json").read_bytes()
    monkeypatch.setattr(module, "run_stages", lambda *_, **__: pytest.fail("something was trained"))
    again, text = find(runs)
    assert again == choice
    assert manifests(runs) == done
    assert (runs / "lattice" / "search.json").read_bytes() == before
    assert text.count(" 0 to run") == 3


def test_exhaustive_afterwards_trains_only_what_is_new(finished):
    runs, _, _, done = finished
    choice, _ = find(runs, "exhaustive")
    # the seventh training, of each seed: the student of the path through both assistants, or of the prefix that was not kept
    assert Counter(kind for key, kind in manifests(runs).items() if key not in done) == {"distill": 2}
    assert len(choice.tried) == 4
    find(runs, "single")  # 2n + 1 = 5 trainings, all there
    assert len(manifests(runs)) == len(done) + 2


def test_a_stopped_search_goes_on_to_the_same_choice(finished, tmp_path, monkeypatch):
    _, choice, _, done = finished
    calls = []

    def stop_in_round_two(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run_here(*args, **kwargs)

    monkeypatch.setattr(module, "run_stages", stop_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        find(tmp_path)
    first = manifests(tmp_path)
    assert Counter(first.values())["distill"] == 6
    kept = []

    def resumed(plan, store, *, needs, **options):
        kept.append({*needs, *plan.stages})
        run_here(plan, store, needs=needs, **options)

    monkeypatch.setattr(module, "run_stages", resumed)
    again, _ = find(tmp_path)
    assert set(first) <= kept[0]  # round 1 has nothing to run, but `tadistill clean` must keep its stages while round 2 runs
    assert kept[-1] == set(done)
    assert manifests(tmp_path) == done
    assert set(first) < set(done)
    assert (again.path, again.tried) == (choice.path, choice.tried)


def test_halving_runs_short_versions_of_every_stage(tmp_path):
    choice, _ = find(tmp_path, "halving", search={"rungs": [0.5, 1.0]}, seeds=[1])
    steps = Counter(json.loads(p.read_text())["steps"] for p in tmp_path.glob("store/*/*/manifest.json") if '"distill"' in p.read_text())
    assert steps[4] == 7
    assert [(r.share, len(r.paths)) for r, _ in choice.rounds] == [(0.5, 4), (1.0, 2)]
    assert choice.distillations == sum(steps.values())
    assert choice.inflation() is None
    assert (len(choice.tried), choice.compared) == (2, 4)


def test_the_confirmation_is_a_recipe_with_the_twin_on_new_seeds(tmp_path, finished):
    _, choice, _, _ = finished
    chain = next(t for t in choice.tried if len(t.path) == 3)
    chosen = replace(choice, tried=(chain, *(t for t in choice.tried if t != chain)))
    path = write_choice(chosen, recipe(), tmp_path)
    assert path is not None
    confirm = load(path)
    assert confirm.seeds == (3, 4, 5)
    assert confirm.study == "lattice-confirm"
    assert set(confirm.models) == set(chain.path)
    assert confirm.search is None
    assert confirm.method == recipe().method
    plan = {arm.name: arm for arm in make_plan(confirm).arms}
    assert list(plan) == ["direct", "chain", "twin"]
    assert plan["chain"].arm.last == chain.path
    assert plan["chain"].flops == chain.flops
    assert plan["twin"].flops == pytest.approx(chain.flops, rel=0.1)
    direct = replace(choice, tried=tuple(sorted(choice.tried, key=lambda t: len(t.path))))
    assert write_choice(direct, recipe(), tmp_path) is None
    assert not path.exists()


def test_a_budget_limits_what_is_tried():
    r = recipe()
    assert r.search
    flops = path_flops(r, r.search)
    direct = flops[("t", "s")]
    assert direct
    multiples = {path: (cost or 0) / direct for path, cost in flops.items()}
    assert multiples[("t", "a", "b", "s")] > multiples[("t", "a", "s")] > multiples[("t", "b", "s")] > 1
    limited = recipe(search={"budget": multiples[("t", "b", "s")] + 1e-9}).search
    assert limited
    assert affordable(limited, flops).paths == (("t", "s"), ("t", "b", "s"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"budget": 0.5}}, ["search.budget is 0.5", "the cheapest allowed path, t > s, costs 1.00 ×", "raise `search.budget`"]),
        ({"search": {"assistants": ["b", "a"]}}, ["a (", "comes after b (", "ordered from big to small"]),
        ({"select": "last"}, ["is selected by `last`", "set `select.metric` to `loss`"]),
        ({"select": "reverse_kl"}, ["is selected by `reverse_kl`", "which differs from path to path"]),
        ({"search": {"student": "t"}}, ["`search` names the model t twice"]),
        ({"search": {"student": "q"}}, ["`search` names `q`, which is not a model"]),
        ({"search": {"rungs": [1.0]}, "strategy": "halving"}, ["at least two rungs"]),
        (
            {"models": {n: model(16) for n in "tsabcdefghi"}, "search": {"assistants": list("abcdefghi")}},
            ["9 assistants make 512 paths", "lower `search.max_assistants`"],
        ),
        ({"models": {"t": model(32), "a": model(24), "s": model(8), "b": {"temper": {"of": "a", "like": "x"}}}, "arms": {"x": "t > s"}},
         ["b takes its temperature from arm x", "set its `temper.tau`"]),
    ],
)  # fmt: skip
def test_mistakes_cost_one_sentence_and_no_work(changes, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        find(tmp_path, **changes)
    for part in words:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*"))


def test_a_recipe_has_arms_or_a_search(tmp_path):
    with pytest.raises(ConfigError, match=r"no `arms` and no `search`"):
        validate(recipe().model_dump(by_alias=True, exclude_unset=True, exclude={"search"}))
    with pytest.raises(ConfigError, match="has no arms"):
        run_study(recipe(), runs=tmp_path)
    only_arms = recipe(arms={"x": "t > s"}).model_copy(update={"search": None})
    with pytest.raises(ConfigError, match="has no `search`"):
        find_path(only_arms, runs=tmp_path, console=Terminal(quiet=True))


def test_paths_of_one_name_are_refused_and_names_go_into_overrides():
    assert list(path_arms([("t", "s"), ("t", "a", "s")])) == ["t-s", "t-a-s"]
    with pytest.raises(ConfigError, match="t > a-b > s and t > a > b-s both have the name t-a-b-s"):
        path_arms([("t", "a-b", "s"), ("t", "a", "b-s")])
