"""The rule of tokenizers holds per edge: what compares tokens stays in a family of models, and text passes between families."""

import json

import pytest
from tests.byte_models import bpe_tokenizer, byte_tokenizer

from tadistill.config import Method, validate
from tadistill.config.method_rules import over_spans
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan, plan_probes
from tadistill.plan.costs import Ledger
from tadistill.plan.inputs import Encoding, Output, Split, TokenizerFiles
from tadistill.plan.kinds import RetokeniseSpec
from tadistill.plan.notes import row_notes

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
SEQKD = {"name": "seqkd", "optim": {"steps": 2, "batch": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of tokenizers: BPE, single bytes, the latter with two more tokens, and the latter with another EOS."""
    root = tmp_path_factory.mktemp("tokenizers")
    more = byte_tokenizer()
    more.add_tokens(["<tool>", "<call>"])
    made = {"bpe": bpe_tokenizer(["the cat"], 260), "bytes": byte_tokenizer(), "more": more, "end": byte_tokenizer(eos="<|im_end|>")}
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


@pytest.fixture
def planned(folders, tmp_path):
    """A function that plans a study. `models` maps each model to a directory of `folders`, or to another model's settings."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {i}", "output": "the cat"}) + "\n" for i in range(6)))

    def plan(arms: dict, t="bytes", a="bytes", s="bpe", method=SEQKD, **changes):
        load = {"t": (t, 4), "a": (a, 3), "s": (s, 2)}
        models = {
            name: {"load": "scratch:llama", "tokenizer": folders[which], "config": SHAPE | {"num_hidden_layers": layers}}
            for name, (which, layers) in load.items()
        }
        data = {"train": str(rows), "dev": str(rows), "test": [str(rows)], "template": "plain", "max_prompt": 30, "max_length": 60}
        models, data = models | changes.pop("models", {}), data | changes.pop("data", {})
        return make_plan(validate({"study": "x", "seeds": [1], "models": models, "data": data, "method": method, "arms": arms} | changes))

    return plan


def kinds(plan) -> dict[str, list]:
    found: dict[str, list] = {}
    for stage in plan.stages.values():
        found.setdefault(stage.kind, []).append(stage)
    return found


def test_text_is_retokenised_only_for_a_student_with_other_tokens(planned):
    found = kinds(planned({"direct": "t > s", "chain": "t > a > s", "same": "t > a"}))
    (of_t, of_a), retokenised = found["generate"], {stage.parents["answers"]: stage for stage in found["retokenise"]}
    distilled = {stage.label.split(",")[0]: stage.parents["responses"] for stage in found["distill"]}
    assert {of_t.model, of_a.model} == {"t", "a"}
    assert distilled == {
        "distill t -> s": retokenised[of_t.key].key,
        "distill a -> s": retokenised[of_a.key].key,
        "distill t -> a": of_t.key,
    }
    spec = retokenised[of_t.key].spec
    assert (spec.writer.at.endswith("bytes"), spec.tokenizer.at.endswith("bpe")) == (True, True)
    assert spec.asked.ends == (1, 4)  # EOS of t, with which `said` finds the end of an answer
    assert retokenised[of_t.key].cost.total == 0


def test_all_arms_and_phases_share_one_retokenised_text(planned):
    arms = {"one": "t > s", "two": {"path": "t > s", "optim": {"lr": 1.0}}}
    assert len(kinds(planned(arms))["retokenise"]) == 1


def test_a_context_is_read_by_the_writer_only(planned):
    context = {"system": None, "template": "Think first. {prompt}"}
    (stage,) = kinds(planned({"direct": {"path": "t > s", "context": context}}))["retokenise"]
    assert (stage.spec.asked.context is None, stage.spec.data.context is None) == (False, True)


@pytest.mark.parametrize("signal", ["top_k", "sampled", "hidden"])
def test_the_tokens_that_only_the_teacher_has_are_in_no_recording(planned, signal):
    """Hidden states have no tokens: their head is cut in training. So their recording is the same for all students."""
    method = {"objective": {"type": "forward_kl"}, "optim": SEQKD["optim"]}
    method |= {"sampler": {"type": "dataset", "signal": {"type": signal}}}
    found = kinds(planned({"fewer": "t > s", "same": "t > a"}, t="more", a="more", s="bytes", method=method))
    tokens = {stage.spec.tokens for stage in found["signal"]}
    assert tokens == ({None} if signal == "hidden" else {None, 262})
    assert {stage.spec.tokens for stage in found["analyse"]} == {None, 262}
    same = kinds(planned({"fewer": "t > s", "same": "t > a"}, s="bytes", method=method))
    assert {stage.spec.tokens for stage in (*same["signal"], *same["analyse"])} == {None}


REFUSED = [
    (
        {"x": {"path": "t > s", "objective": {"type": "top_k_forward_kl"}, "sampler": {"type": "dataset"}}},
        {},
        r"arms.x: t teaches s, but their tokenizers differ \(262 and 260 tokens\): objective `top_k_forward_kl` .*use `forward_kl`",
    ),
    ({"x": {"path": "t > a > s", "method": "distillm-2"}}, {}, r"a teaches s, but their tokenizers differ.*: objective `contrastive` has"),
    ({"x": {"path": "t > s", "objective": {"type": "sampled_kl"}, "sampler": {"type": "student"}}}, {}, r"`sampled_kl` estimates"),
    (
        {"x": {"path": "t > s", "objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "recorded": True}}},
        {},
        r"records the teacher's outputs .*; remove `recorded`",
    ),
    (
        {"x": {"path": "t > s", "method": "minillm", "objective": {"pt_weight": 0}}},
        {},
        r"sampler `teacher_mixed` needs one tokenizer for both models, which sample.*set `sampler.alpha: 0`",
    ),
    ({"x": {"path": "t > s", "method": "skd"}}, {}, r"sampler `speculative` needs one tokenizer.*use `sampler: {type: student}`"),
    (
        {"x": {"path": "t > s", "objective": {"type": "forward_kl"}, "sampler": {"type": "dataset", "signal": {"type": "hidden"}}}},
        {},
        r"sampler.signal `hidden` needs one tokenizer .* at the student's tokens; remove `signal`",
    ),
    (
        {"x": {"path": "t > s", "method": "on-policy-rkl", "select": {"metric": "reverse_kl"}}},
        {},
        r"select.metric `reverse_kl` needs one tokenizer .* compares them token by token; set `select.metric` to `loss`",
    ),
    (
        {"x": {"path": "t > a", "objective": {"type": "gold"}}},
        {},
        r"objective `gold` is for models with different tokenizers.*jensen_shannon, beta: 0.5",
    ),
    ({"x": {"path": "t > s", "select": {"metric": "reverse_kl"}}}, {}, r"arms.x: t teaches s with select.metric `reverse_kl`"),
    ({"x": {"path": "t > a > s", "init": {"s": "a"}}}, {}, r"s cannot start from a, because their tokenizers differ"),
    (
        {"x": {"path": "t > a > s", "dense": {}, "objective": {"type": "reverse_kl"}, "sampler": {"type": "dataset"}}},
        {"a": "bpe"},
        r"arms.x: t teaches a, but their tokenizers differ.*: `dense` needs one tokenizer .*; remove `dense`",
    ),
    (
        {"x": "soft > a", "y": "t > s"},
        {"models": {"soft": {"temper": {"of": "t", "like": "y"}}}, "teacher": "t"},
        r"the temperature of soft cannot be set like that of s \(arm y\), because their tokenizers differ",
    ),
]


@pytest.mark.parametrize(("arms", "changes", "message"), REFUSED)
def test_what_compares_tokens_is_refused_between_families(planned, arms, changes, message):
    with pytest.raises(ConfigError, match=message):
        planned(arms, **changes)


def test_gold_is_allowed_while_a_tokenizer_is_unknown(planned):
    """A model that is not on this disk counts as one with the other's tokenizer."""
    unknown = {"t": {"load": "scratch:llama", "tokenizer": "nobody/has-this", "config": SHAPE | {"num_hidden_layers": 2}}}
    plan = planned({"x": {"path": "t > s", "objective": {"type": "gold"}}}, models=unknown)
    assert len(kinds(plan)["distill"]) == 1


def test_within_a_family_everything_stays_allowed(planned):
    arms = {"kd": {"path": "t > a", "method": "gkd"}, "text": "t > s", "start": {"path": "t > a", "init": {}}}
    found = kinds(planned(arms))
    by_text = {stage.model: stage.spec.of_teacher is not None for stage in found["analyse"]}
    assert by_text == {"a": False, "s": True}  # no distribution of s can be compared with the teacher's, but its answers can
    assert {stage.spec.per_byte for stage in found["evaluate"]} == {True, False}


def test_a_tempered_control_has_the_temperature_of_the_assistant(planned):
    """The student may have other tokens, but the assistant may not."""
    arms = {"chain": "t > a > s", "soft": {"path": "t > s", "control": "tempered of chain"}}
    assert len(kinds(planned(arms))["temper"]) == 1
    with pytest.raises(ConfigError, match=r"the temperature of t cannot be set like that of a \(arm chain\)"):
        planned(arms, a="bpe", s="bytes")


def test_advice_does_not_compare_two_families(planned):
    recipe = planned({"x": "t > s"}).recipe
    with pytest.raises(ConfigError, match=r"the tokenizers of t and s differ \(262 and 260 tokens\); leave one of them out"):
        plan_probes(recipe, ["t", "s"], prompts=4, k=4)


def test_recorded_text_of_another_family_is_refused(planned):
    recorded = {"path": "t > a > s", "objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "recorded": True}}
    with pytest.raises(ConfigError, match="a trains on the recorded text of s"):
        planned({"x": recorded})


def test_only_the_last_model_is_analysed_if_an_assistant_has_other_tokens(planned):
    (stage,) = kinds(planned({"x": "t > a > s"}, a="bpe", s="bytes"))["analyse"]
    assert (stage.model, stage.spec.assistants) == ("s", ())


@pytest.mark.parametrize(("t", "s", "who"), [("more", "bytes", "t"), ("bytes", "more", "s")])
def test_extra_tokens_at_the_end_do_not_divide_a_family(planned, t, s, who):
    """A divergence compares the shared tokens. Text passes as text, because one model cannot read every token of the other."""
    arms = {"kd": {"path": "t > s", "method": "kd"}, "text": "t > s"}
    plan = planned(arms, t=t, a=t, s=s)
    assert plan.tokens.families == [("t", "s")]
    assert (
        f"t and s share 262 tokens. {who} has 2 more tokens (<tool>, <call>); a text with such a token is refused."
        in plan.tokens.cautions()
    )
    uses = plan.tokens.tokenizer("s")
    assert (uses is not None and uses[0].endswith("bytes")) == (s == "more")  # a student keeps no token that its teacher lacks
    assert len(kinds(plan).get("retokenise", [])) == (t == "more")


def test_another_eos_does_not_divide_a_family(planned):
    plan = planned({"kd": {"path": "t > s", "method": "kd"}}, s="end")
    assert plan.tokens.families == [("t", "s")]
    assert plan.tokens.ends("s") == (1, 4)


def test_models_of_two_families_end_answers_with_their_own_tokens(planned):
    plan = planned({"direct": "t > s", "chain": "t > a > s"})
    assert plan.tokens.families == [("t", "a"), ("s",)]
    assert plan.tokens.notes() == [
        "An answer of t and a ends with <eos> (token 1); <|im_end|> (token 4) can also end it.",
        "An answer of s ends with <|end|> (token 0).",
    ]


def test_the_key_of_a_retokenised_text():
    """Its plain form is the one that finished stores have."""
    from tadistill.config import DataRef
    from tadistill.config.data import World

    data = Encoding(template="plain", max_prompt=30, max_length=60, world=World())
    tokenizer = TokenizerFiles(source="o/m", revision="main", fingerprint="f", at="/here/o/m")
    train = Split(ref=DataRef(load="d"), fingerprint="d", role="train", limit=4)
    spec = RetokeniseSpec(data=data, answers=Output(stage="ab"), writer=None, asked=None, tokenizer=tokenizer, train=train)
    assert spec.content()["tokenizer"] == {"source": "o/m", "revision": "main", "fingerprint": "f"}
    assert spec.parents == {"answers": "ab"}
    assert spec.key == "25c2627c3eb172b9"


def test_a_text_with_several_turns_is_refused_over_spans(planned, tmp_path):
    rows = tmp_path / "turns.jsonl"
    turns = [{"role": who, "content": "the cat"} for who in ("user", "assistant", "user", "assistant")]
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    data = {"train": str(rows), "dev": str(rows), "test": [str(rows)], "turns": "all", "max_prompt": 90, "max_length": 120}
    with pytest.raises(ConfigError, match=r"s learns from t, which has another tokenizer, .* set data.turns to last"):
        planned({"x": CROSSED["kd"]}, s="more", t="bpe", a="bpe", data=data)


def test_plain_text_is_learnt_without_the_teacher():
    given = {"objective": {"type": "minillm", "pt_kd_ratio": 0.5}, "sampler": {"type": "teacher_mixed", "alpha": 0}}
    with pytest.raises(ConfigError, match=r"objective.pt_kd_ratio 0.5 needs .*set `objective.pt_kd_ratio: 0`"):
        over_spans(Method.model_validate(given))
    given["objective"]["pt_kd_ratio"] = 0
    assert over_spans(Method.model_validate(given)).objective.needs_corpus


CROSSED = {
    "kd": {"path": "t > s", "objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}},
    "taught": {"path": "t > s", "objective": {"type": "forward_kl"}, "sampler": {"type": "teacher"}},
    "on policy": {"path": "t > s", "method": "on-policy-rkl"},
    "minillm": {"path": "t > s", "method": "minillm", "sampler": {"alpha": 0, "rollouts": 4}, "objective": {"pt_weight": 0}},
    "uld": {"path": "t > s", "objective": {"type": "uld"}, "sampler": {"type": "dataset"}},
    "gold": {"path": "t > s", "objective": {"type": "gold"}, "sampler": {"type": "dataset"}},
    "plain": {"path": "t > a", "method": "kd"},
}


def test_losses_over_spans_say_so_and_have_the_teachers_rules(planned):
    context = {"template": "Think. {prompt}"}
    plan = planned(CROSSED | {"with": CROSSED["kd"] | {"context": context}})
    distilled = {name: plan.stages[arm.final[1]] for arm in plan.arms if (name := arm.name)}
    for name, stage in distilled.items():
        assert (", over spans" in stage.label) == (stage.spec.teacher_data is not None) == (name != "plain")
        assert stage.spec.data.context is None
    own = distilled["kd"].spec.teacher_data
    assert own.ends[0] == 1
    assert own.context is None
    assert distilled["with"].spec.teacher_data.context.template == context["template"]
    assert distilled["with"].spec.method.context.template == context["template"]
    objective = distilled["minillm"].spec.objective
    assert (objective.single_step, objective.include_current, objective.length_normalisation) == (False, True, "remaining")
    assert not distilled["minillm"].spec.method.objective.needs_distribution


def test_the_key_depends_on_both_tokenizers(planned):
    def key(**which):
        plan = planned({"x": CROSSED["kd"]}, **which)
        return plan.stages[plan.arms[0].final[1]].key

    found = [key(), key(t="more", a="more"), key(t="bpe", a="bpe", s="bytes"), key(t="bpe", a="bpe", s="more"), key(t="end", a="end")]
    assert len(set(found)) == len(found)


def test_lengths_and_costs_are_counted_with_each_models_own_tokens(planned):
    arms = {"text": "t > s", "same": "t > a"}
    two, one = planned(arms), planned(arms, s="bytes")
    assert [two.tokens.readers(name) for name in "tas"] == [("t", "a"), ("t", "a"), ("s",)]
    assert [one.tokens.readers(name) for name in "tas"] == [(), (), ()]
    ledger = Ledger(two.recipe)
    reads = {name: ledger.of(two.tokens.readers(name)).train for name in "ts"}
    assert {name: texts.rows[0][1] for name, texts in reads.items()} == {"t": len("the cat") + 1, "s": 4 + 1}  # the, " c", a, t
    assert Ledger(one.recipe).of(()).train == reads["t"]

    def training(plan, learner: str) -> float:
        (stage,) = (stage for stage in plan.stages.values() if stage.kind == "distill" and stage.model == learner)
        return stage.cost.parts["training/student"].positions

    assert training(two, "a") == training(one, "a")
    assert training(two, "s") < training(one, "s")


def test_the_plan_says_the_rows_of_each_tokenizer(planned):
    plan = planned({"text": "t > s"}, data={"max_length": 12})
    assert [*row_notes(plan)] == [
        f"Rows of rows ({role}, t): 6 of 6 rows; 6 with a reference cut at data.max_length (12)." for role in ("train", "dev", "test")
    ]


def test_answers_of_a_teacher_with_other_tokens_are_of_one_training_set(planned, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"instruction": f"say {i}", "output": "the cat"}) + "\n" for i in range(6))
        )
    train = {name: {"load": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in "ab"}
    dev = str(tmp_path / "a.jsonl")
    data = {"train": train, "dev": dev, "test": [dev], "template": "plain", "max_prompt": 30, "max_length": 60}
    with pytest.raises(ConfigError, match=r"s learns from answers of t, .* remove the other sets of `data.train`"):
        planned({"x": CROSSED["taught"]}, data=data)
    plan = planned({"x": CROSSED["kd"]}, data=data)
    stage = plan.stages[plan.arms[0].final[1]]
    assert len(stage.spec.sets) == 2
    assert stage.cost.parts["training/teacher"].heads > 0
