"""Tokenise the splits of a study. Count the rows that are left out or cut, and find texts that are too long for a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from transformers import PreTrainedTokenizerBase

from tadistill.config import DataRef, Recipe
from tadistill.config.method_parts import Select
from tadistill.config.recipe import methods, sampled_tokens, trains
from tadistill.data import datasets, survey
from tadistill.data.answers import RULES
from tadistill.data.batch import chunks
from tadistill.data.datasets import SplitRows
from tadistill.data.encoding import adds_bos, encode
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.token_cache import Longest, glance, keep
from tadistill.errors import ConfigError, DataError, ModelError
from tadistill.evaluation.text_scores import UNSEEN
from tadistill.models.shapes import check_ids, check_lengths, positions_of
from tadistill.models.tokens import vocabulary
from tadistill.plan.paths import contexts_of
from tadistill.plan.study_tokens import StudyTokens
from tadistill.text import counted


@dataclass(frozen=True)
class Texts:
    """The lengths of the longest texts of a recipe in tokens, and the largest token id."""

    longest: Longest
    where: str
    """The data set that contains the largest token id."""
    chunk: int = 0
    """Number of tokens in a piece of the corpus. It is 0 if no method uses the corpus."""


def _largest(found: Sequence[Texts]) -> Texts:
    top = max(found, key=lambda texts: texts.longest.top)
    return Texts(reduce(Longest.joined, (texts.longest for texts in found)), top.where, max(texts.chunk for texts in found))


@dataclass(frozen=True)
class OfContext:
    """Counts and lengths of a training set whose prompts are written with a method's `context`. Only some teachers read these prompts."""

    teachers: frozenset[str]
    """Names of the teachers that read the prompts with this `context`."""
    counts: Counts
    texts: Texts


@dataclass(frozen=True)
class Read:
    """Facts about the tokenised splits of a study: the lengths of texts, and the rows that are kept."""

    texts: Texts
    counts: dict[tuple[str, str], Counts]
    """Counts of kept, cut and left-out rows of each split, by its role (train, dev, test) and name."""
    rows: dict[str, frozenset[int]]
    """Indices of the kept rows of each test set, by the name of the set."""
    unread: str = ""
    """A note that a training set is tokenised later, or an empty text. With a note, `texts` has upper limits for this set."""
    contexts: tuple[OfContext, ...] = ()

    def texts_of(self, name: str) -> Texts:
        """Return the lengths of all texts that the model `name` reads. A teacher may read other prompts than the student."""
        return _largest([self.texts, *(each.texts for each in self.contexts if name in each.teachers)])


def read_splits(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    tokens: StudyTokens,
    name: str,
    show: Callable[[str], None],
    *,
    all_rows: bool = False,
) -> Read:
    """Tokenise all splits and the plain-text corpus with the `tokenizer` of the model `name`. A large training set may be left to the first
    training. With `all_rows`, it is always tokenised. `show` is called with how much of a large training set is tokenised.

    Raises:
        DataError: the template cannot be used with the tokenizer, all rows of a split are too long, or the corpus has no text.
        ModelError: the tokenizer puts BOS before a text, but its files do not contain this setting.
        ConfigError: the metric that selects a checkpoint needs facts or right answers, but the dev set does not contain them.
    """
    found, counts, rows, unread = list[Texts](), dict[tuple[str, str], Counts](), dict[str, frozenset[int]](), ""
    data, bos = tokens.data(name), tokens.encoding(name).bos
    if data.bos == "auto" and tokens.bos_matters(name) and not bos and adds_bos(tokenizer):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} puts {tokenizer.bos_token} before a text, but its files do not contain this setting; "
            "save it again with save_pretrained, or set data.bos: never"
        )
    for role, ref in data.splits(trains=trains(recipe)):
        where, rules = f"data set `{ref.name}` ({role})", Rules.of(data, role, bos=bos)
        if role == "train" and (total := survey.survey(ref, role, data)).large:
            large = SplitRows.of(ref, role, data), tokenizer, rules
            if all_rows or not total.plain(data):
                kept = keep(*large, name=where, tick=_tokenised(ref, total.rows, show))
            else:
                kept = glance(*large, name=where)
            if kept:
                counts[role, ref.name] = kept.counts
                found.append(Texts(kept.longest, where))
            else:
                unread = (
                    f"{ref.name} (train): its {total.rows} rows are not checked yet; the first training tokenises them, and counts those "
                    "that are too long"
                )
                found.append(Texts(Longest(rules.limit, rules.max_length, top=vocabulary(tokenizer).size - 1), where))
            continue
        encoded, counts[role, ref.name] = encode(datasets.load(ref, role, data), tokenizer, rules, name=where)
        found.append(Texts(Longest.of(encoded), where))
        if role == "test":
            rows[ref.name] = frozenset(e.row for e in encoded)
    if data.corpus and any(method.objective.needs_corpus for method in methods(recipe)):
        text = survey.texts(data.corpus, data.world, data.root)
        piece = chunks(text, tokenizer, data.max_length, 1, bos=bos)[0].response
        found.append(Texts(Longest(top=max(piece)), "data.corpus", len(piece)))
    _check_selection(recipe)
    contexts = tuple(
        _behind(recipe, tokenizer, ref, Rules.of(data, "train", bos=bos, context=context), teachers, show)
        for context, teachers in contexts_of(recipe).items()
        for ref in data.sets.values()
    )
    return Read(_largest(found), counts, rows, unread, contexts)


def _selects(recipe: Recipe) -> list[Select]:
    return [*(method.select for method in methods(recipe)), *(model.sft.select for model in recipe.models.values() if model.sft)]


def _check_selection(recipe: Recipe) -> None:
    data = recipe.data
    selects = _selects(recipe)
    for name, ref in data.dev_sets().items():
        if any(s.metric == "fact_accuracy" for s in selects) and not all(e.facts for e in datasets.load(ref, "dev", data)):
            raise ConfigError(
                f"select.metric is fact_accuracy, but the dev set `{name}` has no facts; set `select.metric` to rouge_l or loss"
            )
        if unnamed := [s.metric for s in selects if s.metric in RULES and s.metric not in ref.columns]:
            place = "data.dev" if isinstance(data.dev, DataRef) else f"data.dev.{name}"
            raise ConfigError(
                f"select.metric is {unnamed[0]}, but the dev set `{name}` names no column of right answers; name it in "
                f"{place}.columns, for instance {{{unnamed[0]}: answer}}, or set `select.metric` to loss"
            )


def _tokenised(ref: DataRef, rows: int, show: Callable[[str], None]) -> Callable[[int], None]:
    return lambda done: show(f"{done:,} of {rows:,} rows of {ref.name} tokenised")


def _behind(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ref: DataRef, rules: Rules, teachers: set[str], show: Callable[[str], None]
) -> OfContext:
    data, where = recipe.data, f"data set `{ref.name}` (train)"
    if (total := survey.survey(ref, "train", data)).large:
        kept = keep(SplitRows.of(ref, "train", data), tokenizer, rules, name=where, tick=_tokenised(ref, total.rows, show))
        return OfContext(frozenset(teachers), kept.counts, Texts(kept.longest, where))
    encoded, counts = encode(datasets.load(ref, "train", data), tokenizer, rules, name=where)
    return OfContext(frozenset(teachers), counts, Texts(Longest.of(encoded), where))


def check_texts(
    recipe: Recipe, name: str, rows: int, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, texts: Texts, shared: int
) -> None:
    """Check that each token has an embedding, and that no text is longer than the model can read.

    Args:
        name: the model's name in the recipe.
        rows: number of the model's embeddings.
        config: the model's configuration.
        tokenizer: the tokenizer that encoded the texts.
        shared: number of tokens that all models with this tokenizer have.

    Raises:
        ModelError, ConfigError: a token has no embedding, a text is too long, or a text has a token that only some of the models have.
    """
    top = texts.longest.top
    token = str(tokenizer.convert_ids_to_tokens(top))
    check_ids(top, rows, texts.where, token)
    if top >= shared:
        raise ModelError(
            f"{texts.where} contains the token {token!r} ({top}), but some models of the path "
            f"have only the first {shared} tokens; remove it from the texts, or set `tokenizer:` of all these models to one tokenizer"
        )
    check_lengths(config, _needs(recipe, name, positions_of(config), texts))


def _needs(recipe: Recipe, model: str, positions: int | None, texts: Texts) -> dict[str, tuple[int, str]]:
    # the positions that the texts need, as `check_lengths` takes them
    longest = texts.longest
    by_arm = {name: sampled_tokens(recipe.model_copy(update={"arms": {name: arm}}), model) for name, arm in recipe.arms.items()}
    sampled = max(by_arm.values(), default=0)
    new, key = max((recipe.evaluate.max_new_tokens, "evaluate.max_new_tokens"), (sampled, "sampler.max_new_tokens"))
    of, left = "", (positions or 0) - longest.prompt
    fix = f"set {key} to at most {left}" if left > 0 else "lower data.max_prompt"
    controls = {name: recipe.arms[name].controls for name, length in by_arm.items() if length == new > recipe.evaluate.max_new_tokens}
    if positions and longest.prompt < positions and controls and all(c and c.kind == "no_teacher" for c in controls.values()):
        name = next(iter(controls))  # `fair: true` gives it a sampler that the recipe does not show
        of = f" of the control {name}"
        fix = f"write arms.{name}: {{control: {recipe.arms[name].control}, sampler: {{max_new_tokens: {positions - longest.prompt}}}}}"
    return {
        f"the longest prompt ({counted(longest.prompt, 'token')}) plus {key} ({new}){of} needs": (longest.prompt + new, fix),
        "the longest prompt with its reference response needs": (longest.whole, "lower data.max_length"),
        f"the teacher's longest prompt ({counted(longest.context, 'token')}, with `context`) and the response need": (
            max(longest.context_whole, longest.context and longest.context + sampled),
            "lower context.max_prompt",
        ),
        "a piece of data.corpus needs": (texts.chunk, "lower data.max_length"),
    }


def check_readable(read: Mapping[str, Read]) -> None:
    """Check that the tokenizers of a study can encode the characters of the data. A study with only one tokenizer is not checked.

    Args:
        read: the splits as each tokenizer tokenises them. The key is the name of a model with this tokenizer.

    Raises:
        DataError: most tokens of a split's prompts are the unknown token of a tokenizer.
    """
    for name, of_model in read.items() if len(read) > 1 else ():
        for (role, data), counts in of_model.counts.items():
            if 2 * counts.unknown > counts.tokens:
                raise DataError(
                    f"models.{name}: its tokenizer cannot read {data} ({role}): {counts.unknown_text}; choose a model whose tokenizer has "
                    "the characters of this text"
                )


def rows_notes(read: Mapping[str, Read]) -> list[str]:
    """Return sentences about rows that are left out or cut, and about test sets whose rows are not the same for all models.

    Raises:
        DataError: no row of a test set is short enough for all models.
    """
    found, first = list[str](), next(iter(read.values()))
    for each in first.contexts:
        if each.counts.of_contexts:
            who = " and ".join(sorted(each.teachers))
            found.append(f"training with the context of {who}: of {counted(each.counts.rows, 'row')}, {each.counts.of_contexts}")
    for role, name in first.counts:
        counts = {model: of_model.counts[role, name] for model, of_model in read.items() if (role, name) in of_model.counts}
        for texts in ({m: c.text for m, c in counts.items()}, {m: c.unknown_text for m, c in counts.items()}):
            alike = len(set(texts.values())) == 1
            for model, text in list(texts.items())[: 1 if alike else None]:
                if text:
                    found.append(f"{name} ({role}{'' if alike else f', {model}'}): {text}")
        if role != "test":
            continue
        shared = frozenset.intersection(*(of_model.rows[name] for of_model in read.values()))
        if not shared:
            raise DataError(
                f"no row of data set `{name}` ({role}) is short enough for all of the models {', '.join(read)}, so they cannot be "
                "compared; raise data.max_prompt"
            )
        if any(of_model.rows[name] != shared for of_model in read.values()):
            found.append(
                f"{name} ({role}): the models are compared on the {counted(len(shared), 'row that is', 'rows that are')} short enough for "
                "all of them"
            )
    return found


def script_notes(recipe: Recipe) -> list[str]:
    """Return a note for each split that is scored with ROUGE-L, if its references have many characters outside ASCII. ROUGE-L ignores these
    characters. A split gets a note if the share of such characters is at least `UNSEEN`."""
    data, found = recipe.data, list[str]()
    selects = _selects(recipe)
    for role, ref in data.splits():
        if role == "train" or (role == "dev" and not any(select.metric == "rouge_l" for select in selects)):
            continue
        share = survey.survey(ref, role, data).beyond_ascii
        if share >= UNSEEN:
            fix = "set select.metric to rouge_l_unicode" if role == "dev" else "rouge_l_unicode, which counts them, is measured too"
            dropped = f"{100 * share:.0f} % of the letters and symbols of the references, because they are not ASCII"
            found.append(f"{ref.name} ({role}): ROUGE-L ignores {dropped}; {fix}")
    return found
