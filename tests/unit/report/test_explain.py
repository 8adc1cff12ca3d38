"""The analysis: rows with a mark, and explanations that hold the numbers of the study and say what was not measured."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tadistill.config.sampling import StudentSampler
from tadistill.metrics import MEAN
from tadistill.report import explain
from tadistill.report.against_sft import sft_arm
from tadistill.report.analysis import Row, analyses, published
from tadistill.report.answer import answer
from tadistill.report.figures.paths import lattice
from tadistill.report.page import roles
from tadistill.report.path_words import arm_words, hop_text, steps
from tadistill.results.compare import BUCKETS, bucket_difference, bucket_sizes, bucket_title, difference
from tadistill.results.number_text import number, summary_text
from tadistill.results.verdict import comparisons
from tadistill.statistics import Difference, macro_difference

from .builder import SMALL, ArmSpec, StudySpec, build_study

SEEDS = (1, 2, 3)


def analysed(tmp_path, arms, **changes):
    study = build_study(tmp_path, StudySpec(arms, **{"seeds": SEEDS, "sets": {"dolly": 60, "vicuna": 30}, "fact_sets": (), **changes}))
    results = study.read()
    return study, results, {a.arm: a for a in analyses(results)}


def test_published_values_match_inside_the_interval(tmp_path):
    values = {"dolly": 24.5, "vicuna": 40.0, "sinst": 25.3}
    _, results, _ = analysed(tmp_path, [ArmSpec("direct", ("xl", "s"), published={"source": "a paper", "rouge_l": values})])
    (sentence,) = published(results)
    dolly, vicuna = (results.summaries["direct", name, "rouge_l"] for name in ("dolly", "vicuna"))
    assert dolly.low < 24.5 < dolly.high
    assert f"on dolly the interval of {summary_text(dolly, 'rouge_l')} contains the published 24.5" in sentence
    assert f"is {number(40 - vicuna.mean, 'rouge_l')} below the published 40.0" in sentence
    assert "on sinst 25.3 is published, and nothing was measured here" in sentence


def test_the_first_model_of_a_chain_is_no_assistant(tmp_path):
    """In a study that compares no student with its teacher (`analyse: false`), too."""
    arms = [ArmSpec("direct", ("xl", "s")), ArmSpec("chain", ("xl", "l", "s")), ArmSpec("itself", ("s", "s"), text="s > s, context")]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1,), teacher=None)).read()
    assert "through l (" in answer(results).question
    assert roles(results) == {"xl": "teacher", "l": "assistant", "s": "student"}


def test_a_model_that_teaches_itself_is_not_fine_tuned(tmp_path):
    itself = ArmSpec("itself", ("s", "s"), text="s > s, context")
    average = ArmSpec("average", ("s", "s"), text="s > s, context, ema", flops=9e17)
    spec = StudySpec([ArmSpec("sft", ("s",), method="sft"), itself, average], seeds=(1,), teacher=None)
    results = build_study(tmp_path, spec).read()
    words = {"itself": "taught by itself with a context", "average": "taught by its moving average with a context"}
    assert arm_words(results) == {"sft": "plain fine-tuning"} | words
    assert [steps(results.arm(name)) for name in words] == [
        "s teaches itself with a context",
        "the moving average of s teaches s with a context",
    ]
    tuned = sft_arm(results)
    assert tuned is not None
    assert tuned.name == "sft"
    assert not any(arm.is_chain for arm in results.plan.arms)


def test_the_teachers_of_a_route_are_named_with_their_sets(tmp_path):
    route = ArmSpec("mopd", ("xl on maths + l on chat", "s"), method="reverse_kl (student)")
    chain = ArmSpec("chain", ("xl on maths + l on chat", "m", "s"), method="reverse_kl (student)")
    results = build_study(tmp_path, StudySpec([ArmSpec("direct", ("xl", "s")), route, chain], seeds=(1,))).read()
    words = arm_words(results)
    assert words["mopd"] == "taught by xl on maths and l on chat"
    assert words["chain"] == "taught by xl on maths and l on chat through m"
    assert steps(results.arm("chain")) == "xl on maths and l on chat teach m; m teaches s"
    assert "each training set has its own teacher (xl on maths and l on chat) than when xl teaches it directly" in answer(results).question
    nodes = {node.model: node for node in lattice(results).values() if route.name in {arm.name for arm in node.arms}}
    assert nodes.keys() == {"xl", "l", "s"}
    assert [model for _, model in [nodes["s"].parent, *nodes["s"].others]] == ["xl", "l"]


def test_every_arm_is_explained_in_plain_words(tmp_path):
    data, teacher = "forward_kl (dataset)", "cross_entropy (teacher)"
    offline = f"reverse_kl ({StudentSampler(recorded=True).label})"
    arms = {
        ArmSpec("sft", ("s",), method="sft"): "plain fine-tuning",
        ArmSpec("longer", ("s",), method="sft, continued"): "plain fine-tuning, continued",
        ArmSpec("direct", ("xl", "s")): "taught by xl",
        ArmSpec("chain", ("xl", "l", "m", "s")): "taught by xl through l and m",
        ArmSpec("equal", ("xl", "s"), compute="as chain"): "taught by xl, with chain's compute",
        ArmSpec("direct-2x", ("xl", "s"), compute="2x direct"): "taught by xl, with 2 times direct's compute",
        ArmSpec("kd", ("xl", "s"), method=data): "taught by xl on the training data, forward_kl",
        ArmSpec("reverse", ("xl", "s"), method="reverse_kl (dataset)"): "taught by xl on the training data, reverse_kl",
        ArmSpec("seqkd", ("xl", "s"), method=teacher): "fine-tuned on xl's answers",
        ArmSpec("offline", ("xl", "s"), method=offline): "taught by xl on its own answers, written before training",
    }
    results = build_study(tmp_path, StudySpec(list(arms), seeds=(1,))).read()
    assert arm_words(results) == {arm.name: words for arm, words in arms.items()}
    alone = build_study(tmp_path / "alone", StudySpec([ArmSpec("gpt2", ("s",))], seeds=(1,), teacher=None, trained=False)).read()
    assert arm_words(alone) == {}


def test_where_a_chain_helps(tmp_path):
    _, results, found = analysed(tmp_path, SMALL)
    rows = {(row.metric, row.where): row for row in found["chain"].rows}
    for where in ("mean", "dolly", "vicuna"):
        assert rows["rouge_l", where].mark == "better"
        assert rows["rouge_l", where].difference.low > 0
    assert rows["rouge_l", "dolly"].difference == difference(results, "chain", "direct-long", "rouge_l", "dolly")
    for bucket in BUCKETS:
        wanted = bucket_difference(results, "chain", "direct-long", bucket)
        assert rows["rouge_l", f"references of {bucket_title(bucket)} tokens"].difference == wanted
    assert ("perplexity", "9.00", "11.80") in found["chain"].whole


def test_a_range_of_lengths_without_references_has_no_row(tmp_path):
    _, results, found = analysed(tmp_path, SMALL)
    short = replace(results, reference_length={name: np.minimum(n, 10) for name, n in results.reference_length.items()}, kept={})
    assert [row.where for row in found["chain"].rows if "∞" in row.where] == ["references of [11, ∞) tokens"]
    assert [row.where for entry in analyses(short) for row in entry.rows if "∞" in row.where] == []


def test_marks_follow_the_direction_of_the_metric():
    d = Difference(-1.0, -2.0, -0.5, 0.01, 0.4, 9.0, -1.8, -0.6)
    assert [Row(metric, "", d).mark for metric in ("rouge_l", "loss", "entropy")] == ["worse", "better", "worse"]
    assert Row("loss", "", replace(d, high=0.5)).mark == "undecided"
    assert Row("loss", "", None).mark == "not measured"


def test_buckets_hold_the_prompts_of_their_lengths(tmp_path):
    study, results, _ = analysed(tmp_path, SMALL)
    lengths = results.reference_length
    assert sum(bucket_sizes(results).values()) == 90
    chosen = {name: np.flatnonzero((n >= 6) & (n <= 10)) for name, n in lengths.items()}
    pooled = []
    for arm in ("chain", "direct"):
        tables = {n: np.stack([study.scores[arm, s][n]["rouge_l"].mean(axis=1, keepdims=True) for s in SEEDS]) for n in chosen}
        pooled.append(np.concatenate([tables[name][:, rows] for name, rows in chosen.items()], axis=1))
    assert bucket_difference(results, "chain", "direct", (6, 10)) == macro_difference([pooled[0]], [pooled[1]], bounds=(0, 100))


def test_the_error_budget_in_words(tmp_path):
    arms = [ArmSpec("long", ("xl", "l", "m", "s")), ArmSpec("twin", ("xl", "s"), compute="as long")]
    study, results, found = analysed(tmp_path, arms)
    hops = found["long"].explanations["error of each step"][0]
    means = {
        metric: np.mean([[study.scores["long", s][n][metric].mean() for n in ("dolly", "vicuna")] for s in SEEDS])
        for metric in ("reverse_kl", "budget/0", "budget/1", "budget/2")
    }
    assert means["reverse_kl"] == pytest.approx(means["budget/0"] + means["budget/1"] + means["budget/2"])
    added = means["budget/1"] + means["budget/2"]
    assert hops.startswith(f"KL(student ‖ teacher) is {means['reverse_kl']:.3f} [")
    assert re.search(
        rf"nats/token\. {means['budget/0']:.3f} \[\S+ \S+\] of it is the distance to the last assistant m, which taught s\.", hops
    )
    assert found["long"].explanations["error of each step"][1] == "A step such as l > m is positive if s is closer to m than to l."
    assert f"The steps from xl to m add {added:.3f} [" in hops
    assert f"({100 * added / means['reverse_kl']:.0f} % of the total)" in hops
    assert [hop_text(results.arm("long").path, j) for j in (1, 2)] == ["l > m", "xl > l"]
    assert f"l > m {means['budget/1']:.3f} [" in hops


def test_compute_closes_a_share_of_the_gap(tmp_path):
    _, results, found = analysed(tmp_path, SMALL)
    (compute,) = found["chain"].explanations["compute"]
    means = {arm: results.summaries[arm, MEAN, "rouge_l"].mean for arm in ("direct", "chain", "direct-long")}
    share = 100 * (means["direct-long"] - means["direct"]) / (means["chain"] - means["direct"])
    assert f"closes {share:.0f} % of the gap" in compute


def test_what_was_not_measured_is_said(tmp_path):
    _, results, found = analysed(tmp_path, SMALL[:2], also={}, teacher=None)
    (comparison,) = comparisons(results)
    assert comparison.against == "plain direct"
    (sharpening,), (hops,), (compute,) = found["chain"].explanations.values()
    assert "greedy decoding not measured; matched entropy not measured" in sharpening
    assert hops.startswith("The error of each step is not measured")
    assert compute.startswith("The effect of compute is not measured: the study has no arm with `compute: as chain`")


def test_divergences_that_the_recipe_turns_off_are_not_undefined(tmp_path):
    _, results, _ = analysed(tmp_path, SMALL[:2])
    for analyse in (True, False):
        plan = replace(results.plan, tokenizers=(("xl",), ("l", "s")), recipe={**results.plan.recipe, "analyse": analyse})
        found = " ".join(explain.vocabulary_texts(replace(results, plan=plan)))
        assert ("The divergence from xl, the error budget and the exposure bias are not defined across vocabularies" in found) == analyse


def test_nothing_to_say_of_an_arm_alone(tmp_path):
    _, _, found = analysed(tmp_path, [ArmSpec("direct", ("xl", "s"))])
    assert found == {}


def test_what_stages_say_of_cut_answers_is_in_the_report_of_one_tokenizer_too():
    notes = {"a": "7 answers are left out", "b": "2 answers contain a token", "c": "of another kind"}
    stages = [SimpleNamespace(kind=kind, key=key, label=kind) for kind, key in (("retokenise", "a"), ("analyse", "b"), ("distill", "c"))]
    manifests = {key: SimpleNamespace(notes=(note,)) for key, note in notes.items()}
    results = SimpleNamespace(plan=SimpleNamespace(tokenizers=[("t", "s")], stages=stages), manifests=manifests)
    assert explain.vocabulary_texts(results) == ["retokenise: 7 answers are left out. analyse: 2 answers contain a token."]  # type: ignore[arg-type]
