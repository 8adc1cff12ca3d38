"""The question's form, and the strict reading of replies."""

import json

import pytest
from tests.unit.report.builder import ArmSpec, StudySpec, build_study

from tadistill.data.prompts import render, split_prompt, task_of
from tadistill.data.rows import Example
from tadistill.errors import ConfigError
from tadistill.judge.questions import in_order_of_asking, make_questions, parse_scores, read_answers, wordings, write_question
from tadistill.store import Store

from .conftest import predictions


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7", (8, 7)),
        ("\n  8 7  \nThe first is better.", (8, 7)),
        ("8, 7", (8, 7)),
        ("8.5 7", (8.5, 7)),
        ("8/10 7/10", (8, 7)),
        ("8 / 10, 7 / 10", (8, 7)),
        ("10 out of 10 and 1 out of 10", (10, 1)),
        ("10, and 1", (10, 1)),
        ("**8 7**", (8, 7)),
        ("Scores: 8 7", (8, 7)),
        ("Assistant 1: 8, Assistant 2: 7", (8, 7)),
        ("Assistant 1: 8\nAssistant 2: 7\nBecause.", (8, 7)),
        ("**Assistant 1:** 8/10\n\n**Assistant 2:** 7/10", (8, 7)),
        ("<think>9 9, or rather 3 4?</think>\n3 4", (3, 4)),
        ("", None),
        ("The answers are good.", None),
        ("8", None),
        ("8\n7", None),
        ("8 7 6", None),
        ("0 7", None),
        ("11 7", None),
        ("-8 7", None),
        ("8/100 7", None),
        ("Assistant 2: 8, Assistant 1: 7", None),
        ("I would give 8 to the first and 7 to the second", None),
        ("Both are fine.\n8 7", None),
        ("87", None),
        ("8 7th", None),
    ],
)
def test_parse(reply, scores):
    assert parse_scores(reply) == scores


def test_prompts_are_split_as_the_template_writes_them():
    plain, given = Example("Add them.", "", ("5",)), Example("Add them.", "2 and 3\n\n4", ("9",))
    assert split_prompt(render(plain, "alpaca", None)) == ("Add them.", "")
    assert split_prompt(render(given, "alpaca", None)) == ("Add them.", "2 and 3\n\n4")
    assert split_prompt("<|user|> hello ") == ("<|user|> hello", "")
    turns = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Add 2."})
    assert task_of(given) == ("Add them.", "2 and 3\n\n4")
    assert task_of(Example("", "", ("5",), messages=turns)) == ("user: Hi.\n\nassistant: Hello.\n\nuser: Add 2.", "")


def edit(path, **columns):
    rows = [json.loads(line) | columns for line in path.read_text().split("\n") if line]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_chat_template_does_not_reach_the_judge(study):
    """What evaluation stores is read; without special tokens a rendered chat is `user`, the text, `assistant`."""
    for arm in ("good", "bad"):
        edit(predictions(study, arm), prompt="user\nAdd them.\n\n2 and 3\nassistant\n", instruction="Add them.", input="2 and 3")
    items = read_answers(study.study_dir, Store(study.store_dir)).items
    assert {(item.instruction, item.input) for item in items} == {("Add them.", "2 and 3")}
    text = make_questions(read_answers(study.study_dir, Store(study.store_dir)), mode="pair")[0].text
    assert "[Instruction]\nAdd them.\n" in text
    assert "assistant\n" not in text


def test_the_first_seed_is_the_first_finished_one_in_the_recipes_order(tmp_path):
    arms = [ArmSpec("good", ("xl", "s")), ArmSpec("bad", ("xl", "l", "s"))]
    found = build_study(tmp_path / "a", StudySpec(arms, seeds=(30, 10), sets={"dolly": 2}))
    assert read_answers(found.study_dir, Store(found.store_dir)).seeds == (30,)
    assert read_answers(found.study_dir, Store(found.store_dir), all_seeds=True).seeds == (30, 10)
    found = build_study(tmp_path / "b", StudySpec(arms, seeds=(30, 10), sets={"dolly": 2}, unfinished=(("good", 30), ("bad", 30))))
    assert read_answers(found.study_dir, Store(found.store_dir)).seeds == (10,)


def test_question_shows_both_answers_in_order_and_no_names(study):
    answers = read_answers(study.study_dir, Store(study.store_dir))
    questions = make_questions(answers, mode="pair", against="bad")
    first, second = questions[:2]
    assert (first.left, first.right, second.left, second.right) == ("good", "bad", "bad", "good")
    assert first.text.index("fine text") < first.text.index("poor text")
    assert second.text.index("poor text") < second.text.index("fine text")
    assert "good" not in first.text
    assert "bad" not in first.text
    assert "[Input]" not in first.text
    assert "[Input]\n2 and 3\n" in write_question("Add.", "2 and 3", "5", "6")
    asked = wordings(first.text)
    assert asked[0] == first.text
    assert len(set(asked)) == len(asked) == 3
    assert all(parse_scores(text.removeprefix(first.text)) is None for text in asked)  # nothing to repeat that would count


def test_choice_of_prompts_seeds_and_arms(study):
    def read(**more):
        return read_answers(study.study_dir, Store(study.store_dir), **more)

    everything = read()
    assert (everything.arms, everything.seeds, everything.unfinished) == (("good", "bad"), (10,), ("late",))
    assert len(everything.items) == 10
    assert everything.items[0].answers == {
        "good": ("fine text dolly 0 of run 10, draw 0",),
        "bad": ("poor text dolly 0 of run 10, draw 0",),
        "reference": ("reference 0",),
    }
    assert [(i.set, i.index) for i in read(limit=2).items] == [("dolly", 0), ("dolly", 2), ("facts", 0), ("facts", 3)]
    assert [i.index for i in read(sets=["facts"], limit=3).items] == [0, 2, 4]
    both = read(all_seeds=True)
    assert both.seeds == (10, 20)
    assert both.items[0].answers["good"][1] == "fine text dolly 0 of run 20, draw 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["nobody"]}, "no arm `nobody`; its arms are good, bad, late"),
        ({"arms": ["late"]}, "`late` has no answers"),
        ({"sets": ["nothing"]}, "set `nothing`; its sets are dolly, facts"),
    ],
)
def test_wrong_choices(study, options, message):
    with pytest.raises(ConfigError, match=message):
        read_answers(study.study_dir, Store(study.store_dir), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "score", "against": "bad"}, "each arm with the reference, not with `bad`"),
        ({"mode": "pair", "against": "late"}, "neither an arm with answers"),
    ],
)
def test_wrong_questions(study, options, message):
    answers = read_answers(study.study_dir, Store(study.store_dir))
    with pytest.raises(ConfigError, match=message):
        make_questions(answers, **options)


def test_a_group_of_prompts_has_one_question_about_each_and_then_whole_prompts():
    """Half of the prompts have fewer questions, because arms gave the same answers."""
    prompts = {f"{i} {n}": ("dolly", i) for i in range(130) for n in range(24 if i % 2 else 8)}
    row = [prompts[text][1] for text in in_order_of_asking(prompts, together=50)["dolly"]]
    group = row[:65]
    assert len({*group}) == 65
    rest = [i for i in group for _ in range(23 if i % 2 else 7)]
    assert row[65 : 65 + len(rest)] == rest
    assert {*row[65 + len(rest) :]} == {*range(130)} - {*group}
