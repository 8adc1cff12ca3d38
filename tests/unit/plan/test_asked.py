"""Teachers behind an API in recipes and plans: what is asked, what it costs, and one sentence for everything that needs more than text."""

import io
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from tests.unit.judge.fake import as_json, error, serve

from tadistill.config import validate
from tadistill.config.common import Decoding
from tadistill.config.recipe import Search
from tadistill.config.remote import Api
from tadistill.data import datasets
from tadistill.data.prompts import messages
from tadistill.errors import ConfigError, Interrupted, ModelError
from tadistill.models.chat_api import Reply
from tadistill.models.chat_api_replies import open_cache
from tadistill.plan.arms import make_plan
from tadistill.plan.kinds import AskSpec, RetokeniseSpec
from tadistill.plan.notes import approximations
from tadistill.plan.remote import asked_notes, check_asked, wanted_of
from tadistill.plan.task import name_of
from tadistill.plan.throughput import wall_clock
from tadistill.rollout.api_teacher import replies_file
from tadistill.runner.remote import announced, examined
from tadistill.runner.run_study import describe
from tadistill.search.command import find_path
from tadistill.store import Store
from tadistill.terminal import Terminal

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
HERE = {"load": "scratch:llama", "tokenizer": "tinyworld"}
API = {"at": "https://host/v1", "model": "big", "key": "A_KEY", "price": {"input": 2, "output": 8}}


def recipe(arms=None, api=None, **changes):
    models = {
        "api": {"api": api or API},
        "l": HERE | {"config": SHAPE | {"num_hidden_layers": 2}},
        "s": HERE | {"config": SHAPE},
    } | changes.pop("models", {})
    data = {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "limit": {"train": 20, "dev": 4, "test": 4}}
    method = {"optim": {"steps": 2, "batch": 4}, "select": {"metric": "last"}}
    given = changes.pop("method", {"name": "seqkd", "sampler": {"max_new_tokens": 32}})
    method |= {"name": given} if isinstance(given, str) else given
    plain = {"study": "x", "seeds": [1, 2], "models": models, "data": data, "method": method, "arms": arms or {"direct": "api > s"}}
    return validate(plain | changes)


def of_kind(plan, kind) -> Any:
    return [stage for stage in plan.stages.values() if isinstance(stage.spec, kind)]


def rows_of(plan):
    (ref,) = plan.recipe.data.sets.values()
    return datasets.load(ref, "train", plan.recipe.data)


def keys(**changes):
    return {stage.key for stage in make_plan(recipe(**changes)).stages.values()}


def test_the_answers_are_asked_once_for_all_students_and_arms():
    plan = make_plan(recipe({"direct": "api > s", "chain": "api > l > s", "longer": {"path": "api > s", "optim": {"steps": 4}}}))
    asked, read = of_kind(plan, AskSpec), of_kind(plan, RetokeniseSpec)
    assert [(stage.seed, stage.label) for stage in asked] == [(1, "ask api, seed 1"), (2, "ask api, seed 2")]
    assert {stage.model for stage in read} == {"s"}  # `l` has the same tokenizer
    assert {stage.parents["answers"] for stage in read} == {stage.key for stage in asked}
    assert all(stage.spec.writer is None and stage.spec.asked is None for stage in read)
    assert name_of(plan, asked[0].spec.teacher) == "api"
    assert not any(arm.analyse for arm in plan.arms)


def test_only_what_changes_the_answers_changes_the_key():
    plain = keys()
    for same in ({"at": "http://other:1/v1"}, {"price": None}, {"requests": 1}, {"seconds": 3}, {"key": None}, {"omit": ["seed"]}):
        assert keys(api=API | same) == plain
    assert not keys(api=API | {"model": "other"}) & plain
    (spec, _) = (stage.spec for stage in of_kind(make_plan(recipe()), AskSpec))
    assert spec.content()["teacher"] == {"asks": "big"}
    assert "A_KEY" not in str(spec.content())


def test_one_set_of_answers_without_randomness_or_with_a_seed_of_its_own():
    greedy = make_plan(recipe(method={"name": "seqkd", "sampler": {"temperature": 0}}))
    fixed = make_plan(recipe(models={"api": {"api": API, "seed": 7}}))
    assert [stage.spec.seed for stage in of_kind(greedy, AskSpec)] == [None]
    assert [stage.spec.seed for stage in of_kind(fixed, AskSpec)] == [7]
    assert len([stage for stage in fixed.stages.values() if stage.kind == "distill"]) == 2


def test_the_plan_says_what_is_asked_and_that_flops_are_unknown(tmp_path):
    plan, store = make_plan(recipe()), Store(tmp_path)
    (first,) = asked_notes(plan, store)
    (flops,) = approximations(plan, "direct")
    texts = rows_of(plan)
    tokens = 2 * sum(len(messages(example, None)[0]["content"]) // 4 for example in texts)
    assert f"api (big at https://host/v1) writes text. At most 40 requests for 2 sets of answers: about {tokens:,} tokens" in first
    assert "(at most 1,280), which cost about " in first
    assert "with the longest answers)" in first
    assert "set `models.api.seed` to use one set of answers for all seeds" in first
    assert "teacher FLOPs unknown: api is behind an API" in flops
    for stage in of_kind(plan, AskSpec):
        store.finish(stage.key, {"key": stage.key}) if store.begin(stage.key, {}) else None
    assert "All its answers are in the store" in next(iter(asked_notes(plan, store)))
    (asked, *_) = of_kind(plan, AskSpec)
    assert asked.cost.elsewhere
    assert plan.arms[0].flops == sum(stage.flops or 0 for stage in plan.stages.values() if stage.kind == "distill" and stage.seed == 1)


def test_a_cold_start_from_an_api_goes_on_with_another_teacher():
    cold = {"path": "api > c then l > s", "init": {"s": "c"}}
    models = {"c": HERE | {"config": SHAPE, "distill": {"name": "seqkd"}}}
    plan = make_plan(recipe({"cold": cold}, method={"name": "on-policy-rkl"}, models=models, teacher="l"))
    found = {stage.kind: stage for stage in plan.stages.values() if stage.seed == 1 and "api" in (stage.model, *stage.teachers)}
    (last,) = (stage for stage in plan.stages.values() if stage.seed == 1 and stage.model == "s" and stage.kind == "distill")
    assert found["ask"].key in plan.stages[found["distill"].parents["responses"]].parents.values()
    assert last.parents == {"student": found["distill"].key}
    spec: Any = last.spec
    assert spec.method.objective.type == "reverse_kl"
    assert plan.arms[0].analyse


def test_equal_compute_counts_what_is_known():
    plan = make_plan(recipe({"chain": "api > l > s", "direct": {"path": "api > s", "compute": "as chain"}}))
    chain, direct = plan.arms
    assert chain.flops == sum(
        s.flops or 0.0 for s in plan.stages.values() if s.seed == 1 and "chain" in s.arms and s.kind in ("distill", "generate")
    )
    assert direct.flops == pytest.approx(chain.flops, rel=0.2)
    assert describe(plan, created="", recipe_text="", command="")["models"]["api"] == {"parameters": 0}
    assert wall_clock(plan.stages, {}, 2) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gkd"}, r"arms\.direct: objective `.*` needs the teacher's probabilities, but models\.api is.*`method: seqkd`"),
        ({"method": {"name": "minillm", "objective": {"type": "minillm", "pt_weight": 0}}}, "needs the teacher's probabilities"),
        ({"method": "distillm-2"}, "gives text only"),
        ({"method": {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset", "signal": {"type": "top_k"}}}}, "gives text only"),
        ({"method": {"name": "seqkd", "select": {"metric": "reverse_kl"}}}, "use `loss` or `rouge_l`"),
        ({"method": {"name": "seqkd", "phases": ["seqkd", "gkd"]}}, "needs the teacher's probabilities"),
        ({"method": {"name": "seqkd", "sampler": {"top_k": 5}}}, "chat completions do not have this setting; remove `top_k`"),
        ({"method": {"name": "seqkd", "sampler": {"no_repeat_ngram": 6}}}, "remove `no_repeat_ngram`"),
        ({"method": {"name": "seqkd", "sampler": {"engine": "vllm"}}}, "remove `engine`"),
        ({"method": {"name": "seqkd", "sampler": {"temperature": 3}}}, "accepts at most 2"),
        ({"api": API | {"omit": ["top_p"]}, "method": {"name": "seqkd", "sampler": {"top_p": 0.9}}}, "set `top_p` to 1, or change `omit`"),
        ({"method": {"name": "seqkd", "context": "{prompt} Think."}}, r"context has `\{prompt\}`.*use `\{instruction\}`"),
        ({"method": {"name": "seqkd", "context": {"template": "{input}", "chat": False}}}, "context has `chat: false`"),
        ({"arms": {"only": "api", "direct": "api > s"}}, "measures `api`, which is behind an API"),
        ({"arms": {"direct": "s > api"}}, "trains `api`, which is behind an API"),
        ({"arms": {"direct": {"path": "api > s", "init": {"s": "api"}}}}, "starts from `api`"),
        ({"arms": {"direct": "api > s", "c": {"path": "api > s", "control": "random_teacher of direct"}}}, "cannot be changed"),
        ({"models": {"m": {"init": {"from": "api", "layers": 1}}}}, "is made from `api`, which is behind an API"),
        ({"models": {"api": {"api": API, "sft": {}}}}, "`sft` has no effect"),
        ({"models": {"api": {"api": API, "load": "gpt2"}}}, "exactly one of"),
        ({"models": {"api": {"load": "api://host/v1"}}}, r"write `api: \{at: https://host/v1, model: NAME, key: VARIABLE\}`"),
        ({"api": API | {"at": "host/v1"}}, "write an address of the form https://HOST/v1"),
        ({"api": API | {"at": "https://me:secret@host/v1"}}, "put the key into an environment variable"),
        ({"api": API | {"key": "sk-123"}}, "key"),
        ({"api": "https://host/v1"}, "write `api: {at: https://HOST/v1"),
    ],
)  # fmt: skip
def test_what_needs_more_than_text_is_refused(changes, message):
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        make_plan(recipe(**changes))
    assert "secret" not in str(caught.value)


def test_a_search_and_rows_with_tools_are_refused():
    with pytest.raises(ConfigError, match="names `api`, which is behind an API"):
        recipe(search={"teacher": "api", "assistants": ["l"], "student": "s"})
    data = {"train": {"load": "tinyworld", "columns": {"tools": "tools"}}, "dev": "tinyworld", "test": ["tinyworld"]}
    with pytest.raises(ConfigError, match="remove `tools`"):
        make_plan(recipe(data=data))


def test_several_training_sets_are_refused():
    sets = {"a": {"load": "tinyworld", "weight": 1}, "b": {"load": "tinyworld", "weight": 2}}
    data = {"train": sets, "dev": "tinyworld", "test": ["tinyworld"], "limit": {"train": 20}}
    with pytest.raises(ConfigError, match="is behind an API, so there can be only one training set"):
        make_plan(recipe(data=data))


def test_the_api_reads_messages_of_the_context():
    plan = make_plan(recipe(method={"name": "seqkd", "context": {"system": "Be brief.", "template": "{instruction}!"}}))
    (stage, _) = of_kind(plan, AskSpec)
    examples = rows_of(plan)
    wanted = wanted_of(stage.spec, examples)
    first = examples[0].instruction
    assert wanted[0].body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{first}!"}]
    assert (wanted[0].row, wanted[0].line, len(wanted)) == (1, None, 20)
    assert wanted_of(stage.spec, [replace(examples[0], line=7)])[0].line == 7


def test_before_a_run_only_missing_answers_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "k")
    with serve(lambda number, text: error(500, "not asked")) as fake:
        plan, store = make_plan(recipe(api=API | {"at": fake.url})), Store(tmp_path)
        stages = of_kind(plan, AskSpec)
        examples = rows_of(plan)
        wanted = wanted_of(stages[0].spec, examples)
        with open_cache(replies_file(tmp_path, "big")) as cache:
            for request in wanted[:15]:
                cache.put(request.key, Reply("a", 1, 1))
        (sentence,) = announced(plan, store, stages)
        assert f"api (big): 15 of 40 answers are in the store; 25 requests will be sent to {fake.url}: about " in sentence
        fake.models = as_json({"data": [{"id": "big"}]})
        assert [*examined(plan.recipe)] == [
            ("teacher api", "ok", f"{fake.url} accepts the key and lists big; an API gives text, but no probabilities", "")
        ]
        fake.models = as_json({"data": [{"id": "small"}]})
        assert [row[1] for row in examined(plan.recipe)] == ["warning"]
        fake.models = error(401, "no")
        assert [row[1:3] for row in examined(plan.recipe)] == [
            ("problem", f"models.api: the API {fake.url} failed: it does not accept the key in A_KEY (401)")
        ]
        assert fake.asked == []
    with pytest.raises(ConfigError, match="run `tadistill fetch RECIPE --answers`"):
        check_asked(plan, store)


def test_the_settings_of_a_request_are_those_of_the_sampler():
    plan = make_plan(recipe(method={"name": "seqkd", "sampler": {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 9}}))
    (stage, _) = of_kind(plan, AskSpec)
    assert stage.spec.sampler == Decoding(temperature=0.5, top_p=0.9, max_new_tokens=9)
    assert stage.spec.teacher.api == Api.model_validate(API)


def test_a_teacher_budget_counts_the_tokens_that_are_asked():
    half = {"path": "api > s", "sampler": {"type": "teacher", "max_new_tokens": 2}}
    plan = make_plan(recipe({"short": half, "direct": {"path": "api > s", "teacher_budget": "as short"}}))
    short, direct = (arm.asked or 0.0 for arm in plan.arms)
    limits = {arm: stage.spec.train.limit for stage in of_kind(plan, AskSpec) for arm in stage.arms}
    assert limits == {"short": 20, "direct": round(20 * short / (direct / 4 * 20))}
    assert direct == pytest.approx(short, abs=direct / 4)  # less than one row


def test_a_search_says_what_it_costs_before_it_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "k")
    monkeypatch.setattr("tadistill.runner.schedule.prepared", nullcontext)
    monkeypatch.setattr("tadistill.runner.preflight.check_study", lambda *_, **__: 1)
    monkeypatch.setattr("tadistill.search.command.run_stages", Mock(side_effect=Interrupted))
    console = Terminal(file=(said := io.StringIO()))
    method = {"name": "seqkd", "sampler": {"max_new_tokens": 32}, "select": {"metric": "loss"}}
    with serve(lambda number, text: error(500, "not asked")) as fake:
        wanted = {"arms": {}, "search": Search(teacher="api", assistants=("l",), student="s")}
        of = recipe(api=API | {"at": fake.url}, method=method).model_copy(update=wanted)
        with pytest.raises(Interrupted):
            find_path(of, runs=tmp_path, console=console)
    assert f"api (big): 0 of 40 answers are in the store; 40 requests will be sent to {fake.url}: about " in said.getvalue()
