"""The tokenizer, the ends of answers and BOS that a plan chooses, and the stages whose keys depend on them."""

import pytest
from pydantic import ValidationError
from tests.byte_models import BOS, CHATML, EOS, IM_END, ROWS, byte_model, byte_tokenizer, save, write_rows

from tadistill.config.recipe import Recipe
from tadistill.errors import ConfigError, ModelError
from tadistill.models.tokens import Vocabulary
from tadistill.plan.arms import make_plan
from tadistill.plan.study_tokens import StudyTokens

OTHER = CHATML.replace("\n{% endfor %}", "{% endfor %}")
MODELS = {
    "base": (EOS, {}),
    "instruct": ([EOS, IM_END], {"eos": "<|im_end|>"}),
    "plain": (EOS, {"template": None}),
    "other": (EOS, {"template": OTHER}),
    "gemma": ([EOS, IM_END], {"adds_bos": True}),
    "listed": ([EOS, IM_END], {}),
    "bare": ([EOS, IM_END], {"template": None}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "prompts.jsonl", [{"prompt": "a", "completion": "b"}])
    write_rows(folder / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    write_rows(folder / "corpus.jsonl", [{"text": "abc"}])
    for name, (ends, options) in MODELS.items():
        save(folder / name, byte_model(ends), byte_tokenizer(**options))
    return folder


@pytest.fixture
def plan(folder):
    def plan(teacher: str | None, student: str, rows: str = "rows", method: dict | None = None, **data):
        models = {"s": {"load": str(folder / student), "sft": {"optim": {"steps": 1}}}}
        models |= {"t": {"load": str(folder / teacher)}} if teacher else {}
        file = str(folder / f"{rows}.jsonl")
        recipe = {
            "study": "x",
            "seeds": [1],
            "models": models,
            "data": {"train": file, "dev": file, "test": [file], **data},
            "method": {"optim": {"steps": 1}, "sampler": {"type": "teacher"}, "objective": {"type": "cross_entropy"}} | (method or {}),
            "arms": {"a": "t > s" if teacher else "s"},
        }
        return make_plan(Recipe.model_validate(recipe))

    return plan


@pytest.mark.parametrize(
    ("rows", "template", "why"),
    [("rows", "chat", "data.template is chat"), ("chats", "alpaca", "the data has conversations")],
)
def test_prompts_that_need_a_template_which_no_model_has(plan, rows, template, why):
    with pytest.raises(ModelError, match=f"{why}, but the tokenizer of s and t has no chat template; set `tokenizer:`"):
        plan("bare", "plain", rows, template=template)
    with pytest.raises(ModelError, match=f"models.s: {why}, but the tokenizer of s has no chat template"):
        plan(None, "bare", rows, template=template)
    assert plan("bare", "plain", "prompts", template=template).stages  # a prompt is a text already


def rules(found) -> dict[str, tuple]:
    return {stage.kind: (stage.spec.data.ends, stage.spec.data.bos) for stage in found.stages.values()}


@pytest.mark.parametrize(
    ("teacher", "student", "template", "ends"),
    [
        ("listed", "base", "chat", (IM_END, EOS)),
        ("base", "base", "chat", (IM_END, EOS)),  # the template names an end that no other file does
        ("base", "base", "alpaca", (EOS, IM_END)),
        ("instruct", "base", "chat", (IM_END, EOS)),
        ("bare", "plain", "alpaca", (EOS, IM_END)),
        ("plain", "bare", "alpaca", (EOS, IM_END)),
    ],
)
def test_every_stage_that_answers_has_the_ends_of_all_models(plan, teacher, student, template, ends):
    found = plan(teacher, student, template=template)
    assert found.tokens.ends("t") == found.tokens.ends("s") == ends
    for kind, (given, _) in rules(found).items():
        assert given in ((), ends), kind
    told = rules(found)
    if teacher != "instruct" and student != "bare":  # others have a stage that already has all ends by its model's files
        assert told["distill"][0] == told["sft"][0] == ends


@pytest.mark.parametrize(
    ("teacher", "student", "data"),
    [
        ("plain", "plain", {"template": "alpaca"}),
        ("instruct", "instruct", {"template": "chat"}),
        ("bare", "bare", {"template": "plain"}),
        (None, "instruct", {"template": "chat"}),
        (None, "gemma", {"template": "alpaca", "bos": "never"}),
    ],
)
def test_nothing_moves_where_the_models_agree(plan, teacher, student, data):
    found = plan(teacher, student, **data)
    assert set(rules(found).values()) == {((), False)}
    contents = [stage.spec.content()["data"] for stage in found.stages.values()]
    assert all(not {"ends", "bos"} & content.keys() for content in contents)
    assert not found.tokens.cautions() or data["template"] != "chat"


def test_signals_move_only_if_references_end_with_another_token(plan):
    signal = {"sampler": {"type": "dataset"}, "objective": {"type": "forward_kl"}}
    assert rules(plan("base", "base", method=signal, template="alpaca"))["analyse"] == ((), False)
    assert rules(plan("base", "base", method=signal, template="chat"))["analyse"] == ((IM_END, EOS), False)


@pytest.mark.parametrize(
    ("teacher", "student", "rows", "template", "why"),
    [
        ("instruct", "base", "rows", "alpaca", "has the EOS <eos> (token 1)"),
        ("base", "plain", "rows", "chat", "has no chat template"),
        ("base", "plain", "chats", "alpaca", "has no chat template"),
        ("base", "other", "rows", "chat", "has another chat template"),
        ("gemma", "base", "rows", "alpaca", "puts no BOS first"),
        ("base", "gemma", "rows", "alpaca", "puts BOS first"),
        ("base", "other", "rows", "alpaca", None),
        ("gemma", "base", "rows", "chat", None),
    ],
)
def test_a_student_uses_the_teachers_tokenizer_where_its_own_differs(plan, folder, teacher, student, rows, template, why):
    found = plan(teacher, student, rows, template=template)
    (sft,) = (stage.spec for stage in found.stages.values() if stage.kind == "sft")
    assert sft.student.tokenizer == (str(folder / teacher) if why else None)
    assert (sft.student.tokenizer_fingerprint is not None) == bool(why)
    assert [f"s uses the tokenizer of t, because the tokenizer of s {why}."] * bool(why) == [
        s for s in found.tokens.cautions() if "uses" in s
    ]


def test_a_teacher_without_a_chat_template_gets_the_students(plan, folder):
    found = plan("plain", "base", template="chat")
    assert found.tokens.tokenizer("t") == (str(folder / "base"), "main")
    assert found.tokens.tokenizer("s") is None


@pytest.mark.parametrize(
    ("rows", "data", "bos"),
    [
        ("rows", {"template": "alpaca"}, True),
        ("rows", {"template": "chat"}, False),
        ("rows", {"template": "alpaca", "bos": "never"}, False),
        ("prompts", {"template": "chat"}, True),
        ("chats", {"template": "alpaca"}, False),
        ("chats", {"corpus": "corpus"}, True),
    ],
)
def test_bos_is_put_where_the_tokenizer_does_and_no_template_writes(plan, folder, rows, data, bos):
    corpus = {"corpus": str(folder / "corpus.jsonl")} if "corpus" in data else {}
    found = plan("gemma", "gemma", rows, **(data | corpus))
    assert {told for _, told in rules(found).values()} == {bos}
    sentence = [s for s in found.tokens.cautions() if "<bos> (token 3)" in s]
    assert len(sentence) == int(bos or "bos" in data)


def test_the_plan_says_which_ends_and_warns_of_a_template(plan):
    found = plan("listed", "base", template="alpaca")
    assert found.tokens.notes() == ["An answer of s and t ends with <eos> (token 1); <|im_end|> (token 4) can also end it."]
    assert found.tokens.cautions() == [
        "Check data.template: it is alpaca, but s and t have a chat template; for chat models set data.template: chat."
    ]
    assert plan("listed", "base", "prompts").tokens.cautions() == []
    assert BOS not in found.tokens.ends("s")


@pytest.fixture
def across(folder):
    """A plan of t, a chat model of bytes, and s, whose tokenizer has other tokens and no chat template."""

    def across(template: str, of_t: str | None = None, of_s: str | None = None, **more: dict):
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        models = {
            "t": {"load": str(folder / "base"), "template": of_t},
            "s": {"load": "scratch:llama", "tokenizer": "tinyworld", "config": small, "template": of_s},
        }
        file = str(folder / "rows.jsonl")
        recipe = {
            "study": "x",
            "seeds": [1],
            "models": models | more,
            "data": {"train": file, "dev": file, "test": [file], "template": template},
            "method": {"name": "seqkd", "optim": {"steps": 1}},
            "arms": {"a": f"t > {' > '.join(more)} > s" if more else "t > s", "t": "t"},
        }
        return make_plan(Recipe.model_validate(recipe))

    return across


def test_each_model_has_its_own_template(across):
    with pytest.raises(
        ModelError, match=r"models\.s: data\.template is chat, .* no chat template; .*, or set models\.s\.template to alpaca or"
    ):
        across("chat")
    with pytest.raises(ModelError, match=r"models\.s: models\.s\.template is chat, but the tokenizer of s"):
        across("plain", of_s="chat")
    found = across("chat", of_s="plain")
    read = {(stage.kind, stage.model): stage.spec.data.template for stage in found.stages.values() if stage.kind != "analyse"}
    assert {template for (_, model), template in read.items() if model == "t"} == {"chat"}
    assert {template for (kind, model), template in read.items() if model == "s" and kind != "generate"} == {"plain"}
    (text,) = (stage.spec for stage in found.stages.values() if stage.kind == "generate")
    assert (text.data.template, text.data.ends[0]) == ("chat", IM_END)
    told = found.tokens.notes()
    assert "Instructions for t have the template `chat`." in told
    assert "Instructions for s have the template `plain`." in told
    assert not [sentence for sentence in found.tokens.cautions() if "Check data.template" in sentence]
    same = across("plain", of_t="chat").stages
    assert {key for key, stage in same.items() if stage.model == "t"} == {key for key, stage in found.stages.items() if stage.model == "t"}
    assert across("chat", of_s="plain").stages.keys() == same.keys()


def test_models_with_one_tokenizer_read_one_template(across, folder):
    other = {"load": str(folder / "listed"), "template": "alpaca"}
    with pytest.raises(
        ConfigError, match=r"models\.t\.template is chat, but models\.l\.template is alpaca\. Both models have the same tok"
    ):
        across("plain", of_t="chat", l=other)
    two = {name: {"load": str(folder / name), "template": template} for name, template in (("base", "chat"), ("listed", "plain"))}
    file = str(folder / "rows.jsonl")
    only = {
        "study": "x",
        "seeds": [1],
        "models": two,
        "data": {"train": file, "dev": file, "test": [file]},
        "arms": {"a": "base", "b": "listed"},
    }
    with pytest.raises(ConfigError, match=r"models\.base\.template is chat, but models\.listed\.template is plain"):
        make_plan(Recipe.model_validate(only))
    found = across("plain", of_t="chat", l={"load": str(folder / "listed")})
    assert {found.tokens.data(name).template for name in ("t", "l")} == {"chat"}
    with pytest.raises(ValidationError, match="a model that is made from another model has the template of that model; remove `template`"):
        across("plain", l={"init": {"from": "t", "layers": 1}, "template": "chat"})


@pytest.mark.parametrize(("more", "fewer"), [({"x": 41}, 41), ({"x": 5}, None)], ids=["after the last id", "in a gap of the ids"])
def test_a_student_with_fewer_token_ids_than_its_teacher(monkeypatch, more, fewer):
    """The number is one of logits. With the ids 0 to 4 and 40, a model of 6 tokens has 41 logits."""
    words = {**{str(id): id for id in range(5)}, "eos": 40}
    found = {"s": Vocabulary(words, {}), "t": Vocabulary(words | more, {})}
    monkeypatch.setattr(StudyTokens, "__init__", lambda self: setattr(self, "_vocabulary", found.get))
    monkeypatch.setattr(StudyTokens, "alike", lambda *_: True)
    monkeypatch.setattr(StudyTokens, "source", lambda self, name: (name,))
    assert (StudyTokens().fewer("s", "t"), StudyTokens().fewer("t", "s")) == (fewer, None)  # type: ignore[call-arg]
