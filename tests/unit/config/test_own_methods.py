"""Methods by name: `config/methods.yaml`."""

import pytest

from tadistill.config import validate
from tadistill.config.method import METHODS
from tadistill.config.method_rules import apply, phases_of
from tadistill.config.objective import JensenShannon, MiniLLM, ReverseKL
from tadistill.config.sampling import DatasetSampler, MixSampler, StudentSampler, TeacherMixedSampler
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


# --- methods of the recipe's own -----------------------------------------------------------------------------------------

OWN = {
    "cold": {"name": "seqkd", "sampler": {"max_new_tokens": 9}, "optim": {"lr": 0.1}},
    "opd": {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "top_k": 5}},
    "both": {"phases": [{"method": "cold", "share": 0.25}, {"method": "opd", "share": 0.75}]},
    "short": "gkd",
}


def own(arm, methods=None, **changes):
    data = {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"]}
    methods = OWN if methods is None else methods
    base = {"study": "t", "seeds": [1], "models": {"xl": MODEL, "s": MODEL}, "data": data, "methods": methods, "arms": {"a": arm}}
    return validate(base | changes)


def trained_with(found):
    method = apply(found.method, found.models["s"].distill, found.arms["a"].patch)
    return [(m.objective.type, m.sampler.type, m.optim.lr, share) for m, share in phases_of(method)]


COLD, OPD = ("cross_entropy", "teacher", 0.1), ("reverse_kl", "student", 5e-4)


@pytest.mark.parametrize(
    ("arm", "changes", "expected"),
    [
        ({"path": "xl > s", "method": "cold"}, {}, [(*COLD, 1)]),
        ({"path": "xl > s", "method": "both"}, {}, [(*COLD, 0.25), (*OPD, 0.75)]),
        ({"path": "xl > s", "phases": ["cold", {"method": "opd"}]}, {}, [(*COLD, 0.5), (*OPD, 0.5)]),
        ("xl > s", {"method": "both"}, [(*COLD, 0.25), (*OPD, 0.75)]),
        ("xl > s", {"method": {"phases": ["cold", "opd"]}}, [(*COLD, 0.5), (*OPD, 0.5)]),
        ("xl > s", {"models": {"xl": MODEL, "s": MODEL | {"distill": "both"}}}, [(*COLD, 0.25), (*OPD, 0.75)]),
        ("xl > s", {"models": {"xl": MODEL, "s": MODEL | {"distill": {"name": "opd", "optim": {"lr": 0.3}}}}}, [(*OPD[:2], 0.3, 1)]),
        ({"path": "xl > s", "method": "opd"}, {"method": "both"}, [(*OPD, 1)]),  # a method by name has the phases that it names
        ({"path": "xl > s", "method": "short"}, {"method": "both"}, [("jensen_shannon", "mix", 5e-4, 1)]),
    ],
)
def test_a_name_of_ones_own_stands_for_its_keys_in_every_place(arm, changes, expected):
    assert trained_with(own(arm, **changes)) == expected


def test_other_keys_in_the_same_place_change_the_keys_of_a_name():
    found = own({"path": "xl > s", "method": "opd", "sampler": {"top_p": 0.5}, "objective": {"type": "forward_kl"}})
    method = apply(found.method, found.arms["a"].patch)
    assert (method.sampler, method.objective.type) == (StudentSampler(top_k=5, top_p=0.5), "forward_kl")
    found = own({"path": "xl > s", "phases": [{"method": "cold", "sampler": {"temperature": 0}}, "opd"]})
    (first, _), _ = phases_of(apply(found.method, found.arms["a"].patch))
    assert (first.sampler.temperature, first.sampler.max_new_tokens) == (0, 9)
    assert found.methods["cold"].sampler.temperature == 1


def test_a_recipe_that_was_read_can_be_read_again():
    found = own({"path": "xl > s", "method": "both"})
    again = validate(found.model_dump(mode="json", by_alias=True))
    assert trained_with(again) == trained_with(found)


def test_mistakes_beside_the_name_of_a_method_are_shown_with_it():
    method = {"name": "gkdd", "sampler": {"fraction": 1}, "optim": {"learning_rate": 1}}
    with pytest.raises(ConfigError) as error:
        recipe(method, {"path": "xl > s", "method": "kdd"})
    assert [problem.split("; ")[0] for problem in error.value.problems] == [
        "recipe: `method.optim.learning_rate` is not a known key",
        "recipe: `method.name`: `gkdd` is not a method",
        "recipe: `arms.a.method`: `kdd` is not a method",
    ]


def test_the_short_form_has_phases():
    short = {"study": "t", "teacher": "gpt2-xl", "student": "gpt2", "data": "dolly", "methods": OWN, "method": "both"}
    assert [share for _, share in phases_of(validate(short).method)] == [0.25, 0.75]
    no_dev = short | {"data": {"train": "dolly", "test": "dolly"}, "method": {"phases": [{"select": {"metric": "rouge_l"}}, {}]}}
    with pytest.raises(ConfigError, match=r"`data.dev` is missing, but `method.phases.0.select` chooses"):
        validate(no_dev)


@pytest.mark.parametrize(
    ("arm", "methods", "words"),
    [
        ("xl > s", {"gkd": {}}, "`methods.gkd` has the name of a published method; choose another name"),
        (
            {"path": "xl > s", "method": "opdd"},
            OWN,
            "`arms.a.method` names `opdd`, which is not a method; did you mean `opd`? The methods are cold",
        ),
        ({"path": "xl > s", "phases": ["kd", "opdd"]}, OWN, "`arms.a.phases` names `opdd`, which is not a method; did you mean `opd`?"),
        ({"path": "xl > s", "phases": ["both"]}, OWN, "`arms.a.phases` names `both`, which has phases itself and cannot be a phase"),
        ("xl > s", {"b": {"name": "c"}, "c": {}}, "`methods.b.name` is `c`, which is another method of your own; write the name"),
        (
            {"path": "xl > s", "method": "b"},
            {"b": {"objectiv": {}}},
            "recipe: `methods.b.objectiv` is not a known key; did you mean `objective`?",
        ),
        (
            {"path": "xl > s", "phases": [{"share": 0.5}, {"share": 0.4}]},
            {},
            "shares of the phases are 0.5, 0.4, which add up to 0.9; change them",
        ),
        (
            {"path": "xl > s", "phases": [{"share": 0.5}, {}]},
            {},
            "1 of 2 phases have a `share`; give every phase a `share`, or remove every `share`",
        ),
        ({"path": "xl > s", "phases": [{"optim": {"epochs": 1}}]}, {}, "a phase sets `optim.epochs`, but phases divide the updates"),
        ({"path": "xl > s", "phases": ["kdd"]}, {}, "`kdd` is not a method; did you mean `kd`?"),
        ({"path": "xl > s", "phases": [{"shar": 1}]}, {}, "did you mean `share`?"),
    ],
)
def test_mistakes_in_methods_and_phases_are_one_sentence(arm, methods, words):
    with pytest.raises(ConfigError) as error:
        own(arm, methods)
    assert words in str(error.value)
    assert len(error.value.problems) == 1
