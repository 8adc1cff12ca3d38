"""Checks before a study starts: data, models on disk, tokenizers, memory. They find a mistake before any stage has run."""

import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from tadistill.config import Recipe
from tadistill.config.common import Decoding
from tadistill.config.places import placed
from tadistill.config.recipe import methods
from tadistill.data import datasets, survey
from tadistill.data.batch import chunks
from tadistill.data.encoded import RowsOnDisk
from tadistill.data.templates import Counts, Lengths, adds_bos, encode_counted
from tadistill.errors import ConfigError, DataError, Gathering, ModelError
from tadistill.evaluation.text_scores import UNSEEN, unseen
from tadistill.models.counting.memory import available_memory, check_memory, resident_bytes
from tadistill.models.loading import check_model, check_same_tokenizer, load_tokenizer
from tadistill.models.pruning import keep_list
from tadistill.models.scratch import check_scratch, scratch_config
from tadistill.models.support import check_config
from tadistill.plan.arms import Plan, make_plan, original_teacher
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Stage, with_ancestors
from tadistill.plan.task import layout
from tadistill.plan.throughput import cores
from tadistill.plan.tokens import StudyTokens
from tadistill.runner.own_code import try_own_code

_LESS_MEMORY = (
    "use smaller models, lower optim.micro_batch, set optim.gradient_checkpointing, set optim.precision to bf16 (which halves a frozen "
    "teacher), or use a machine with more memory"
)
_STARTS = 10
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")  # names of one thing in transformers' configurations


@placed
def check_study(recipe: Recipe, console: Console | None = None) -> int:
    """Check that a recipe can run on this machine. Return how many stages may run at the same time.

    Rows that will be left out or cut, and references that the metric cannot read, are named on the console.

    Raises:
        ConfigError, DataError, ModelError: the recipe cannot run here (raised before anything is written).
    """
    check_inputs(recipe, console)
    _check_engine(recipe)
    jobs = recipe.runtime.jobs or _default_jobs()
    _check_memory(recipe, jobs)
    return jobs


@placed
def check_inputs(recipe: Recipe, console: Console | None = None) -> None:
    """Check data, tokenizers, encodings and models, which do not depend on the machine. Raises the same errors as `check_study`."""
    found = Gathering()
    with found.about():
        survey.check(recipe)
    with found.about():
        _check_peft(recipe)
    with found.about():
        try_own_code(recipe)
    plan = make_plan(recipe)
    for stage in plan.stages.values() if recipe.resources else ():
        with found.about():
            layout(recipe, stage)
    teacher, used, tokenizers = original_teacher(recipe), _used(recipe), {}
    for name in used:
        with found.about(f"models.{name}"):
            tokenizers[name] = _tokenizer(recipe, name, plan.tokens)
    found.finish()
    if teacher:  # without one, models are only evaluated, and each one may have its own tokenizer
        check_same_tokenizer(tokenizers)
    read = {name: _check_encoding(recipe, tokenizers[name], plan.tokens, name) for name in (used[:1] if teacher else used)}
    for name in used:
        reader = used[0] if teacher else name
        with found.about(f"models.{name}"):
            rows, config = _check_model(recipe, name, tokenizers[name])
            try:
                _check_texts(recipe, rows, config, tokenizers[name], read[reader].texts)
            except (ConfigError, ModelError):
                if not read[reader].unread:
                    raise
                read[reader] = _check_encoding(recipe, tokenizers[reader], plan.tokens, reader, all_rows=True)
                _check_texts(recipe, rows, config, tokenizers[name], read[reader].texts)
    with found.about():
        unread = dict.fromkeys(of.unread for of in read.values() if of.unread and _trains(recipe))
        notes = [*unread, *_rows_notes(read, training=_trains(recipe)), *_script_notes(recipe)]
    found.finish()
    for note in notes:
        if console:
            console.print(note, highlight=False, soft_wrap=True, markup=False)


def _used(recipe: Recipe) -> list[str]:
    teacher = original_teacher(recipe)
    return [name for name in recipe.models if name == teacher or any(name in arm.models for arm in recipe.arms.values())]


def _check_engine(recipe: Recipe) -> None:
    wanted = any(method.sampler.vllm for method in methods(recipe))
    if wanted and not (importlib.util.find_spec("vllm") and torch.cuda.is_available()):
        raise ConfigError(
            "a sampler has engine: vllm, which needs CUDA and `pip install 'tadistill[vllm]'`; install both, or set engine: native"
        )


def _check_peft(recipe: Recipe) -> None:
    wanted = [name for name, model in recipe.models.items() if model.lora]
    if wanted and not importlib.util.find_spec("peft"):
        raise ConfigError(f"models.{wanted[0]} has lora, which needs `pip install 'tadistill[lora]'`; install it, or leave lora out")


def _tokenizer(recipe: Recipe, name: str, tokens: StudyTokens) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a model uses; its own, if that has another vocabulary than the one that would replace it."""
    model, world = recipe.models[_root(recipe, name)], recipe.data.world.model_dump()
    assert model.tokenizer_source is not None
    own = load_tokenizer(model.tokenizer_source, revision=model.revision, world=world)
    if (other := tokens.tokenizer(name)) is None:
        return own
    chosen = load_tokenizer(other[0], revision=other[1], world=world)
    return chosen if chosen.get_vocab() == own.get_vocab() else own


@dataclass(frozen=True)
class _Texts:
    """The largest numbers of tokens among all texts of a recipe."""

    prompt: int
    """Tokens of the longest prompt."""
    whole: int
    """Tokens of the longest prompt with its reference response."""
    chunk: int
    """Tokens of a piece of the corpus; 0 if no method uses it."""
    top: int
    """The largest token id."""
    where: str
    """The set in which it occurs."""


def _check_model(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Mapping[str, Any]]:
    """Return the number of a model's embeddings, and its configuration."""
    model, root = recipe.models[name], recipe.models[_root(recipe, name)]
    assert root.load is not None
    if root.load.startswith("scratch:"):
        config = scratch_config(root.load.removeprefix("scratch:"), root.config, tokenizer)
        check_scratch(config)
        rows = config.get_text_config().vocab_size
    else:
        if described := Ledger(recipe).config(_root(recipe, name)):
            check_config(described, name)
        read: Any = check_model(root.load, root.revision)
        config, rows = read.config, read.get_input_embeddings().weight.shape[0]
    if model.init:
        parent = Ledger(recipe).config(model.init.from_) or {}
        if layers := parent.get("num_hidden_layers", parent.get("n_layer")):
            keep_list(layers if model.init.layers is None or model.init.layers_by == "influence" else model.init.layers, layers)
    return rows, config.get_text_config().to_dict()


def _check_texts(recipe: Recipe, rows: int, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, texts: _Texts) -> None:
    """Raise an error if a token has no embedding, or a text is longer than the model's positions."""
    if texts.top >= rows:
        token = tokenizer.convert_ids_to_tokens(texts.top)
        raise ModelError(
            f"the tokenizer gives the token {token!r} of {texts.where} the id {texts.top}, but the model has embeddings for {rows} tokens "
            "only; use the tokenizer that belongs to the model, or resize its embeddings and save it again"
        )
    _check_positions(recipe, config, texts)


def _check_positions(recipe: Recipe, config: Mapping[str, Any], texts: _Texts) -> None:
    """Raise a ConfigError if a text is longer than the positions that a model has learned, or was trained with (rotary positions)."""
    positions = next((config[name] for name in _POSITIONS if isinstance(config.get(name), int)), None)
    samplers = [method.sampler for method in methods(recipe)]
    new = max([recipe.evaluate.max_new_tokens, *(s.max_new_tokens for s in samplers if isinstance(s, Decoding))])
    needs = {
        f"the longest prompt ({texts.prompt} tokens) plus max_new_tokens ({new}) needs": (
            texts.prompt + new,
            "lower data.max_prompt or max_new_tokens",
        ),
        "the longest prompt with its reference response needs": (texts.whole, "lower data.max_length"),
        "a piece of data.corpus needs": (texts.chunk, "lower data.max_length"),
    }
    problems = [
        f"it has {positions} positions, but {what} {need}; {fix}" for what, (need, fix) in needs.items() if positions and need > positions
    ]
    if problems:
        raise ConfigError(*problems)


@dataclass(frozen=True)
class _Read:
    """The splits as one tokenizer reads them."""

    texts: _Texts
    counts: dict[tuple[str, str], Counts]
    """Role and name of a split -> its numbers of rows."""
    rows: dict[str, frozenset[int]]
    """Test set -> rows that are not left out."""
    unread: str = ""
    """A sentence on the training set, if its rows are tokenised later; `texts` then holds limits, which no row exceeds."""


def _trains(recipe: Recipe) -> bool:
    return bool(methods(recipe)) or any(model.sft for model in recipe.models.values())


def _rows_notes(read: Mapping[str, _Read], *, training: bool) -> list[str]:
    """Return a sentence on every split with rows that are left out or cut, and on test sets of which models keep different rows.

    Raises:
        DataError: two models share no row of a test set.
    """
    found: list[str] = []
    for role, name in next(iter(read.values())).counts:
        if role != "test" and not training:
            continue
        texts = {model: of_model.counts[role, name].text for model, of_model in read.items() if (role, name) in of_model.counts}
        alike = len(set(texts.values())) == 1
        for model, text in list(texts.items())[: 1 if alike else None]:
            if text:
                found.append(f"{name} ({role}{'' if alike else f', {model}'}): {text}")
        shared = frozenset.intersection(*(of_model.rows[name] for of_model in read.values())) if role == "test" else frozenset({0})
        if not shared:
            raise DataError(f"the models {', '.join(read)} keep no common row of {name}, so they cannot be compared; raise data.max_prompt")
        if role == "test" and any(of_model.rows[name] != shared for of_model in read.values()):
            found.append(f"{name} ({role}): the models are compared on the {len(shared)} rows that all of them keep")
    return found


def _script_notes(recipe: Recipe) -> list[str]:
    """Return a caution about every split whose references ROUGE-L does not see enough of."""
    data, found = recipe.data, list[str]()
    selects = [*(m.select for m in methods(recipe)), *(m.sft.select for m in recipe.models.values() if m.sft)]
    for role, ref in [("dev", data.dev), *(("test", ref) for ref in data.test)]:
        if role == "dev" and not any(select.metric == "rouge_l" for select in selects):
            continue
        share = unseen([example.references for example in datasets.load(ref, role, data)])
        if share >= UNSEEN:
            fix = "select by rouge_l_unicode" if role == "dev" else "rouge_l_unicode is measured too"
            found.append(f"{ref.name} ({role}): ROUGE-L drops {100 * share:.0f} % of the letters of its references (all but a-z); {fix}")
    return found


def _check_encoding(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: StudyTokens, name: str, *, all_rows: bool = False) -> _Read:
    """Read all splits and the corpus. A large training set is tokenised here only with `all_rows`, or if that can find mistakes.

    Raises:
        DataError: the template does not fit the tokenizer, no row is short enough, or the corpus has no text.
        ModelError: the files of the tokenizer do not say that it puts BOS first.
        ConfigError: a stage selects by facts, and dev has none.
    """
    found, counts, rows, unread = list[_Texts](), dict[tuple[str, str], Counts](), dict[str, frozenset[int]](), ""
    data, rules = recipe.data, tokens.encoding(name)
    lengths = Lengths(data.max_prompt, data.max_length, data.long_prompts, rules.bos)
    if data.bos == "auto" and tokens.bos_matters and not rules.bos and adds_bos(tokenizer):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} puts {tokenizer.bos_token} before a text, but its files do not say so; save it again "
            "with save_pretrained, or set data.bos: never"
        )
    splits = {"train": data.train, "dev": data.dev}
    for role, ref in [*splits.items(), *(("test", r) for r in data.test)]:
        where = f"data set `{ref.name}` ({role})"
        if role == "train" and (total := survey.survey(ref, role, data)).large:
            on_disk = RowsOnDisk(ref, role, data.world, data.root, data.limit.train)
            read = on_disk.kept if all_rows or not total.plain(data.template) else on_disk.glance
            if kept := read(tokenizer, lengths, template=data.template, name=where):
                counts[role, ref.name] = kept.counts
                found.append(_Texts(kept.prompt, kept.whole, 0, kept.top, where))
            else:
                unread = (
                    f"{ref.name} (train): {total.rows} rows; the first stage that trains tokenises them and counts those that are too long"
                )
                found.append(_Texts(lengths.limit, lengths.max_length, 0, max(tokenizer.get_vocab().values()), where))
            continue
        examples = datasets.load(ref, role, data)
        encoded, counts[role, ref.name] = encode_counted(examples, tokenizer, lengths, template=data.template, name=where)
        prompt, whole = max(len(e.prompt) for e in encoded), max(len(e.prompt) + len(e.response) for e in encoded)
        top = max(max((*e.prompt, *e.response, *itertools.chain(*e.choices))) for e in encoded)
        found.append(_Texts(prompt, whole, 0, top, where))
        if role == "test":
            rows[ref.name] = frozenset(e.row for e in encoded)
    if data.corpus and any(method.objective.needs_corpus for method in methods(recipe)):
        text = datasets.texts(data.corpus, world=data.world, root=data.root)
        piece = chunks(text, tokenizer, data.max_length, 1, bos=rules.bos)[0].response
        found.append(_Texts(0, 0, len(piece), max(piece), "data.corpus"))
    selects = [*(method.select for method in methods(recipe)), *(m.sft.select for m in recipe.models.values() if m.sft)]
    if any(s.metric == "fact_accuracy" for s in selects) and not all(e.facts for e in datasets.load(data.dev, "dev", data)):
        raise ConfigError(f"select.metric is fact_accuracy, but the dev set `{data.dev.name}` has no facts; set it to rouge_l or loss")
    top = max(found, key=lambda texts: texts.top)
    prompt, whole, chunk = (max(getattr(texts, part) for texts in found) for part in ("prompt", "whole", "chunk"))
    return _Read(_Texts(prompt, whole, chunk, top.top, top.where), counts, rows, unread)


def _root(recipe: Recipe, name: str) -> str:
    parent = recipe.models[name].parent
    return _root(recipe, parent) if parent else name


def _default_jobs() -> int:
    # This number must not depend on the stages that are left. It decides a stage's number of threads, and a resumed run must add floats in
    # the same order.
    return 1 if torch.cuda.is_available() else cores()


def _check_memory(recipe: Recipe, jobs: int) -> None:
    plan, free = make_plan(recipe), available_memory()
    if torch.cuda.is_available():  # stages pass through this machine's memory and stay in the GPU's
        free = max(free, torch.cuda.mem_get_info()[0])
    needs = {key: _need(plan, stage) for key, stage in plan.stages.items()}
    if not needs:
        return
    most = max(needs, key=lambda key: needs[key])
    check_memory({plan.stages[most].label: needs[most]}, free, _LESS_MEMORY)
    group = _largest_group(plan, needs, jobs)
    if sum(group.values()) > free:
        fits = max(n for n in range(1, jobs) if sum(_largest_group(plan, needs, n).values()) <= free)
        advice = f"set runtime.jobs={fits} (now {jobs}), or use a machine with more memory"
        check_memory({plan.stages[key].label: need for key, need in group.items()}, free, advice)


def _need(plan: Plan, stage: Stage) -> int:
    """Return the bytes of memory that a stage needs: the plan's estimate, or else the size of the models' float32 weights."""
    if stage.cost and stage.cost.memory:
        return int(stage.cost.memory)
    ledger, names = Ledger(plan.recipe), {stage.model}
    if stage.kind == "analyse":
        names |= {name for arm in plan.arms if arm.name in stage.arms for name in (plan.teacher, *arm.arm.last) if name}
    return sum(resident_bytes(size.total, training=False) for name in names if (size := ledger.size(name)))


def _largest_group(plan: Plan, needs: Mapping[str, int], jobs: int) -> dict[str, int]:
    """Return at most `jobs` stages that can run at the same time and together need the most memory (found by a greedy search)."""
    above = {key: with_ancestors(plan.stages, [key]) for key in needs}
    order, best = sorted(needs, key=lambda key: -needs[key]), {}
    for first in order[:_STARTS]:
        group = {first: needs[first]}
        for key in order:
            if len(group) < jobs and all(key not in above[other] and other not in above[key] for other in group):
                group[key] = needs[key]
        best = max(best, group, key=lambda group: sum(group.values()))
    return best
