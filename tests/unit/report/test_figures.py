"""What the figures compute: fronts, exposure bias, pooled calibration, the lattice; and what they leave out."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tadistill.metrics import MEAN
from tadistill.report.explain import cautions
from tadistill.report.figures import looks
from tadistill.report.figures.behaviour import curve_figures, exposure_figure
from tadistill.report.figures.compute import cost_figure, cost_points
from tadistill.report.figures.paths import Budget, budget_figures, budget_text, lattice, lattice_figure, lattice_notes
from tadistill.report.figures.scores import difference_figure, means_figure
from tadistill.results import sample_answers
from tadistill.results.collect import Summary
from tadistill.results.curves import accumulated_error, exposures, learning_curves, reliabilities
from tadistill.results.sample_answers import first_answers, samples, shown_first
from tadistill.statistics import undominated

from .builder import SMALL, ArmSpec, StudySpec, build_study, key_of


def read(study):
    return study.read()


def stage_file(study, what, arm, seed, name):
    key = key_of(what, arm, seed)
    return study.store_dir / key[:2] / key / name


def test_the_front_keeps_what_nothing_cheaper_beats():
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (3.0, 4.0), (4.0, 5.0), (5.0, 6.0)]
    assert undominated(points, lambda point: (point[0], -point[1])) == [(1.0, 2.0), (3.0, 5.0), (5.0, 6.0)]


def test_accumulated_error_is_relative_to_the_teachers_prefixes():
    student, teacher = np.array([0.5, 0.7, 0.9]), np.array([0.5, 0.5, 0.5])
    assert accumulated_error(student, teacher) == pytest.approx([0.0, 20.0, 40.0])
    assert np.isnan(accumulated_error(student, np.array([0.0, 0.5, 0.5]))[0])


def test_exposure_weighs_sets_by_answers_and_marks_few(study):
    table = {
        "dolly": {"student": {"kl": [1.0, 2.0, 4.0], "count": [30, 30, 5]}, "teacher": {"kl": [1.0, 1.0, 1.0], "count": [30, 30, 6]}},
        "facts": {"student": {"kl": [3.0], "count": [10]}, "teacher": {"kl": [1.0], "count": [10]}},
    }
    for seed in (10, 20):
        stage_file(study, "analyse", "direct", seed, "exposure.json").write_text(json.dumps(table))
    found = exposures(read(study))["direct"]
    assert found.mean == pytest.approx([50.0, 75.0, 100 * (7.5 - 3) / 3])  # (30 x 1 + 10 x 3) / 40 = 1.5 at the first position
    assert found.solid == 2
    assert set(found.seeds) == {10, 20}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ((0.05, 0.01, 0.09), "8 % of the distance between chain and its teacher comes from the step between l and xl: 0.050 of 0.600 n"),
        ((-1.2, -8.3, 6.0), "The step between l and xl may add nothing to the distance between chain and its teacher: −1.200 [−8.300,"),
        ((0.05, 0.05, 0.05), "The step between l and xl may add nothing to the distance between chain and its teacher: 0.050"),
        ((-0.2, -0.3, -0.1), "chain is closer to its teacher than to its last assistant l: 0.600 against 5.500 nats/token"),
    ],
)  # fmt: skip
def test_an_error_budget_stays_in_its_box_and_its_sentence_claims_what_the_interval_shows(study, monkeypatch, step, said):
    results, added, first, total = read(study), Summary(*step, {}), Summary(5.5, -0.2, 11.3, {}), Summary(0.6, 0.5, 0.7, {})
    wide = Budget(results.arm("chain"), (("KL(s ‖ l)", first), ("l → xl", added)), added, ("KL(s ‖ xl)", total), None)
    assert budget_text(results, wide).startswith(said)
    monkeypatch.setattr("tadistill.report.figures.paths.budgets", lambda results: [wide])
    (chart,) = budget_figures(results).values()
    whiskers = re.findall(r'class="whisker" [^>]*y1="([-\d.]+)" y2="([-\d.]+)"', chart.html())
    assert len(whiskers) == 3
    assert all(chart.head <= float(end) <= chart.head + chart.height for ends in whiskers for end in ends)


def test_an_exposure_that_is_not_measured_is_named(study):
    for path in study.store_dir.rglob("exposure.json"):
        path.write_text(json.dumps({"dolly": None, "facts": None}))
    results = read(study)
    assert exposures(results) == {}
    why = "it needs answers of the teacher xl, and the server of xl wrote none"
    assert f"The exposure bias is not measured, because {why}." in cautions(results)
    others = tuple({arm.model for arm in results.plan.arms if arm.model} - {"xl"})
    apart = replace(results, plan=replace(results.plan, tokenizers=(("xl",), others)))  # no student has the teacher's tokenizer
    assert not [text for text in cautions(apart) if "ran on a server" in text]


def test_calibration_is_pooled_by_count(study):
    for seed in (10, 20):
        path = stage_file(study, "evaluate", "direct", seed, "corpus.json")
        corpus = json.loads(path.read_text())
        for name, (count, correct) in {"dolly": (30, 0.5), "facts": (10, 0.9)}.items():
            bins = {"count": [count] + [0] * 14, "confidence": [0.6] + [0.0] * 14, "correct": [correct] + [0.0] * 14}
            corpus[name]["calibration"] = {"tokens": bins}
        path.write_text(json.dumps(corpus))
    found = reliabilities(read(study), "tokens")["direct"]
    assert found.confidence == pytest.approx([60.0])
    assert found.correct == pytest.approx([60.0])  # (30 x 50 + 10 x 90) / 40
    assert found.count == pytest.approx([2 * 40])
    assert reliabilities(read(study), "labels") == {}


def test_learning_curves_name_their_arms_and_begin_with_distillations(tmp_path):
    arms = [ArmSpec("sft", ("s",), method="sft"), ArmSpec("kd", ("xl", "s"), method="forward_kl (dataset)")]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1, 2))).read()
    figures = curve_figures(learning_curves(results), results)
    assert [title for title in figures if title.startswith("training loss")] == [
        "training loss: forward_kl (dataset)",
        "training loss: sft",
    ]
    for title, figure in figures.items():
        names = set(re.findall(r'<text class="label" data-arm="(\w+)"', html := figure.html()))
        assert names, title
        assert set(re.findall(r'<span data-arm="(\w+)">', html)) == names  # below the figure on a phone


def test_each_dev_set_has_a_learning_curve(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL))
    for log in study.store_dir.glob("*/*/metrics.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        of_sets = [{f"dev/rouge_l/{name}": line["dev/rouge_l"] + more for name, more in (("maths", 1), ("my chat", -1))} for line in lines]
        log.write_text("".join(json.dumps(line | more) + "\n" for line, more in zip(lines, of_sets, strict=True)))
    results = study.read()
    figures = curve_figures(learning_curves(results), results)
    assert [title for title in figures if title.startswith("ROUGE-L")] == [
        "ROUGE-L on dev",
        "ROUGE-L on dev: maths",
        "ROUGE-L on dev: my chat",
    ]
    names = re.findall(r'<div class="chart" id="([^"]+)"', "".join(figure.html() for figure in figures.values()))
    assert len({*names}) == len(figures)


def test_arms_share_assistants_in_the_lattice(tmp_path):
    arms = [*SMALL, ArmSpec("longer-chain", ("xl", "l", "m", "s")), ArmSpec("sft", ("s",))]
    nodes = lattice(read(build_study(tmp_path, StudySpec(arms))))
    shared = [node for node in nodes.values() if node.model == "l"]
    assert [[arm.name for arm in node.arms] for node in shared] == [["chain", "longer-chain"]]
    assert shared[0].kind == "minillm"
    assert [node.row for at, node in nodes.items() if at[0] == "arm"] == list(range(5))
    rows = {at[1]: node.row for at, node in nodes.items() if at[0] == "arm"}
    assert rows["longer-chain"] == rows["chain"] + 1
    assert nodes["arm", "sft"].parent is None
    assert nodes["arm", "chain"].flops == 2e16  # its fine-tuning and its distillation


def test_the_figure_of_paths_shows_self_teaching_and_controls(tmp_path):
    method = "reverse_kl (student)"
    arms = [
        ArmSpec("sft", ("s",), method="sft"),
        ArmSpec("chain", ("xl", "l", "s"), method=method),
        ArmSpec("nobody", ("xl", "s"), method=method, text="xl > s, control no_teacher of chain"),
        ArmSpec("random", ("xl", "s"), method=method, text="xl > s, control random_teacher of chain"),
        ArmSpec("itself", ("s", "s"), method=method, text="s > s, context, ema"),
        ArmSpec("later", ("xl", "s", "s"), method=method, text="xl > s > s, context"),
    ]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1,))).read()
    nodes = {name: lattice(results)["arm", name] for name in ("sft", "chain", "nobody", "random", "itself", "later")}
    assert {name for name, node in nodes.items() if not node.is_taught} == {"sft", "nobody"}
    assert {name for name, node in nodes.items() if node.itself} == {"itself", "later"}
    assert (nodes["itself"].parent, nodes["later"].parent) == (None, ("model", "xl"))
    assert not any(node.others for node in nodes.values())
    assert {node.kind.partition(", ")[2] for node in nodes.values()} == {
        "",
        "random teacher",
        "with a context, moving-average teacher",
        "with a context",
    }
    assert lattice_notes(results)[:2] == [
        "A short line means that the model teaches itself.",
        "No line leads to a student that is trained without a teacher.",
    ]
    figure = lattice_figure(results)
    assert figure is not None
    assert [
        name for name in nodes if f'class="edge" data-arm="{name}"' in figure.html() or f'data-arm="{name}" class="edge"' in figure.html()
    ] == [
        "chain",
        "random",
        "itself",
        "later",
    ]


def test_a_sloping_line_passes_below_the_name_of_its_student(tmp_path):
    """The line from an additional teacher, or from the model that is pruned, ran through the student's name."""
    arms = [ArmSpec("one", ("xl", "l", "s"), method="kd"), ArmSpec("dense", ("xl", "l", "s"), method="kd", text="xl > l > s, dense")]
    figure = lattice_figure(build_study(tmp_path, StudySpec(arms, seeds=(1,))).read())
    assert figure is not None
    html = figure.html()
    names = re.findall(r'y="([\d.]+)" dx="-12" dy="(-\d+)"[^>]*>(\w+)<', html)
    texts = {name: (float(y), float(shift)) for y, shift, name in names}
    lines = re.findall(r'class="edge"[^>]* y1="([\d.]+)"[^>]* y2="([\d.]+)"', html)
    sloping = [(start, end) for start, end in lines if start != end]
    assert sloping
    for start, end in sloping:  # the line is not higher than at its start, and the whole name is above it
        assert texts["dense"] == (float(end), -18)
        assert float(start) >= sum(texts["dense"])
    assert texts["one"][1] == -7


def test_arms_of_equal_cost_stand_apart(tmp_path):
    arms = [ArmSpec(f"arm{i}", ("xl", "s"), flops=1e17 * (1 + 0.001 * i)) for i in range(5)] + [ArmSpec("sft", ("s",), flops=4e15)]
    results = read(build_study(tmp_path, StudySpec(arms, sets={"dolly": 12})))
    assert [p.arm.name for p in cost_points(results, "s")] == ["sft", "arm0", "arm1", "arm2", "arm3", "arm4"]
    figure = cost_figure(results, "s")
    values = json.loads(re.search(r'class="values">(.*?)</script>', figure.html())[1])
    direct = next(p.flops for p in cost_points(results, "s") if p.arm.name == "arm0")
    assert [x for _, x, *_ in values["points"]] == pytest.approx([p.flops / direct for p in cost_points(results, "s")])
    places = [float(x) / 100 for x in re.findall(r'<svg data-arm="[^"]*" class="at" x="([\d.]+)%"', figure.html())]
    assert len(places) == len(values["points"])
    assert min(b - a for a, b in pairwise(places)) > 0.0179
    assert max(places) < 0.99
    for name, _, mean, low, high, tip in values["points"]:
        summary = results.summaries[name, MEAN, "rouge_l"]
        assert (mean, low, high) == pytest.approx((summary.mean, summary.low, summary.high), abs=1e-4)
        assert "training FLOPs" in tip


def test_looks_differ_in_colour_and_marker(tmp_path):
    arms = [ArmSpec(f"arm{index}", ("xl", "s")) for index in range(30)]
    spec = StudySpec(arms, seeds=(1,), unfinished=tuple((arm.name, 1) for arm in arms))
    found = looks(read(build_study(tmp_path, spec)))
    assert len({(look.colour, look.marker) for look in found.values()}) == 30


def test_nothing_to_show_is_no_figure(tmp_path):
    spec = StudySpec([ArmSpec("gpt2", ("s",))], teacher=None, trained=False)
    results = read(build_study(tmp_path, spec))
    figures = (difference_figure(results), cost_figure(results, "s"), exposure_figure(results), lattice_figure(results))
    assert figures == (None, None, None, None)
    assert budget_figures(results) == {}
    assert means_figure(results) is not None


def test_long_answers_leave_fewer_samples(tmp_path):
    results = read(
        build_study(
            tmp_path, StudySpec(SMALL, seeds=(10,), sets={"dolly": 60}, decoding_seeds=1, answer="long " * 4000, fact_sets=(), also={})
        )
    )
    assert len(samples(results)["dolly"]) == 24  # 3 arms x 20.2 kB a prompt, 1.5 MB in all
    assert shown_first(results) == ["direct", "chain", "direct-long"]


def test_only_answers_to_shown_prompts_are_kept(tmp_path, monkeypatch):
    spec = StudySpec([ArmSpec("direct", ("xl", "s"))], seeds=(10,), sets={"dolly": 60}, decoding_seeds=2, fact_sets=(), also={})
    results, kept = read(build_study(tmp_path, spec)), []
    monkeypatch.setattr(sample_answers, "first_answers", lambda rows: kept.append(first_answers(rows)) or kept[-1])
    assert [prompt["index"] for prompt in samples(results)["dolly"]] == sorted(row["index"] for row in kept[0]) == list(range(50))


def test_the_first_answers_are_those_of_the_lowest_decoding_seed():
    rows = [{"set": name, "seed": seed, "index": i} for name, seed in (("a", 2), ("b", 1), ("a", 1), ("b", 2), ("a", 3)) for i in (1, 0)]
    found = [(row["set"], row["seed"], row["index"]) for row in first_answers(iter(rows))]
    assert found == [("a", 1, 1), ("a", 1, 0), ("b", 1, 1), ("b", 1, 0)]
