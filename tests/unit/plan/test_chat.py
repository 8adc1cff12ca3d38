"""Turns of conversations in a plan: which stages read several of them, what they cost, and which rows are left out."""

from pathlib import Path

import pytest
from tests.byte_models import SHAPE, write_rows
from tests.chat_templates import CHATML, QWEN3, chat_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tadistill.config.method_parts import TeacherContext
from tadistill.config.recipe import Recipe
from tadistill.data.datasets import load
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Rules
from tadistill.errors import ConfigError, DataError
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.costs.sizes_and_lengths import count_first_rows
from tadistill.plan.notes import row_notes

TALK = [("user", "Where is Oslo?"), ("assistant", "In Norway."), ("user", "Is it cold?"), ("assistant", "Yes, it is.")]
ROWS = [{"messages": [{"role": role, "content": text} for role, text in TALK[: 2 + 2 * (i % 2)]]} for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_rows(folder / "rows.jsonl", ROWS)
    dated = "{% if date_string is undefined %}{% set date_string = strftime_now('%d %b') %}{% endif %}Today: {{ date_string }}\n" + CHATML
    always = "Today: {{ strftime_now('%d %b') }}\n" + CHATML
    for name, template in (("chatml", CHATML), ("qwen", QWEN3), ("dated", dated), ("always", always)):
        config = AutoConfig.for_model("llama", vocab_size=400, eos_token_id=2, **SHAPE)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        chat_tokenizer(template, template if template in (CHATML, QWEN3) else CHATML).save_pretrained(folder / name)
    return folder


def recipe(folder: Path, model: str = "chatml", **data) -> Recipe:
    file, optim = str(folder / "rows.jsonl"), {"steps": 2, "batch": 2}
    methods = {
        "dataset": {"sampler": {"type": "dataset"}, "objective": {"type": "forward_kl"}},
        "recorded": {"sampler": {"type": "dataset", "signal": {"type": "hidden"}}, "objective": {"type": "forward_kl"}},
        "teacher": {"sampler": {"type": "teacher"}, "objective": {"type": "cross_entropy"}},
        "student": {"sampler": {"type": "student"}, "objective": {"type": "reverse_kl"}},
        "mix": {"sampler": {"type": "mix"}, "objective": {"type": "forward_kl"}},
    }
    return Recipe.model_validate({
        "study": "x", "seeds": [1], "data": {"train": file, "dev": file, "test": [file], **data},
        "models": {"t": {"load": str(folder / model)}, "s": {"load": str(folder / model), "sft": {"optim": optim}}},
        "method": {"optim": optim}, "arms": {name: {"path": "t > s"} | method for name, method in methods.items()},
    })  # fmt: skip


def test_only_the_training_sets_own_text_has_several_turns(folder):
    plan = make_plan(recipe(folder, turns="all"))
    turns = {(s.spec.kind, getattr(getattr(s.spec, "sampler", None), "type", "")): s.spec.data.turns for s in plan.stages.values()}
    whole = {("sft", ""), ("signal", ""), ("distill", "dataset"), ("distill", "mix")}
    assert {stage for stage, value in turns.items() if value == "all"} == whole
    assert {value for stage, value in turns.items() if stage not in whole} == {"last"}
    assert Rules.of(recipe(folder, turns="all").data, "dev", bos=False).turns == "last"


def test_old_recipes_keep_the_content_of_their_stages(folder):
    new = {"turns", "thinking", "chat_template_kwargs", "long_responses"}
    for stage in make_plan(recipe(folder)).stages.values():
        assert not new & stage.spec.data.content().keys()
    changes = (
        {},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"turns": "last"},
        {"thinking": "mask"},
        {"long_responses": "drop"},
    )
    keys = [next(iter(make_plan(recipe(folder, "qwen", **data)).stages)) for data in changes]
    assert len({*keys}) == len(keys)


@pytest.mark.parametrize(("model", "more"), [("chatml", 0), ("qwen", 4)])
@pytest.mark.parametrize("changes", [{}, {"max_prompt": 40}, {"long_responses": "drop", "max_length": 60}])
def test_the_plan_counts_and_measures_as_the_tokenizer_of_transformers(folder, model, more, changes):
    study = recipe(folder, model, **({"turns": "all"} | changes))
    rules, rows = Rules.of(study.data, "train", bos=False), load(study.data.train, "train", study.data)
    encoded, counts = encode(rows, chat_tokenizer(QWEN3 if more else CHATML), rules)
    assert count_first_rows(study, study.data.train, "train") == counts
    assert counts.more == more or changes
    lengths = Ledger(study).fixed
    assert lengths.totals == [len(e.prompt) + len(e.response) for e in encoded]
    assert sum(r for _, r in lengths.rows) == sum(sum(b - a for a, b in e.spans) or len(e.response) for e in encoded)
    assert lengths.count == len(encoded)


def test_a_plan_says_what_is_left_out_and_refuses_what_the_recipe_refuses(folder):
    study = recipe(folder, turns="all", max_prompt=40)
    text = " ".join(row_notes(make_plan(study)))
    assert "rows.jsonl" not in text
    assert "Rows of rows (train): 8 of 8 rows; 4 turns longer than data.max_prompt (40)" in text
    assert "Rows of rows (dev): 4 of 8 rows; 4 longer than data.max_prompt (40)" in text
    with pytest.raises(DataError, match=r"data set `rows` \(train\), line 2: its prompt has \d+ tokens, more than data.max_prompt \(40\)"):
        list(row_notes(make_plan(recipe(folder, turns="all", max_prompt=40, long_prompts="refuse"))))


@pytest.mark.parametrize(("model", "turns", "said"), [("qwen", "answer", True), ("qwen", "last", False), ("chatml", "answer", False)])
def test_a_plan_says_what_the_template_writes_before_an_answer(folder, model, turns, said):
    found = [text for text in make_plan(recipe(folder, model, turns=turns)).tokens.cautions() if "before an answer" in text]
    words = r"The chat template of t writes '<think>\n\n</think>\n\n' before an answer. A student learns to write this text with `data"
    assert [text.startswith(words) for text in found] == [True] * said


def test_a_context_reads_one_answer_behind_each_prompt(folder):
    study = recipe(folder, turns="all")
    changed = study.method.model_copy(update={"context": TeacherContext(system="Be kind.")})
    arms = {name: study.arms[name] for name in ("student", "dataset")}
    sampled = study.model_copy(update={"method": changed, "arms": {"student": arms["student"]}})
    assert {s.spec.data.turns for s in make_plan(sampled).stages.values() if s.spec.kind == "distill"} == {"last"}
    with pytest.raises(ConfigError, match=r"s learns with a `context`, .* but data.turns is `all`; set data.turns to last"):
        make_plan(study.model_copy(update={"method": changed, "arms": {"dataset": arms["dataset"]}}))


def test_a_plan_says_which_tools_are_not_read(folder):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    file = write_rows(folder / "tools.jsonl", [row | {"tools": tools} for row in ROWS])
    cautions = make_plan(recipe(folder, "qwen", train=file)).tokens.cautions()
    assert "Rows of tools (train) have `tools`, which are ignored; to use them, set `columns: {tools: tools}`." in cautions
    named = make_plan(recipe(folder, "qwen", train={"load": file, "columns": {"tools": "tools"}}, max_prompt=511)).tokens.cautions()
    assert not [text for text in named if "tools" in text]


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("chatml", {}, None),
        ("dated", {}, "other prompts; `data.chat_template_kwargs: {date_string: 26 Jul 2024}` sets a fixed date."),
        ("dated", {"date_string": "1 May"}, None),
        ("always", {}, "other prompts; a tokenizer with a fixed date in its template avoids this."),
    ],
)
def test_a_plan_says_that_prompts_have_the_date(folder, model, settings, words):
    """No key of a stage depends on the day."""
    found = [text for text in make_plan(recipe(folder, model, chat_template_kwargs=settings)).tokens.cautions() if "date" in text]
    assert [text.endswith(words) for text in found] == [True] * bool(words)
