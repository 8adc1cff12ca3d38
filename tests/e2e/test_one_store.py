"""Two commands on one store at the same time, and a study that grows: every stage is trained once."""

import json
import subprocess
from pathlib import Path

from tests.e2e import forked
from tests.e2e.test_study import command, manifests, rows, run_here

ARMS = "{direct: xl > s, takd: xl > l > s}"
SMALL = [
    *("method.optim.steps=4", "method.sampler.rollouts=16", "method.sampler.inner_epochs=1"),
    *("data.test=[tinyworld]", "evaluate.seeds=[1]", "models.xl.sft.optim.steps=10", "models.l.sft.optim.steps=5"),
    *("models.xl.sft.select.every=5", "models.l.sft.select.every=5", "models.s.sft.optim.steps=5"),
]


def trainings(runs: Path) -> list[str]:
    found = (json.loads(Path(p).read_text()) for p in manifests(runs))
    return sorted(m["label"] for m in found if m["kind"] in ("sft", "distill"))


def test_two_at_once_share_their_stages_and_a_study_grows_by_what_is_new(tmp_path):
    runs, alone = tmp_path / "together", tmp_path / "alone"
    commands = [command(runs, "seeds=[1]", *SMALL, arms=ARMS, greedy=False)] * 2
    both = [forked.start(*c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    texts = [p.communicate(timeout=600)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    run_here(alone, "seeds=[1]", *SMALL, arms=ARMS, greedy=False)
    assert rows(runs) == rows(alone)
    expected = ["distill l -> s", "distill xl -> l", "distill xl -> s", "sft l", "sft s", "sft xl"]
    assert [label.split(",")[0] for label in trainings(runs)] == expected
    before = manifests(runs)
    more = "{direct: xl > s, takd: xl > l > s, via-kd: {path: xl > l > s, select: {every: 2}}}"
    run_here(runs, "seeds=[1, 2]", *SMALL, arms=more, greedy=False)
    after = manifests(runs)
    assert {p: t for p, t in after.items() if p in before} == before
    # a seed: all but the fixed teacher; an arm: its own two stages for each seed
    assert len(trainings(runs)) == len(expected) + 5 + 4
