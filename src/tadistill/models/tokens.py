"""Special tokens of a model (the tokens that end an answer, the token BOS, and the chat template), and the vocabularies of tokenizers.

Both are read from JSON files, so planning needs no torch, or from loaded models and tokenizers. `ends` merges the tokens that end an answer
for several models.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.data import chat, tinyworld
from tadistill.disk import write_json
from tadistill.errors import ModelError
from tadistill.models.model_files import read_or_empty

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class Tokens:
    """The special tokens of a model that are used in prompts and at the end of answers."""

    eos: int | None
    """The EOS id of the tokenizer. None if the files do not contain it."""
    generation: tuple[int, ...] = ()
    """The EOS ids in the generation configuration or, without such a configuration, in the model configuration."""
    config: tuple[int, ...] = ()
    """The EOS ids in the model configuration that are added tokens of the tokenizer. All other ids are ignored, because in some models they
    belong to another tokenizer."""
    turn: int | None = None
    """The id of the token with which the chat template ends an answer."""
    bos: int | None = None
    """The id of the token that the tokenizer puts before a text. None if it puts no token there."""
    template: str | None = None
    """The text of the chat template."""
    specials: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Maps variables of a chat template, such as `bos_token`, to the texts of these tokens."""
    texts: Mapping[int, str] = field(default_factory=dict, compare=False)
    """Maps the ids of `eos`, of `generation` and of all added tokens to the texts of these tokens."""

    @property
    def all(self) -> tuple[int, ...]:
        """The ids of all tokens that end an answer. EOS comes first."""
        found = [self.eos, *self.generation, *self.config, self.turn]
        return tuple(dict.fromkeys(i for i in found if i is not None))


TINYWORLD = Tokens(tinyworld.SPECIALS.index("<eos>"), texts=dict(enumerate(tinyworld.SPECIALS)))
"""The special tokens of the built-in data set tinyworld."""


def ends(first: Tokens, others: Iterable[Tokens] = (), *, in_chat: bool = False) -> tuple[int, ...]:
    """Return the ids of all tokens that end an answer in a study of several models.

    The tuple starts with the token that ends a reference answer: EOS or, with `in_chat`, the chat template's own end token.

    Args:
        first: the tokens of the tokenizer that the study uses.
        in_chat: True if this tokenizer's chat template writes the prompts.
    """
    closing = [first.turn] if in_chat and first.turn is not None else []
    return tuple(dict.fromkeys([*closing, *first.all, *(i for other in others for i in other.all)]))


def of(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Return the special tokens of a loaded model and a loaded tokenizer."""
    added: Any = tokenizer.added_tokens_encoder
    eos: Any = tokenizer.eos_token_id
    return Tokens(
        eos,
        _ids(model.generation_config.eos_token_id if model.generation_config else None),
        tuple(i for i in _ids(getattr(model.config, "eos_token_id", None)) if i in added.values()),
        chat.end_of_turn(chat.default_template(tokenizer.chat_template), added, tokenizer.special_tokens_map),
    )


def read(model: Path | None, tokenizer: Path) -> Tokens:
    """Return the special tokens in the directories of a model and of a tokenizer. `model` is None for random weights. Raises a
    ModelError if an EOS id is not a token of the model."""
    if model:
        check_ends(model, str(model))
    settings, added, vocabulary, first = _tokenizer(tokenizer)
    named = read_or_empty(tokenizer / "special_tokens_map.json") | settings
    specials = {name: text for name in _SPECIALS if (text := _content(named.get(name)))}
    known = vocabulary | added
    config, generation = (read_or_empty(model / f"{name}.json") if model else {} for name in ("config", "generation_config"))
    configured, generated = _ids(config.get("eos_token_id")), _ids(generation.get("eos_token_id"))
    generated = generated if generation else configured
    eos = known.get(specials.get("eos_token", ""))
    template = _template(tokenizer, settings)
    if eos is None and generated and "eos_token" not in specials:
        eos = generated[0]  # some tokenizer classes define EOS only in their code; the model has the same EOS
    shown = {eos, *generated, *added.values()}
    return Tokens(
        eos,
        generated,
        tuple(i for i in configured if i in added.values()),
        chat.end_of_turn(template, added, specials),
        known.get(specials.get("bos_token", "")) if first is not None and first == specials.get("bos_token") else None,
        template,
        specials,
        {i: text for text, i in known.items() if i in shown},
    )


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, as mappings from the text of a token to its id."""

    words: Mapping[str, int]
    """The id of each token that the tokenizer's files list as vocabulary. They may list added tokens, too."""
    added: Mapping[str, int]
    """The id of each added token, such as a special token. Added tokens can be missing in `words`."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {**self.words, **self.added}

    @property
    def size(self) -> int:
        """The largest id plus 1: the number of logits that a model of these tokens needs. If ids have gaps, it is more than the number of
        tokens."""
        return max(self.ids.values(), default=-1) + 1

    def extra(self, other: "Vocabulary") -> tuple[dict[str, int], dict[str, int]] | None:
        """Return two mappings from token to id: the tokens that only this tokenizer has, and those that only the other has. Return None if
        the two tokenizers may split text differently.

        They split text in the same way if at most one of them has extra tokens, and these are added tokens with higher ids than all others.
        """
        alone = self.ids.items() - other.ids.items(), other.ids.items() - self.ids.items()
        mine, theirs = (dict(sorted(items, key=lambda item: item[1])) for items in alone)
        if not mine and not theirs:
            return mine, theirs
        shared = max((self.ids.items() & other.ids.items()), key=lambda item: item[1], default=("", -1))[1]
        ordinary = mine.keys() - self.added.keys() or theirs.keys() - other.added.keys()
        if ordinary or min((*mine.values(), *theirs.values())) <= shared or (mine and theirs):
            return None
        return mine, theirs


def of_tinyworld(source: str, *, seed: int, people: int) -> Vocabulary:
    """Return the tokens of a tokenizer of the built-in data set tinyworld.

    `source` is the tokenizer's name, such as `tinyworld-bpe`. `seed` and `people` (the number of people) are the settings of the data set.
    """
    words = tinyworld.vocabulary(source, seed=seed, people=people)
    return Vocabulary(words, {word: words[word] for word in tinyworld.SPECIALS})


def vocabulary_of(directory: Path) -> Vocabulary | None:
    """Return the tokens of the tokenizer in a directory. Return None if no JSON file has them, as for a SentencePiece file."""
    _, added, words, _ = _tokenizer(directory)
    return Vocabulary(words, added) if words else None


def check_ends(directory: Path, load: str) -> None:
    """Check that the EOS ids in a model's generation_config.json are tokens of the model. `load` is the model's name in messages.

    Raises:
        ModelError: an id is not a token of the model.
    """
    given, config = read_or_empty(directory / "generation_config.json").get("eos_token_id"), read_or_empty(directory / "config.json")
    inner = config.get("text_config")
    words = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    most = words - 1 if isinstance(words, int) else None
    for token in given if isinstance(given, list) else [] if given is None else [given]:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0 or (most is not None and token > most):
            raise ModelError(
                f"eos_token_id in generation_config.json of model `{load}` has {json.dumps(token)[:80]}, which is not a token of the "
                f"model; write the id of a token{f' (0 to {most})' if most is not None else ''}, or a list of such ids"
            )


def name_ends(directory: Path) -> None:
    """Write the ids of all tokens that end an answer into the generation_config.json of a saved model. Older versions of tadistill did not
    save all these ids."""
    file = directory / "generation_config.json"
    content, found = read_or_empty(file), read(directory, directory)
    if content and set(found.generation) != set(found.all):
        write_json(file, content | {"eos_token_id": list(found.all)})


# --- loaded tokenizers ---------------------------------------------------------------------------------------------------


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the ids of all tokens that end an answer of this model. EOS of the tokenizer comes first."""
    return ends(of(model, tokenizer))


def check_same_tokenizer(tokenizers: Mapping[str, "PreTrainedTokenizerBase"]) -> None:
    """Check that all tokenizers have the same tokens, and the same EOS. `tokenizers` maps the name of a model to its tokenizer.

    A tokenizer may have additional added tokens, if their ids are higher than those of the other tokens (`Vocabulary.extra`).

    Raises:
        ModelError: two tokenizers differ. The message names both models, the vocabulary sizes and the first id that differs.
    """
    names = list(tokenizers)
    for other_name in names[1:]:
        name, first, other = names[0], tokenizers[names[0]], tokenizers[other_name]
        mine, theirs = vocabulary(first), vocabulary(other)
        if mine.extra(theirs) is None:
            by_id, by_other_id = ({i: repr(text) for text, i in words.ids.items()} for words in (mine, theirs))
            i = min(i for i in by_id.keys() | by_other_id.keys() if by_id.get(i) != by_other_id.get(i))
            what = f"token {i} is {by_id.get(i, 'absent')} in the first and {by_other_id.get(i, 'absent')} in the second"
        elif first.eos_token_id != other.eos_token_id:
            one, two = (f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})" for tokenizer in (first, other))
            what = f"EOS is {one} in the first and {two} in the second"
        else:
            continue
        fix = (
            "the plan could not find this difference, because a tokenizer.json is missing; save both tokenizers with save_pretrained, "
            "or choose models with the same tokenizer"
        )
        if mine.words == theirs.words:
            fix = f"set `tokenizer:` of `{other_name}` to that of `{name}`, whose vocabulary is the same"
        raise ModelError(
            f"models `{name}` and `{other_name}` have different tokenizers ({len(first)} and {len(other)} tokens): {what}; {fix}"
        )


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """Return the tokens of a loaded tokenizer."""
    fast: Any = tokenizer  # the base class does not declare get_added_vocab
    return Vocabulary(fast.get_vocab(), fast.get_added_vocab())


def shared_vocabulary(tokenizer: "PreTrainedTokenizerBase", *models: "PreTrainedModel", widths: Iterable[int] = ()) -> int:
    """Return the number of ids that the tokenizer and the output heads of all models have. `widths` are the sizes of further heads.

    In some families (Qwen2.5), models have more logits than tokens, and models of different sizes have different numbers of logits. Callers
    must therefore cut the logits to this number (`logits[..., :n]`), and renormalise.
    """
    heads: list[Any] = [model.get_output_embeddings() for model in models]
    return min([vocabulary(tokenizer).size, *(head.weight.shape[0] for head in heads), *widths])


def fast_tokenizer(directory: Path) -> "Tokenizer | None":
    """Return a tokenizer that needs no torch, without truncation and padding. Return None if the directory has no tokenizer.json."""
    file = directory / "tokenizer.json"
    return _fast_tokenizer(file) if file.is_file() else None


@lru_cache
def _fast_tokenizer(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer  # not at the top, because not every study needs it

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# --- reading files --------------------------------------------------------------------------------------------------------


@lru_cache
def _tokenizer_json(file: Path, mtime_ns: int) -> tuple[dict[str, int], dict[str, int], str | None]:
    content = read_or_empty(file)
    entries = [t for t in content.get("added_tokens") or [] if isinstance(t, dict)]
    added = {text: t["id"] for t in entries if (text := _content(t)) and isinstance(t.get("id"), int)}
    model = content.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    pairs = enumerate(words) if isinstance(words, list) else ()  # of a Unigram model: each token with its score
    listed = {pair[0]: i for i, pair in pairs if isinstance(pair, list) and pair and isinstance(pair[0], str)}
    vocabulary = words if isinstance(words, dict) else listed
    return added, vocabulary, _put_first(content.get("post_processor"))


def _tokenizer(directory: Path) -> tuple[dict[str, Any], dict[str, int], dict[str, int], str | None]:
    settings, file = read_or_empty(directory / "tokenizer_config.json"), directory / "tokenizer.json"
    decoder = settings.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    declared = {text: int(i) for i, entry in entries if str(i).isdecimal() and (text := _content(entry))}
    if file.is_file():  # then transformers reads neither vocab.json nor add_bos_token
        added, vocabulary, first = _tokenizer_json(file, file.stat().st_mtime_ns)
        return settings, declared | added, vocabulary, first
    first = _content(settings.get("bos_token")) or _content(read_or_empty(directory / "special_tokens_map.json").get("bos_token"))
    return settings, declared, read_or_empty(directory / "vocab.json"), first if settings.get("add_bos_token") is True else None


def _put_first(processor: Any) -> str | None:
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        return next((found for part in processor.get("processors") or [] if (found := _put_first(part))), None)
    if processor.get("type") == "TemplateProcessing":
        start = next(iter(processor.get("single") or []), None)
        special = start.get("SpecialToken") if isinstance(start, dict) else None
        return special.get("id") if isinstance(special, dict) else None
    cls = processor.get("cls")  # BertProcessing and RobertaProcessing: [text, id]
    return cls[0] if isinstance(cls, list) and cls and isinstance(cls[0], str) else None


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    return chat.default_template(read_or_empty(directory / "chat_template.json").get("chat_template") or settings.get("chat_template"))


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _ids(given: Any) -> tuple[int, ...]:
    several = given if isinstance(given, list | tuple) else [given]
    return tuple(i for i in several if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
