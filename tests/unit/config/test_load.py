"""Recipes: overrides, and one clear sentence for every kind of mistake."""

import pytest

from tadistill.config import load
from tadistill.config.method import Method, MethodPatch, Optim, apply, merge_methods
from tadistill.config.objective import CrossEntropy, ForwardKL, MiniLLM
from tadistill.config.sampling import TeacherMixedSampler
from tadistill.errors import ConfigError

RECIPE = """\
study: t
seeds: [1, 2]
models:
  xl: {load: "scratch:llama", tokenizer: tinyworld, sft: {optim: {steps: 10}}}
  s: {load: "scratch:llama", tokenizer: tinyworld}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld]}
method:
  objective: {type: minillm, pt_weight: 0}
  sampler: {type: teacher_mixed}
arms:
  a: xl > s
  b: {path: xl > s, compute: as a}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_overrides_and_dotted_names(recipe):
    found = load(recipe, ["method.optim.lr=0.01", "arms[2.D].path=xl > s", "seeds=[7]"])
    assert found.method.optim.lr == 0.01
    assert found.arms["2.D"].path == (("xl", "s"),)
    assert found.seeds == (7,)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.objective.pt_weigth=1", ["`method.objective.pt_weigth`", "did you mean `pt_weight`?"]),
        ("models.s.sft.optim.stps=1", ["`models.s.sft.optim.stps`", "did you mean `steps`?"]),
        ("sedes=[1]", ["`sedes`", "did you mean `seeds`?"]),
        ("arms.a=xl > s > s", ["line 11", "names model s twice"]),
        ("arms.a=xl > q", ["arms.a.path names `q`", "choose one of xl, s"]),
        ("arms.a={path: xl > s, compute: as b}", ["has a cycle"]),
        ("models.s={load: null, tokenizer: null, init: {from: s, layers: 1}}", ["has a cycle"]),
        ("models.s.load=null", ["line 5", "exactly one of `load`, `init`"]),
        ("data.test=[]", ["data.test", "at least 1"]),
        ("method.optim.lr=-1", ["`method.optim.lr` is -1", "greater than 0"]),
        ("method.objective.type=foo", ["'foo'", "forward_kl"]),
        ("seeds=[1,1]", ["contain a seed twice"]),
        ("nonsense", ["is not KEY=VALUE"]),
        ("arms.a={path: xl > s, compute: 2x}", ["write `as ARM`"]),
    ],
)
def test_a_mistake_is_one_sentence(recipe, override, parts):
    with pytest.raises(ConfigError) as error:
        load(recipe, [override])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_dots_of_paths_stay_in_a_message(recipe, monkeypatch):
    below = recipe.parent / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    with pytest.raises(ConfigError) as error:
        load("../r.yaml", ["data.train={load: ../rows.jsonl, instruction: ''}"])
    assert str(error.value).startswith("../r.yaml, line 6: `data.train`: ")
    with pytest.raises(ConfigError, match=r"runtime.trackers.0` is '\.\./x\.\.y': .*'tensorboard'\.$"):
        load("../r.yaml", ["runtime.trackers=[../x..y]"])


def test_missing_file_and_bad_yaml(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load(tmp_path / "bad.yaml")


def test_patches_change_only_what_they_name():
    base = Method(objective=ForwardKL(kd_ratio=0.5), optim=Optim(lr=0.1, steps=3))
    patched = apply(base, MethodPatch(optim=Optim(lr=0.2)), MethodPatch(objective=CrossEntropy()))
    assert patched.optim == Optim(lr=0.2, steps=3)
    assert patched.objective == CrossEntropy()
    assert merge_methods(Optim(steps=3), Optim(epochs=2.0)) == Optim(epochs=2.0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"objective": {"type": "minillm"}, "sampler": {"type": "dataset"}},
            "minillm learns from rounds of rollouts, but sampler dataset draws no rounds",
        ),
        ({"objective": {"type": "sampled_kl"}, "sampler": {"type": "teacher_mixed", "alpha": 0.2}}, "use sampler: {type: student}"),
        ({"objective": {"type": "forward_kl", "kd_ratio": 0.5}, "sampler": {"type": "teacher_mixed"}}, "kd_ratio is 0.5; set it to 1"),
        ({"objective": {"type": "minillm"}, "sampler": {"type": "mix"}}, "learns from rounds of rollouts, but sampler mix draws no rounds"),
        (
            {"objective": {"type": "cross_entropy"}, "sampler": {"type": "student"}},
            "so the loss must not contain cross-entropy; use a divergence",
        ),
        ({"sampler": {"type": "student", "rollouts": 40}}, "rollouts 40 is not a multiple of optim.batch 32"),
        ({"sampler": {"type": "replay"}, "select": {"metric": "last"}}, "needs the dev loss, but select.metric `last` does not measure it"),
        ({"sampler": {"type": "replay", "capacity": 8}}, "capacity 8 is less than one batch of 32"),
        ({"sampler": {"type": "teacher_mixed", "engine": "vllm"}}, "needs the teacher's distribution at every token"),
        ({"sampler": {"type": "mix", "engine": "vllm", "no_repeat_ngram": 3}}, "vllm does not support no_repeat_ngram"),
        (
            {"objective": {"type": "minillm"}, "sampler": {"type": "student", "engine": "vllm", "top_k": 5}},
            "minillm with engine vllm needs temperature 1 and no top_k",
        ),
        ({"objective": {"type": "contrastive"}}, "contrastive and sampler pair work only together"),
        ({"sampler": {"type": "pair"}}, "contrastive and sampler pair work only together"),
        (
            {"objective": {"type": "cross_entropy"}, "sampler": {"type": "dataset", "signal": {"type": "hidden"}}},
            "objective cross_entropy uses no teacher, so sampler.signal",
        ),
        (
            {"objective": {"type": "top_k_reverse_kl"}, "sampler": {"type": "dataset", "signal": {"type": "top_k"}}},
            "use objective reverse_kl",
        ),
        (
            {"objective": {"type": "forward_kl", "temperature": 2}, "sampler": {"type": "dataset", "signal": {"type": "top_k"}}},
            "tail: drop",
        ),
    ],
)
def test_objectives_and_samplers_that_do_not_go_together(method, words):
    with pytest.raises(ConfigError, match=words):
        apply(Method.model_validate(method))


@pytest.mark.parametrize(
    "sampler",
    [
        {"type": "teacher_mixed", "alpha": 1.2},
        {"type": "teacher_mixed", "alpha": -0.1},
        {"type": "mix", "lam": 2},
        {"type": "speculative", "k": 0},
        {"type": "student", "min_p": 1.5},
        {"type": "student", "top_p": 0},
        {"type": "student", "no_repeat_ngram": 0},
        {"type": "replay", "schedule": "sometimes"},
    ],
)
def test_a_samplers_settings_have_ranges(sampler):
    with pytest.raises(ValueError, match="validation error"):
        Method.model_validate({"sampler": sampler})


def test_a_preset_in_a_patch_replaces_all_of_the_other():
    official = apply(Method(sampler=TeacherMixedSampler()), MethodPatch(objective=MiniLLM(preset="official", clip=0.3)))
    assert (official.objective.discount, official.objective.whitening, official.objective.clip) == (0.95, "padded", 0.3)
    one = apply(official, MethodPatch(objective=MiniLLM(discount=0.9)))
    assert (one.objective.discount, one.objective.whitening, one.objective.preset) == (0.9, "padded", "official")
    paper = apply(official, MethodPatch(objective=MiniLLM(preset="paper")))
    assert paper.objective.model_dump(exclude={"clip"}) == MiniLLM().model_dump(exclude={"clip"})


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "jensen_shannon", "beta": 1.2},
        {"type": "skew_reverse_kl", "alpha": -0.1},
        {"type": "adaptive_kl", "mu": 2},
        {"type": "alpha_beta", "alpha": float("nan")},
        {"type": "alpha_mixture", "pair": "pq"},
        {"type": "taid", "decay": 1.0},
        {"type": "taid", "start": 0.8, "end": 0.5},
        {"type": "top_k_forward_kl", "k": 0},
        {"type": "forward_kl", "temperature": 0},
        {"type": "reverse_kl", "beta": 0.5},
    ],
)
def test_an_objectives_settings_have_ranges(objective):
    with pytest.raises(ValueError, match="validation error"):
        Method.model_validate({"objective": objective})
