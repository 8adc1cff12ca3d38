"""Arms: teach, then and init edges as a recipe writes them, and mistakes in one sentence."""

import pytest
from pydantic import ValidationError

from tadistill.config import Arm
from tadistill.config.model import Init, ModelConfig


def test_paths_and_their_models():
    arm = Arm.model_validate({"path": "xl > m > s then xl > s"})
    assert arm.path == (("xl", "m", "s"), ("xl", "s"))
    assert (arm.last, arm.models, arm.learners) == (("xl", "s"), ("xl", "m", "s"), ("m", "s", "s"))
    assert arm.text == "xl > m > s then xl > s"
    assert Arm.model_validate("xl > s").learners == ("s",)
    assert Arm.model_validate({"path": ["xl", "s"]}).path == (("xl", "s"),)
    assert Arm.model_validate(arm.model_dump()) == arm


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ("xl > s > xl > q", "names model xl twice, with another model in between; name each model once, or write `xl > xl`"),
        (
            "xl > s then s",
            "has a part with only one model (`then` separates the parts), so nothing is trained there; write each part with two models",
        ),
        ("l > s then xl > l", "trains s, but does not use it after the next `then`; use s in a later part"),
        ({"path": "xl > s", "init": {"m": "xl"}}, "init names m, but path `xl > s` does not teach m"),
        ({"path": "xl > m > s", "init": {"m": "s"}}, "init starts m from s, but s is not before m in `xl > m > s`"),
        ({"path": "xl > s", "dense": {"drop": 1}}, "less than 1"),
        ({"path": "xl > s", "compute": "direct"}, "write `as ARM`"),
    ],
)
def test_mistakes(arm, sentence):
    with pytest.raises(ValidationError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        Arm.model_validate(arm)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"load": "gpt2", "init": {"from": "xl", "layers": 2}}, "exactly one of `load`, `init`, `checkpoint`, `temper` and `api`"),
        ({"temper": {"of": "xl"}}, "exactly one of two keys: `tau`"),
        ({"temper": {"of": "xl", "tau": 1, "like": "a"}}, "exactly one of two keys: `tau`"),
        ({"temper": {"of": "xl", "tau": 0.5}, "sft": {}}, "set `sft` for the model in `temper.of`"),
        ({"init": {"from": "xl"}}, "would prune nothing; set `layers`, `hidden`, `intermediate` or `heads`"),
    ],
)
def test_mistakes_in_models(model, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig.model_validate(model)


def test_what_a_pruned_model_changes():
    assert Init.model_validate({"from": "xl", "layers": 2, "heads": 3}).sizes == {"layers": 2, "heads": 3}
