"""Every committed recipe is read and planned without network; MiniLLM's run end to end on tiny models of the same architectures."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.byte_models import byte_model, byte_tokenizer, save
from tests.conftest import response_logits
from tests.e2e.inprocess import run_here
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tadistill
from tadistill.config import load
from tadistill.data.batch import Sequence, collate
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.models.tokens import shared_vocabulary
from tadistill.plan.arms import Plan, make_plan
from tadistill.rollout.draw import Mixture
from tadistill.rollout.engine import sample

RECIPES = Path(__file__).parents[2] / "recipes"
ALL = sorted(RECIPES.rglob("*.yaml"))
MINILLM = sorted((RECIPES / "minillm").glob("*.yaml"))
CONTEXTS = sorted((RECIPES / "contexts").glob("*.yaml"))
ON_POLICY = sorted((RECIPES / "on-policy").glob("*.yaml"))
METHODS = sorted(set((RECIPES / "methods").glob("*.yaml")) - {RECIPES / "methods" / "all.yaml"})
SETS = {
    "minillm_dolly": ("train", "dev", "test"),
    "minillm_self_inst": ("test",),
    "minillm_vicuna": ("test",),
    "minillm_sinst_11": ("test",),
    "minillm_uinst_11": ("test",),
}
SMALL = [
    "method.optim.steps=4", "method.optim.batch=4", "method.optim.micro_batch=2", "method.optim.warmup=1", "method.select.every=2",
    "method.sampler.rollouts=8", "method.sampler.inner_epochs=2", "method.sampler.max_new_tokens=6",
    "models.base.distill.optim.epochs=0.5", "models.base.distill.optim.batch=4", "models.base.distill.select.every=1",
    "arms.seqkd.sampler.max_new_tokens=6", "evaluate.seeds=[10]", "evaluate.max_new_tokens=3", "data.max_length=128", "runtime.jobs=1",
]  # fmt: skip
SMALL_SFT = ["optim.epochs=0.5", "optim.batch=4", "optim.micro_batch=2", "select.every=1"]


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


# --- stand-ins ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder for `data.root` with a few rows of each of MiniLLM's sets, and a corpus."""
    root = tmp_path_factory.mktemp("data")
    for folder, splits in SETS.items():
        (root / folder).mkdir()
        for split in splits:
            rows = [
                {"instruction": f"Name {i} things of set {folder}.", "input": "red, blue" if i % 2 else "", "output": f"The answer is {i}."}
                for i in range(16 if split == "train" else 3)
            ]
            if folder == "minillm_sinst_11":
                rows = [row | {"output": [row["output"], "Another answer."]} for row in rows]
            (root / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder, splits in {"DigitalLearningGmbH/MATH-lighteval": ("train", "test"), "HuggingFaceH4/MATH-500": ("test",)}.items():
        (root / folder).mkdir(parents=True)
        for split in splits:
            rows = [{"problem": f"What is {i} + 1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(8)]
            (root / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = root / "Skylion007" / "openwebtext"
    corpus.mkdir(parents=True)
    documents = [{"text": f"Document {i} has a few words, and then it ends.\n" * 8} for i in range(8)]
    (corpus / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    return root


@dataclass(frozen=True)
class Family:
    """Properties that a stand-in shares with the real models: special tokens, and the width of the logits."""

    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None
    prefix: str | None = None
    """Token that the tokenizer puts before a text unless told not to."""
    padding: tuple[int, int] = (0, 0)
    """Logits of teacher and student beyond the tokenizer."""


FAMILIES = {
    "gpt2": Family(("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", None),
    "opt": Family(("<s>", "<pad>", "</s>", "<unk>"), "</s>", "</s>", "<pad>", prefix="</s>", padding=(7, 7)),
    "llama": Family(("<unk>", "<s>", "</s>"), "<s>", "</s>", None, prefix="<s>"),
    "qwen2": Family(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>", "<|endoftext|>", padding=(24, 8)),
}


def tokenizer_of(family: Family, data: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(family.special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    alpaca = "Below is an instruction that describes a task, paired with an input that provides further context. ### Response:\n"
    texts = [path.read_text() for path in sorted(data.rglob("*.jsonl"))]
    tokenizer.train_from_iterator([alpaca * 20, *texts], trainer)
    if family.prefix:
        pair = (family.prefix, tokenizer.token_to_id(family.prefix))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.prefix} $A", special_tokens=[pair])
    tokens = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in tokens.items() if v})


def model_of(kind: str, tokenizer: PreTrainedTokenizerFast, width: int, padding: int, seed: int):
    """Build a random model of one layer."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    common = ids | {"vocab_size": len(tokenizer) + padding}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=1, n_head=2, n_positions=512, **common))
    shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=2 * width, word_embed_proj_dim=width, **shape, **common))
    shape |= {"intermediate_size": 2 * width, "num_key_value_heads": 1}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **common))
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape, **common))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory, data):
    """Function of kind and role that returns the directory of a tiny model, made on first use."""
    made: dict[tuple[str, str], Path] = {}
    sizes = {"teacher": (32, 0), "init": (16, 1), "base": (16, 2), "deep": (16, 3)}

    def directory(kind: str, role: str) -> Path:
        if (kind, role) not in made:
            family, (width, seed) = FAMILIES[kind], sizes[role]
            tokenizer = tokenizer_of(family, data)
            model = model_of(kind, tokenizer, width, family.padding[role != "teacher"], seed)
            if role == "deep":  # one that can be pruned
                config = LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 30, "intermediate_size": 1536})
                model = LlamaForCausalLM(config)
            made[kind, role] = tmp_path_factory.mktemp(f"{kind}-{role}")
            model.save_pretrained(made[kind, role])
            tokenizer.save_pretrained(made[kind, role])
        return made[kind, role]

    return directory


# --- every recipe -------------------------------------------------------------------------------------------------------


def only_scratch(path: Path) -> bool:
    """Return True if all models of a recipe have random weights. `tests.unit.plan.test_keys` plans such a recipe as it is."""
    loads = re.findall(r"\bload: *\"?([^\s,}\"]+)", path.read_text())
    return bool(loads) and all(load.startswith("scratch:") or load.endswith(".jsonl") for load in loads)


@pytest.mark.parametrize("path", [path for path in ALL if not only_scratch(path)], ids=name)
def test_is_read_and_planned_without_network(path, data, stand_in):
    """Models on the hub need not be on this disk, except for `compute`, which counts their parameters."""
    given = load(path)
    counts = any(arm.compute for arm in given.arms.values())
    scratch = {n for n, m in given.models.items() if (m.load or "scratch:").startswith("scratch:")}
    packaged = [n for n, m in given.models.items() if n not in scratch and (counts or (m.load or "").startswith("wheel:"))]
    pruned = any(m.init for m in given.models.values())
    changes = [f"models.{n}.load={stand_in('llama', 'deep' if pruned else 'base')}" for n in packaged]
    kept = {n: max(m.sft.keep) for n, m in given.models.items() if m.sft and m.sft.keep}
    changes += ["data.template=plain"] if given.data.template == "chat" and packaged else []  # the stand-ins have no chat template
    changes += [f"models.{n}.sft.optim.{s}" for n, steps in kept.items() for s in ("epochs=null", f"steps={steps}")]
    recipe = load(path, [f"data.root={data}", *changes])
    plan = make_plan(recipe)
    assert [arm.name for arm in plan.arms] == list(recipe.arms)
    assert all(arm.evaluate.keys() == set(recipe.seeds) for arm in plan.arms)


@pytest.mark.parametrize("path", ALL, ids=name)
def test_header_names_its_command(path):
    header = path.read_text().split("\nstudy:")[0]
    assert f"tadistill run recipes/{name(path)}.yaml" in header


@pytest.fixture(scope="module")
def table() -> Plan:
    return make_plan(load(RECIPES / "methods" / "all.yaml"))


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_single_method_is_a_part_of_the_table(path, table):
    """The keys of the stages are the same, so that a stage is never run twice."""
    plan = make_plan(load(path))
    assert len(plan.arms) == 2
    assert table.stages.keys() >= plan.stages.keys()


@pytest.fixture(scope="module")
def final(data):
    """Function of a recipe and overrides that returns the key of the last model of every arm; each plan is made once."""

    @cache
    def of(path: Path, *overrides: str) -> dict[str, dict[int, str]]:
        return {arm.name: arm.final for arm in make_plan(load(path, [f"data.root={data}", *overrides])).arms}

    return of


@pytest.mark.parametrize("path", MINILLM, ids=name)
@pytest.mark.parametrize(
    "override",
    ["objective.preset=official", "objective.length_normalisation=none", "objective.single_step=false", "objective.pt_weight=0",
     "sampler.alpha=0"],
)  # fmt: skip
def test_ablations_are_one_override_and_change_minillm_alone(path, override, final):
    before, after = final(path), final(path, f"method.{override}")
    assert {n for n in before if before[n] != after[n]} == {"minillm"}


# --- MiniLLM's recipes, whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_changes_no_log_probability(kind, stand_in):
    """Sampling pads on the left, training on the right; the stock model without padding gives every token the same log-probability."""
    student, teacher = (load_model(stand_in(kind, role)) for role in ("base", "teacher"))
    vocab = shared_vocabulary(load_tokenizer(stand_in(kind, "base")), student, teacher)
    prompts = [tuple(range(5, 5 + n)) for n in (3, 11, 6)]
    rollouts = sample(student, prompts, np.random.default_rng(0).random((3, 8)), eos=(0,), vocab=vocab, guide=Mixture(teacher, 0.5))
    batch = collate([Sequence(p, r.tokens) for p, r in zip(prompts, rollouts, strict=True)], pad=1)
    for model, role in ((student, "student"), (teacher, "teacher")):
        alone = []
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *rollout.tokens]])).logits[0, len(prompt) - 1 : -1, :vocab]
            alone.append(logits.log_softmax(-1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0])
            torch.testing.assert_close(torch.from_numpy(rollout.values[role]), alone[-1], atol=1e-5, rtol=1e-4)
        trained = response_logits(model, batch, vocab).log_softmax(-1).gather(1, batch.targets_BT[batch.mask_BT][:, None])[:, 0]
        torch.testing.assert_close(trained, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One store for all recipes: what two sizes of a family have in common runs once."""
    return tmp_path_factory.mktemp("runs")


PATHS = {
    "opsd": {"base": "s", "sft": "s", "opsd": "s > s, context"},
    "sdft": {"base": "s", "sft": "s", "fixed": "s > s, context", "sdft": "s > s, context, ema"},
}


@pytest.mark.parametrize("recipe", CONTEXTS, ids=name)
def test_a_model_teaches_itself_end_to_end(recipe, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tadistill.runner.run_study.run_stages", run_here)
    monkeypatch.setattr("tadistill.runner.schedule.prepared", nullcontext)
    model = save(tmp_path / "model", byte_model(max_position_embeddings=640), byte_tokenizer())
    small = ["method.optim.steps=2", "method.optim.batch=4", "method.optim.micro_batch=2", "method.sampler.max_new_tokens=4"]
    small += ["evaluate.seeds=[10]", "evaluate.max_new_tokens=3", "evaluate.also={}", "data.limit={train: 8, dev: 2, test: 2}"]
    small += ["seeds=[10]", "method.select={metric: last}", "data.max_prompt=400", "data.max_length=600", "method.optim.precision=fp32"]
    tadistill.run(recipe, [*small, f"models.s.load={model}", f"data.root={data}"], runs=tmp_path / "runs")
    own = load(recipe)
    content = json.loads((tmp_path / "runs" / own.study / "results.json").read_text())
    assert {arm["arm"]: arm["path"] for arm in content["arms"]} == PATHS[own.study]
    rows = content["rows"]
    trained = {row["arm"]: row["value"] for row in rows if row["metric"] == "loss"}
    assert len(set(trained.values())) == 3  # after two updates, the average still equals the fixed teacher within rounding


RUN = ("gpt2-120M", "llama-7B", "opt-6.7B", "qwen2.5-1.5B")
"""The recipes that are run: one for each family, with gradient checkpointing and (gpt2) without."""
OF_A_SIZE = re.compile(r"study|models\.\w+\.load|.*\.(lr|epochs|micro_batch|gradient_checkpointing)|arms\.\w+\.published.*")


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """The values of nested mappings by their keys, such as `method.optim.lr`."""
    if not isinstance(value, dict):
        return {at: value}
    return {key: found for name, part in value.items() for key, found in flat(part, f"{at}.{name}".lstrip(".")).items()}


@pytest.mark.parametrize("path", [path for path in MINILLM if path.stem not in RUN], ids=lambda path: path.stem)
def test_sizes_of_a_family_differ_only_in_models_and_numbers(path):
    """So one recipe of each family is run."""
    alike = next(other for other in MINILLM if other.stem in RUN and other.stem.partition("-")[0] == path.stem.partition("-")[0])
    ours, theirs = (flat(load(each).model_dump()) for each in (path, alike))
    assert [key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key) and not OF_A_SIZE.fullmatch(key)] == []


@pytest.mark.parametrize("path", [path for path in MINILLM if path.stem in RUN], ids=lambda path: path.stem)
def test_runs_end_to_end(path, data, stand_in, runs, monkeypatch):
    monkeypatch.setattr("tadistill.runner.run_study.run_stages", run_here)
    monkeypatch.setattr("tadistill.runner.schedule.prepared", nullcontext)
    kind = next(k for k in FAMILIES if path.stem.startswith(k.removesuffix("2")))
    recipe = load(path)
    overrides = [*SMALL, f"data.root={data}"]
    if path.stem != RUN[0]:  # one family answers all five test sets; the others answer two, one of them with several references
        overrides.append("data.test=[dolly, sinst]")
        recipe = load(path, overrides[-1:])
    for model, config in recipe.models.items():
        overrides.append(f"models.{model}.load={stand_in(kind, model)}")
        overrides += [f"models.{model}.sft.{setting}" for setting in SMALL_SFT if config.sft]
    tadistill.run(path, overrides, runs=runs)
    rows = json.loads((runs / recipe.study / "results.json").read_text())["rows"]
    metrics = {"rouge_l", "loss", "forward_kl", "reverse_kl", "length", "rouge_l@ngram6", "perplexity"}
    expected = {(arm, ref.name, metric) for arm in recipe.arms for ref in recipe.data.test for metric in metrics}
    assert {(row["arm"], row["set"], row["metric"]) for row in rows} >= expected
    assert all(math.isfinite(row[field]) for row in rows for field in ("value", "low", "high") if row[field] is not None)


# --- recipes of phases, whole -------------------------------------------------------------------------------------------

TINY = [
    "seeds=[10]", "method.optim.steps=4", "method.optim.batch=4", "method.optim.warmup=1", "data.limit={train: 16, dev: 2, test: 2}",
    "data.test=[tinyworld]", "evaluate={seeds: [10], max_new_tokens: 3, also: {}}", "runtime.jobs=1", "analyse=false",
]  # fmt: skip


@pytest.mark.parametrize("path", ON_POLICY, ids=lambda path: path.stem)
def test_recipes_on_policy_run_end_to_end_and_have_few_lines(path, runs, monkeypatch):
    monkeypatch.setattr("tadistill.runner.run_study.run_stages", run_here)
    monkeypatch.setattr("tadistill.runner.schedule.prepared", nullcontext)
    assert path.read_text().count("\n") <= 40
    recipe = load(path)
    short = [f"models.{model}.sft.optim.{setting}" for model in recipe.models for setting in ("steps=2", "batch=4", "warmup=1")]
    tadistill.run(path, [*TINY, *short], runs=runs)
    content = json.loads((runs / recipe.study / "results.json").read_text())
    assert {row["arm"] for row in content["rows"] if row["metric"] == "rouge_l"} == recipe.arms.keys()
    arms = {arm["arm"]: arm for arm in content["arms"]}
    for name, arm in recipe.arms.items():
        phases = len(arm.phases or ()) or int(bool(arm.learners))
        assert len(arms[name]["phases"]) == phases
        assert ("in 2 phases: " in arms[name]["words"] or "in 3 phases: " in arms[name]["words"]) == (phases > 1)
    page = (runs / recipe.study / "report.html").read_text()
    assert ("<b>Phase</b>: a part of a distillation" in page) == any(arm.phases for arm in recipe.arms.values())
