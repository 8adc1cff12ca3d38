"""The verdict on chains: its word, its tests, its controls, and what it says of models alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tadistill.metrics import MEAN
from tadistill.report import write_report
from tadistill.report.answer import answer
from tadistill.report.explain import caution_texts, cautions, verdict_text
from tadistill.report.findings import against
from tadistill.report.tables import sample_text
from tadistill.results.compare import Mechanism, compare
from tadistill.results.verdict import _credit, _word, comparisons
from tadistill.statistics import Difference, holm, inflation, macro_difference, minimum_detectable_effect, sign_flip

from .builder import ArmSpec, StudySpec, build_study, key_of

SEEDS = (1, 2, 3, 4, 5)
SETS = {"dolly": 60, "vicuna": 30}


def chain_study(tmp_path, *arms, margin=None, **changes):
    study = build_study(tmp_path, StudySpec(list(arms), **{"seeds": SEEDS, "sets": SETS, "fact_sets": (), **changes}))
    if margin is not None:
        plan = json.loads((study.study_dir / "plan.json").read_text())
        plan["recipe"]["margin"] = margin
        (study.study_dir / "plan.json").write_text(json.dumps(plan))
    return study, study.read()


def pair_of(gain, **changes):
    return ArmSpec("chain", ("xl", "l", "s"), gain=gain, **changes), ArmSpec("twin", ("xl", "s"), compute="as chain")


def stacks(study, arm, metric="rouge_l"):
    return [np.stack([study.scores[arm, seed][name][metric].mean(axis=1, keepdims=True) for seed in SEEDS]) for name in SETS]


def test_the_numbers_of_a_comparison(tmp_path):
    study, results = chain_study(tmp_path, *pair_of(1.0), ArmSpec("other", ("xl", "m", "s")), ArmSpec("direct", ("xl", "s")))
    found = comparisons(results)
    assert [(c.arm, c.other, c.against) for c in found] == [("chain", "twin", "equal compute"), ("other", "direct", "plain direct")]
    expected = [macro_difference(stacks(study, a), stacks(study, b), bounds=(0, 100)) for a, b in (("chain", "twin"), ("other", "direct"))]
    assert [c.difference for c in found] == expected
    assert [c.p_holm for c in found] == holm([d.p for d in expected])
    mine, theirs = (np.mean([values.mean(axis=(1, 2)) for values in stacks(study, arm)], axis=0) for arm in ("chain", "twin"))
    per_seed = mine - theirs
    assert list(found[0].per_seed.values()) == pytest.approx(per_seed)
    assert found[0].sign_flip == sign_flip(per_seed)
    assert found[0].sign_flip.smallest == 2 / 32
    assert found[0].detectable == minimum_detectable_effect(expected[0].se, expected[0].df, level=1 - 0.05 / 2)  # Holm over two


@pytest.mark.parametrize(
    ("gain", "margin", "seeds", "word", "phrase"),
    [
        (4.0, 0.3, SEEDS, "gain", "Verdict: clearly better (p"),
        (-4.0, 0.3, SEEDS, "loss", "Verdict: clearly worse (p"),
        (0.0, 4.0, SEEDS, "equivalent", "Verdict: equivalent, within the margin of ±4.0."),
        (
            0.0,
            0.01,
            SEEDS,
            "no evidence",
            "undecided. The interval contains 0, so the difference may be chance. A true",
        ),
        (
            4.0,
            0.3,
            (1, 2),
            "no evidence",
            "undecided. 2 seeds are too few for a claim (at least 3 are needed).",
        ),
        (0.0, 9.0, (1,), "no evidence", "undecided. 1 seed is too few for a claim (at least 3 are needed)."),
    ],
)
def test_words(tmp_path, gain, margin, seeds, word, phrase):
    _, results = chain_study(tmp_path, *pair_of(gain), margin=margin, seeds=seeds)
    (comparison,) = comparisons(results)
    assert comparison.word == word
    sentence = verdict_text(results, comparison)
    start = "TA path xl > l > s (chain) against direct distillation with the same compute (twin): the difference in ROUGE-L is "
    assert sentence.startswith(start)
    assert " points (95 % interval " in sentence
    assert phrase in sentence
    assert "would often be missed" not in sentence or word == "no evidence"


def difference(mean, half=0.5, p=0.001):
    return Difference(mean, mean - half, mean + half, p, half / 2, 20.0, mean - 0.8 * half, mean + 0.8 * half)


def test_an_interval_alone_is_no_gain():
    assert _word(difference(1.0), 0.06, False, enough=True) == "no evidence"
    assert _word(difference(1.0), 0.04, False, enough=True) == "gain"
    assert _word(difference(0.4), 0.04, True, enough=True) == "equivalent"  # the interval covers 0


@pytest.mark.parametrize(
    ("forward", "reverse", "greedy", "matched", "credit"),
    [
        (0.0, 0.0, 1.0, 1.0, "credited"),
        (-1.0, 0.3, 1.0, None, "credited"),
        (0.0, 1.0, 1.0, 1.0, "farther from the teacher"),
        (1.0, 0.0, 0.1, 0.1, "sharpening"),
        (0.0, 0.0, 0.2, 1.0, "sharpening"),
        (0.0, 0.0, None, -0.2, "sharpening"),
        (0.0, 0.0, None, None, "not measured"),
        (None, 0.0, 1.0, 1.0, "not measured"),
    ],
)
def test_what_a_gain_is_credited_to(forward, reverse, greedy, matched, credit):
    values = [None if value is None else difference(value) for value in (forward, reverse, greedy, matched)]
    assert _credit(Mechanism(values[0], values[1], None, values[2], "matched", values[3], 1.0)) == credit


def test_a_sharper_arm_is_called_sharpening(tmp_path):
    _, results = chain_study(tmp_path, *pair_of(0.0, sharper=0.8), also={"greedy": {"temperature": 0.0}, "t0.1": {"temperature": 0.1}})
    (comparison,) = comparisons(results)
    assert (comparison.word, comparison.mechanism.curves) == ("gain", "matched")
    assert comparison.difference.low > 1 > abs(comparison.mechanism.matched.mean)
    assert comparison.mechanism.at_entropy == pytest.approx(results.summaries["chain", MEAN, "entropy"].mean)
    assert "The gain is not credited to the path, but to sharpening: " in verdict_text(results, comparison)
    assert comparison.credit == "sharpening"
    assert against(results) == "chain is clearly better than twin"  # and no second row for twin - chain


def test_entropies_that_do_not_overlap_are_said_to_be_apart(tmp_path):
    _, results = chain_study(tmp_path, *pair_of(0.0, sharper=0.9), also={"t0.9": {"temperature": 0.9}})
    assert comparisons(results)[0].mechanism.curves == "apart"
    assert comparisons(results)[0].mechanism.greedy is None


def test_selection_among_more_checkpoints_is_a_caution(tmp_path):
    study, results = chain_study(tmp_path, *pair_of(0.0))
    (comparison,) = comparisons(results)
    assert (comparison.selection.mine, comparison.selection.theirs) == (20, 10)  # two hops; one; both share the sft
    variances = []
    for path, name in ((("xl", "l", "s"), "chain"), (("xl", "s"), "twin")):
        for seed in SEEDS:
            key = key_of("distill", path, seed, name)
            log = (study.store_dir / key[:2] / key / "metrics.jsonl").read_text().splitlines()
            values = [json.loads(line)["dev/rouge_l"] for line in log if "dev/rouge_l" in line]
            variances.append(np.var(values[len(values) // 2 :], ddof=1))
    assert comparison.selection.sigma == pytest.approx(np.sqrt(np.mean(variances)))
    assert comparison.selection.inflation == pytest.approx(inflation(20, 10, comparison.selection.sigma))
    assert caution_texts(comparison)[0].startswith(
        "The trainings of chain chose among 20 checkpoints on dev, those of twin among 10 (trainings that both arms "
        "share are not counted). "
        "By chance, a choice among more checkpoints raises the score of chain by at most "
    )


def test_a_training_with_one_checkpoint_chose_nothing(tmp_path):
    """A path with assistants has more trainings, but no choice."""
    study, _ = chain_study(tmp_path, *pair_of(0.0))
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["stages"] = [stage | {"checkpoints": min(stage["checkpoints"], 1)} for stage in plan["stages"]]
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    assert comparisons(study.read())[0].selection is None


def test_seeds_that_only_one_side_has_are_named(tmp_path):
    _, results = chain_study(tmp_path, *pair_of(0.0), unfinished=(("twin", 5),))
    assert "chain and twin are compared on the training seeds that both have finished: 1, 2, 3, 4." in caution_texts(
        comparisons(results)[0]
    )


class Listed:
    """Counts how often all members of a mapping or a tuple are listed."""

    def __init__(self, members):
        self.members, self.times = members, 0

    def __getitem__(self, at):
        return self.members[at]

    def __iter__(self):
        self.times += 1
        return iter(self.members)

    def values(self):
        self.times += 1
        return self.members.values()


@pytest.mark.parametrize("arms", [3, 6])
def test_pairs_of_arms_do_not_list_all_scores_and_stages_again(tmp_path, arms):
    found = build_study(tmp_path, StudySpec([ArmSpec(f"kd-{i}", ("xl", "s")) for i in range(arms)], decoding_seeds=1)).read()
    scores, stages = Listed(found.scores), Listed(found.plan.stages)
    results = replace(found, plan=replace(found.plan, stages=stages), scores=scores)
    assert len(comparisons(results)) == arms * (arms - 1) // 2
    assert (scores.times, stages.times) == (2, 1)


def test_models_alone_are_compared_in_pairs(tmp_path):
    arms = [ArmSpec("a", ("xl",)), ArmSpec("b", ("l",), gain=4.0), ArmSpec("c", ("s",))]
    _, results = chain_study(tmp_path, *arms, seeds=(0,), teacher=None, trained=False)
    found = comparisons(results)
    assert [(c.arm, c.other, c.word) for c in found][::2] == [("a", "b", "loss"), ("b", "c", "gain")]
    assert {c.family for c in found} == {3}
    assert {c.sign_flip for c in found} == {None}
    assert not [text for text in cautions(results) if "too few" in text]
    assert sample_text(results, results.arm("a")) == "90 prompts, 3 decoding seeds"
    said = answer(results)
    assert said.question == "Which of 3 models is the best?"
    assert (said.kind, said.badge) == ("best", "Clear")
    assert said.answer.startswith("b has the highest mean, ")
    assert said.answer.endswith(", and clearly beats all others.")
    assert said.against_sft == ""


@pytest.mark.parametrize("open_seeds", [(), (3,), (1, 2, 3)])
def test_an_unfinished_arm_does_not_hide_that_others_beat_fine_tuning(tmp_path, open_seeds):
    """The sentence about SFT and the heading of the comparison agree, as each pair counts its own common seeds."""
    arms = [ArmSpec("sft", ("s",), method="sft"), ArmSpec("kd", ("xl", "s"), gain=12), ArmSpec("bad", ("xl", "s"), gain=1)]
    spec = StudySpec(arms, seeds=(1, 2, 3), sets={"dolly": 40}, fact_sets=(), unfinished=tuple(("bad", seed) for seed in open_seeds))
    results = build_study(tmp_path, spec).read()
    assert answer(results).against_sft.startswith("Distillation is clearly better than plain fine-tuning (SFT, sft).")
    assert any(text in against(results) for text in ("kd than sft", "kd is clearly better than sft", "sft is clearly worse than kd"))


def test_the_correction_counts_unfinished_arms_against_fine_tuning(tmp_path):
    """And in a study with assistants, whose verdicts are about other pairs, the heading uses the same corrected p-values as the answer."""
    rest = [ArmSpec(f"a{i}", ("xl", "s")) for i in range(12)]
    arms = [ArmSpec("sft", ("s",), method="sft"), ArmSpec("direct", ("xl", "s"), gain=4), ArmSpec("chain", ("xl", "l", "s")), *rest]
    unfinished = tuple((arm.name, seed) for arm in rest for seed in (1, 2, 3))
    spec = StudySpec(arms, seeds=(1, 2, 3), sets={"dolly": 12}, fact_sets=(), also={}, unfinished=unfinished)
    results = build_study(tmp_path, spec).read()
    compared = compare(results, "direct", "sft", "rouge_l")
    assert compared is not None
    assert 0.05 / 14 < compared[0].p < 0.05
    assert "is not clearly better than plain fine-tuning (SFT, sft)" in answer(results).against_sft
    assert "after correction for 14 comparisons" in answer(results).against_sft
    assert "sft is clearly" not in against(results)


def test_a_set_with_one_row_has_no_interval_and_decides_nothing(tmp_path):
    """Its part of the variance used to count as 0, so the interval of the mean over sets became narrower, and a verdict followed."""
    arms = [ArmSpec("xl", ("xl",), gain=6), ArmSpec("s", ("s",))]
    spec = StudySpec(arms, seeds=(0,), sets={"dolly": 40, "one": 1}, fact_sets=(), trained=False, teacher=None)
    study = build_study(tmp_path, spec)
    results = study.read()
    said = answer(results)
    assert said.kind == "open"
    assert said.answer.endswith(
        "ROUGE-L, but does not clearly beat s: the difference is +3.0 points (no interval: a test set has only one prompt)."
    )
    assert cautions(results) == [
        "one has only one row that all arms answered. How scores vary between rows is then unknown, so means with it have no interval, and "
        "nothing is claimed about them. Give it at least two rows, or leave it out."
    ]
    (compared,) = comparisons(results)
    assert "A test set has only one prompt, so the difference cannot be tested." in verdict_text(results, compared)
    assert "(no interval: a test set has only one prompt)" in verdict_text(results, compared)
    write_report(results)
    written = json.loads((study.study_dir / "results.json").read_text())
    ends = {(m["set"], m["low"] is None) for m in written["means"] if m["arm"] == "xl" and m["metric"] == "rouge_l"}
    assert ends == {("dolly", False), ("one", True), ("mean", True)}
    assert [(c["low"], c["p"]) for c in written["comparisons"]] == [(None, 1.0)]
