"""Methods by name: `config/methods.yaml`."""

import pytest

from tadistill.config import validate
from tadistill.config.method import apply
from tadistill.config.objective import JensenShannon, MiniLLM, ReverseKL
from tadistill.config.sampling import DatasetSampler, MixSampler, TeacherMixedSampler
from tadistill.config.shorthand import METHODS
from tadistill.errors import ConfigError

MODEL = {"load": "scratch:llama", "tokenizer": "tinyworld"}


def recipe(method, arm):
    data = {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"]}
    return validate({"study": "t", "seeds": [1], "models": {"xl": MODEL, "s": MODEL}, "data": data, "method": method, "arms": {"a": arm}})


@pytest.mark.parametrize("name", METHODS)
def test_every_name_is_a_method_that_works(name):
    corpus = {"objective": {"pt_weight": 0}} if name.startswith("minillm") else {}
    assert apply(recipe({"name": name} | corpus, "xl > s").method) == recipe({"name": name} | corpus, "xl > s").method


def test_a_name_sets_the_papers_settings_and_other_keys_change_them():
    assert recipe("gkd", "xl > s").method.objective == JensenShannon(beta=0.1)
    changed = recipe({"name": "gkd", "sampler": {"lam": 1}, "optim": {"steps": 7}}, "xl > s").method
    assert (changed.sampler, changed.optim.steps) == (MixSampler(lam=1), 7)
    other = recipe({"name": "gkd", "objective": {"type": "reverse_kl"}}, "xl > s").method
    assert (other.objective, other.sampler) == (ReverseKL(), MixSampler())
    official = recipe({"name": "minillm", "objective": {"preset": "official"}}, "xl > s").method
    assert (official.objective, official.sampler) == (MiniLLM.model_validate({"preset": "official"}), TeacherMixedSampler())


def test_an_arm_with_a_method_takes_nothing_from_the_recipes_own_objective_and_sampler():
    found = recipe(
        {"objective": {"type": "jensen_shannon", "beta": 0.9, "temperature": 2}, "sampler": {"type": "mix"}, "optim": {"lr": 0.1}},
        {"path": "xl > s", "method": "kd"},
    )
    method = apply(found.method, found.arms["a"].patch)
    assert (method.objective.type, method.sampler, method.optim.lr) == ("forward_kl", DatasetSampler(), 0.1)
    found = recipe({"objective": {"type": "jensen_shannon", "temperature": 2}}, {"path": "xl > s", "method": "gkd"})
    assert apply(found.method, found.arms["a"].patch).objective == JensenShannon(beta=0.1)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gkdd", "`gkdd` is not a method; did you mean `gkd`?"),
        ({"objective": {"type": "gkd"}}, "`method.objective` has type 'gkd', which is a method and not an objective; write `method: gkd`"),
        ({"name": "kd", "objective": {"kd_rati": 1}}, "did you mean `kd_ratio`?"),
        ({"nam": "kd"}, "did you mean `name`?"),
        ({"name": ["kd"]}, "is not a method"),
    ],
)
def test_mistakes_are_one_sentence(method, words):
    with pytest.raises(ConfigError) as error:
        recipe(method, "xl > s")
    assert words in str(error.value)
