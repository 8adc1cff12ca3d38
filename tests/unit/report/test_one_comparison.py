"""The answer, the headings, the answers side by side and the captions are about the same arm, and say how it is made."""

import re
from dataclasses import replace

import pytest

from tadistill.charts.series import text_width
from tadistill.cli.shared import _next_commands
from tadistill.report.analysis import analyses
from tadistill.report.answer import answer, next_seeds
from tadistill.report.explain import cautions, needed_seeds, needed_text
from tadistill.report.figures.paths import budget_notes, lattice, lattice_figure, lattice_notes
from tadistill.report.figures.scores import ForestRow, _phone_lines, difference_figure, differences
from tadistill.report.findings import _clear, against, answers, behaviour, learning, paths
from tadistill.report.path_words import arm_words, steps, taught
from tadistill.report.plain_text import render_markdown
from tadistill.report.results_json import distillations
from tadistill.report.tables import interval_method
from tadistill.results.compare import direct_of
from tadistill.results.curves import Curve
from tadistill.results.number_text import number
from tadistill.results.sample_answers import samples, shown_first
from tadistill.results.verdict import by_importance, comparisons
from tadistill.statistics import Difference

from .builder import SMALL, ArmSpec, StudySpec, build_study

PRUNED = ArmSpec("starts", ("xl", "s"), gain=0.5, flops=6e17, before=("xl", "l"), text="xl > l then xl > s, s from l")
ARMS = [
    ArmSpec("sft", ("s",), flops=1e15),
    ArmSpec("kd", ("xl", "s"), method="forward_kl (dataset)"),
    ArmSpec("direct", ("xl", "s")),
    ArmSpec("teaches", ("xl", "l", "s"), gain=-4.0, flops=4.5e17),
    PRUNED,
    ArmSpec("equal", ("xl", "s"), compute="as starts", flops=6e17),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    spec = StudySpec(ARMS, seeds=(1, 2, 3), sets={"dolly": 40}, fact_sets=(), answer="the end.")
    return build_study(tmp_path_factory.mktemp("one"), spec).results


def test_question_answer_and_headings_are_about_the_same_arm(results):
    found = answer(results)
    assert found.question.startswith("Is s (124 M parameters) better when xl (1.56 B) teaches it with the help of l (774 M) than when xl ")
    ways = "Neither of the 2 ways to use an assistant (teaches and starts) is clearly better than direct distillation (direct and equal)"
    assert found.answer.startswith(f"{ways}, and 1 is clearly worse. ")
    assert re.search(
        r" The best of them, starts \(pruned from l, then taught by xl\), differs from direct distillation with the same "
        r"compute \(equal\) by \S+ points of ROUGE-L \(95 % interval \S+ to \S+\)\. The interval contains 0, so the "
        r"difference may be chance\. A true difference below [\d.]+ points would often be missed \(power below 80 %\)\.$",
        found.answer,
    )
    assert by_importance(results)[0].arm == "starts" != comparisons(results)[0].arm
    assert paths(results) == "starts: xl teaches l; s is pruned from l; xl teaches s"
    assert answers(results, samples(results)).startswith("starts and equal give the same answer")
    assert behaviour(results).startswith("The entropy of starts is ")
    assert shown_first(results) == ["starts", "equal"]
    assert [a.arm for a in analyses(results)] == ["starts", "teaches"]


def test_direct_distillation_is_one_arm(results):
    assert {arm.name: direct_of(results, arm).name for arm in results.plan.arms if arm.model == "s"} == dict.fromkeys(
        (arm.name for arm in ARMS), "direct"
    )
    assert {row.arm.name: row.other.name for row in differences(results)} == {
        "starts": "equal", "teaches": "direct", "equal": "direct", "kd": "direct", "sft": "direct"
    }  # fmt: skip


def test_other_compute_is_said(results):
    assert cautions(results)[0] == (
        "Not compared at equal compute: teaches has 1.50× the compute of direct. "
        "For equal compute, add a direct arm with `compute: as teaches`."
    )
    seen = replace(results, plan=replace(results.plan, seen=("dolly (test) shares all prompts with the training data",)))
    assert cautions(seen)[0] == "dolly (test) shares all prompts with the training data."
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", difference_figure(results).html())
    assert any(re.search(r"\] · clearly worse · not equal compute$", text) for text in texts)
    assert any(re.search(r"\] · undecided, p = 0\.\d{3}$", text) for text in texts)  # results.json has the word `no evidence`


def test_the_numbers_and_the_word_of_each_row_are_shown_on_a_phone(results):
    drawn = re.findall(
        r'<text data-arm="([^"]*)" class="(?:name|note)( wide| slim)?" [^>]*>([^<]*)</text>', difference_figure(results).html()
    )
    for row in differences(results):
        on_phone = [text for name, kind, text in drawn if name == row.arm.name and kind != " wide"]
        whole = " ".join(on_phone)
        assert f"{row.arm.name} \N{MINUS SIGN} {row.other.name}" in whole
        assert re.search(r"[\d.]+ \[.*\]", whole)
        assert (row.word or "") in whole
        assert ("not equal compute" in whole) == row.unequal
        assert max(map(text_width, on_phone)) <= 325
    long = replace(differences(results)[0], arm=replace(results.arm("starts"), name="a-longer-name-of-an-arm-with-two-assistants"))
    assert [left for left, _ in _phone_lines(long, "rouge_l")][:2] == [f"{long.arm.name} \N{MINUS SIGN}", "equal"]


def test_zero_and_margin_are_not_drawn_through_the_texts(results):
    drawn = difference_figure(results).html()
    texts = [float(y) for y in re.findall(r'class="(?:name|note)[^"]*" x="[^"]*" y="([\d.]+)"', drawn)]
    spans = [sorted(map(float, ends)) for ends in re.findall(r'class="zero" [^>]*y1="([\d.]+)" [^>]*y2="([\d.]+)"', drawn)]
    spans += [(float(y), float(y) + float(high)) for y, high in re.findall(r'class="margin" [^>]*y="([\d.]+)" height="([\d.]+)"', drawn)]
    assert len(spans) == 2 * len(differences(results))
    assert not [(y, span) for y in texts for span in spans if y - 10 < span[1] and span[0] < y + 2]


def test_the_heading_of_the_comparison_says_better_and_worse(results):
    said = against(results)
    assert said.startswith(
        "teaches is clearly worse than direct distillation; starts is not clearly better or worse (teaches: not at equal"
    )
    rest = said.partition("); ")[2]
    for row in differences(results):
        side = "better" if row.difference.mean > 0 else "worse"
        clear = row.word is None and not row.difference.covers_zero
        assert bool(re.search(rf"{row.arm.name}\b[^;]* clearly {side}[^;]* than {row.other.name}", rest)) == clear


@pytest.mark.parametrize(
    ("seeds", "p", "is_clear"),
    [((1, 2, 3), 0.001, True), ((1, 2), 0.001, False), ((1, 2, 3), 0.04, False)],  # the last one not after correction for two rows
)
def test_clear_has_one_meaning(results, seeds, p, is_clear):
    """Also for an arm that is not trained and a row that the study does not test: three seeds, and a corrected p-value."""
    d = Difference(-5.0, -9.0, -1.0, p, 1.0, 4.0, -8.0, -2.0)
    start = replace(results.arm("kd"), final=dict.fromkeys(seeds))
    row = ForestRow(start, results.arm("direct"), d, dict.fromkeys(seeds, -5.0), None)
    other = replace(row, difference=replace(d, low=-9.0, high=1.0, p=0.2))
    assert _clear(results, [row, other]) == [row] * is_clear


@pytest.mark.parametrize(
    ("rising", "said"),
    [
        ([True], "a0 had its best ROUGE-L on dev at the end: more training may still help it"),
        ([True, True], "Both arms had their best ROUGE-L on dev at the end: more training may still help them"),
        ([True, False, False], "1 of 3 arms had their best ROUGE-L on dev at the end: more training may still help them"),
        ([False, False, False], "All 3 arms had their best ROUGE-L on dev before the end of training"),
        ([None, False], "1 of 2 arms had their best ROUGE-L on dev before the end of training"),
        ([None, True, None], "1 of 3 arms had their best ROUGE-L on dev at the end: more training may still help them"),
        ([None, None], "ROUGE-L on dev did not change during training"),
    ],
)
def test_the_heading_of_the_learning_curves_counts_arms(results, rising, said):
    last = {True: [3.0, 4.0], False: [3.0, 2.0], None: [1.0, 1.0]}
    found = [Curve(f"a{i}", f"a{i}", "dev/rouge_l", ([1, 2, 3], [1.0, *last[up]]), {}) for i, up in enumerate(rising)]
    assert learning(results, found) == said


def test_an_arm_without_an_error_budget_is_explained(results):
    distance, without = budget_notes(results)  # no dashed line: `teaches` has no equal-compute baseline
    assert re.match(r"\d+ % of the distance between teaches and its teacher comes from the step between l and xl: ", distance)
    assert without == "starts has no error budget, because no assistant teaches the student of this arm."


def test_dashed_lines_are_named_where_they_are(tmp_path):
    results = build_study(tmp_path, StudySpec(SMALL, seeds=(1, 2, 3))).read()
    assert budget_notes(results) == ["The dashed line is the equal-compute baseline."]
    assert paths(results).split(" % ")[1].startswith("of the distance between chain and its teacher")
    assert lattice_notes(results) == ["The number below an assistant is its last dev value."]


def test_pruning_is_drawn(results):
    nodes = lattice(results)
    student, chain = nodes["arm", "starts"], nodes["arm", "teaches"]
    assert student.start == chain.parent  # the same l
    assert [arm.name for arm in nodes[student.start].arms] == ["teaches", "starts"]
    assert nodes[student.parent].model == "xl"
    html = lattice_figure(results).html()
    assert 'data-tip="s is pruned from l"' in html
    assert any(sentence.startswith("A dotted line shows pruning, not distillation") for sentence in lattice_notes(results))
    rows = {tuple(row["arms"]): row for row in distillations(results)}
    assert rows["starts",]["pruned_from"] == "l"
    assert rows["teaches",]["pruned_from"] is None


def test_a_pruned_student_without_a_chain_draws_its_model_above_its_row(tmp_path):
    results = build_study(tmp_path, StudySpec([PRUNED], seeds=(1,))).read()
    nodes = lattice(results)
    model = nodes[nodes["arm", "starts"].start]
    assert (model.model, model.row, nodes[model.parent].model, model.flops) == ("l", -0.3, "xl", 1e16)


@pytest.mark.parametrize(
    ("text", "path", "words", "said", "more"),
    [
        ("l > s then xl > s", ("xl", "s"), "taught by l, then by xl", "l teaches s; xl teaches s", ("l",)),
        ("xl > l > s, dense", ("xl", "l", "s"), "taught by xl and l together", "xl teaches l; xl and l teach s", ("xl",)),
        ("xl > l > s, s from l", ("xl", "l", "s"), "pruned from l, then taught by xl through l",
         "xl teaches l; s is pruned from l; l teaches s", ()),
        ("xl > s, control no_teacher of c", ("xl", "s"), "trained without a teacher (control of c)",
         "s is trained without a teacher (control of c)", ()),
    ],
)  # fmt: skip
def test_every_kind_of_path_has_words_and_lines(tmp_path, text, path, words, said, more):
    results = build_study(tmp_path, StudySpec([ArmSpec("arm", path, text=text)], seeds=(1,))).read()
    (arm,) = results.plan.arms
    assert (taught(arm), steps(arm), arm_words(results)) == (words, said, {"arm": words})
    nodes = lattice(results)
    assert [nodes[at].model for at in nodes["arm", "arm"].others] == [*more]
    html = figure.html() if (figure := lattice_figure(results)) else ""
    assert (html == "") == ("no_teacher" in text)
    assert ("is pruned from l" in html) == ("from l" in text)
    assert (f"{(*more, '')[0]} teaches s too" in html) == bool(more)


def test_the_number_of_seeds_is_of_the_observed_size(results):
    found, (c, *_) = answer(results), by_importance(results)
    assert c.seeds_needed > 3
    size = f"a true difference of the observed size ({number(abs(c.difference.mean), 'rouge_l')} points)"
    assert f" training seeds would detect {size} with 80 % power, if the true variances are the observed ones." in found.next
    shown = int(re.search(r"About ([\d,]+) training", found.next)[1].replace(",", ""))
    assert c.seeds_needed <= shown == next_seeds(results) < 1.1 * c.seeds_needed + 1
    assert {needed_text(other) for other in comparisons(results) if other.word != "no evidence"} <= {""}


@pytest.mark.parametrize(("gain", "seeds", "decided"), [(9.0, (1,), False), (1.0, (1, 2, 3), False), (9.0, (1, 2, 3), True)])
def test_the_command_with_more_seeds_is_that_of_the_sentence(tmp_path, gain, seeds, decided):
    """It used to add two seeds to any number, also if the sentence asked for another number, or for test prompts."""
    arms = [ArmSpec("direct", ("xl", "s")), ArmSpec("chain", ("xl", "l", "s"), gain=gain, compute="1x direct")]
    study = build_study(tmp_path, StudySpec(arms, seeds=seeds, sets={"dolly": 40}, fact_sets=()))
    said = re.search(r"(?:at least|About) (\d+) training seeds", answer(study.read()).next)
    assert (said is None) == decided
    offered = [command.count(",") + 1 for command, why in _next_commands(study.read(), study.study_dir) if re.match(r"Train \d", why)]
    assert offered == ([int(said[1])] if said else [])


def test_the_command_with_more_seeds_keeps_their_order(tmp_path):
    """It sorted them, but the recipe's first seed is the one that `export` copies."""
    study = build_study(tmp_path, StudySpec([ArmSpec("direct", ("xl", "s")), ArmSpec("chain", ("xl", "l", "s"))], seeds=(3, 1)))
    (command,) = [command for command, why in _next_commands(study.read(), study.study_dir) if re.match(r"Train \d", why)]
    assert "seeds=[3,1,5" in command


def test_more_seeds_are_not_asked_for_if_they_cannot_help(results):
    (c, *_) = by_importance(results)
    assert needed_seeds(replace(c, seeds_needed=None)) is None
    assert needed_text(replace(c, seeds_needed=None)).startswith(" More training seeds alone would not detect a true difference of the ")
    assert needed_seeds(replace(c, seeds_needed=1234)) == 1300


def test_with_one_seed_the_report_says_that_intervals_cover_prompts_only(tmp_path):
    arms = [ArmSpec("sft", ("s",), method="sft"), ArmSpec("kd", ("xl", "s"), gain=12)]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1,), sets={"dolly": 40}, fact_sets=())).read()
    few = "1 seed is too few for a claim (at least 3 are needed)."
    assert answer(results).against_sft.startswith(f"Distillation is not clearly better than plain fine-tuning (SFT, sft): {few} With ")
    assert cautions(results)[-1].endswith("The intervals cover prompts only, not the variation between trainings.")
    assert "t intervals over prompts, not over training seeds, of which there is one." in interval_method(results)
    assert "\n\nMean over prompts and decoding seeds, with its 95 % interval. " in render_markdown(results)


def test_two_arms_have_a_difference_in_the_answer(tmp_path):
    arms = [ArmSpec("a", ("s",), gain=-9), ArmSpec("b", ("l",))]
    spec = StudySpec(arms, seeds=(0,), sets={"dolly": 40}, fact_sets=(), trained=False, teacher=None)
    found = answer(build_study(tmp_path, spec).read())
    assert found.question == "Which of 2 models is better?"
    assert re.search(r", and clearly beats a: the difference is \+\S+ points \(95 % interval \d\S+ to \d\S+\)\.$", found.answer)


def test_a_gain_over_fine_tuning_that_only_the_correction_removes_is_said(tmp_path):
    spread = [ArmSpec("sft", ("s",), flops=1e15), *(ArmSpec(f"a{i}", ("xl", "s"), gain=gain) for i, gain in enumerate((1.6, 0, 0, 0)))]
    found = answer(build_study(tmp_path, StudySpec(spread, seeds=(1, 2, 3), sets={"dolly": 40}, fact_sets=())).results).against_sft
    assert re.match(
        r"Distillation is not clearly better than plain fine-tuning \(SFT, sft\)\. With sampled answers, the best of 4 distilled arms "
        r"\(a0\) differs by \+\S+ points of ROUGE-L \(95 % interval \S+ to \S+\)\. With greedy answers, the best of them \(\S+\) differs ",
        found,
    )
    assert re.search(
        r" Of 8 such differences \(one for each arm and kind of answer\), 2 have an interval above 0, but none is clear after "
        r"correction for 8 comparisons \(smallest p = 0\.\d+\)\.$",
        found,
    )
