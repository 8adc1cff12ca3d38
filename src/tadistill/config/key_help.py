"""Explain a word in a recipe, for `tadistill explain`. The word is a key, a `type`, the name of a method, or an allowed value."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tadistill.config.method import METHODS
from tadistill.config.reference import NAME, Key, Part, dotted, more_about, page_text, reference
from tadistill.config.shorthand import SHORT_KEYS
from tadistill.errors import ConfigError

_TOKEN = re.compile(r"\[([^\]]+)\]|([^.\[\]]+)")


@dataclass(frozen=True)
class Entry:
    """The explanation of one word."""

    title: str
    meaning: str
    facts: tuple[tuple[str, str], ...] = ()
    """Pairs of a label and a text, such as (`default`, `0.0005`)."""
    below: tuple[tuple[str, str], ...] = ()
    """The keys or values that belong to this word, each with one sentence about it."""


@dataclass(frozen=True)
class _Found:
    place: str
    key: Key
    part: Part
    missing: int  # number of words in the key's full name that the user did not write
    types: tuple[str, ...] = ()  # the `type` of each group that has this key


def explain(asked: str, others: Iterable[str] = ()) -> list[Entry]:
    """Return all explanations of a word: a key (`lr`, `method.optim.lr` or `arms.X.path`), a `type`, a method, or an allowed value.

    Args:
        others: words that are not from recipes, such as terms of the glossary. The error message about a mistyped word can suggest them.

    Raises:
        ConfigError: nothing has this name.
    """
    words = [first or second for first, second in _TOKEN.findall(asked.strip("`\"' ").split("=")[0])]
    if len(words) > 1 and words[0] in SHORT_KEYS:  # of the short form
        words = ["models", *words]
    found = _keys(words) or _groups(words) if words else []
    if len(words) == 1:
        found += _named(words[0])
    if found:
        return found
    also = ", and no word of a report that `tadistill explain` knows" if others else ""
    raise ConfigError(f"`{asked}` is no key or value of a recipe{also}; {_hint(asked, words, others)}")


def _keys(words: list[str]) -> list[Entry]:
    matches: dict[tuple, _Found] = {}
    for part in reference():
        for key in part.keys:
            places = [(place, missing) for place in part.places if (missing := _missing([*_split(place), key.name], words)) is not None]
            for place, missing in sorted(places, key=lambda each: each[1])[:1]:
                same = ("type" if key.name == "type" else key, part.places)
                first = matches.get(same, _Found(place, key, part, missing))
                matches[same] = replace(first, types=(*first.types, part.type) if part.type else ())
    least = min((each.missing for each in matches.values()), default=0)
    chosen = [each for each in matches.values() if least or not each.missing]
    return _each_once(_entry(each) for each in sorted(chosen, key=lambda each: (each.missing, NAME in each.place)))


def _each_once(entries: Iterable[Entry]) -> list[Entry]:
    found: list[Entry] = []
    for entry in entries:
        found.append(replace(entry, below=()) if any(entry.below == other.below for other in found) else entry)
    return found


def _missing(pattern: list[str], words: list[str]) -> int | None:
    if not words:
        return len([word for word in pattern if word != NAME])
    if not pattern:
        return None
    *before, last = pattern
    tries = []
    if last == words[-1] or (last == NAME and words[:-1]):
        tries.append(_missing(before, words[:-1]))
    if last == NAME:
        tries.append(_missing(before, words))
    if words[-1].isdecimal():
        tries.append(_missing(pattern, words[:-1]))
    return min((each for each in tries if each is not None), default=None)


def _groups(words: list[str]) -> list[Entry]:
    return [
        _group(part, place)
        for part in reference()
        for place in part.places
        if place.endswith(NAME) and len(words) > 1 and _missing(_split(place), words) == 0
    ]


def _entry(found: _Found) -> Entry:
    key, place = found.key, found.place
    full = dotted(place, key.name)
    places = [dotted(other, key.name) for other in found.part.places]
    also = [("also at", _places(place for place in places if place != full))] if len(places) > 1 else []
    more = ("more in", more_about(full, found.part))
    if key.name == "type":
        text = f"Selects the kind of {_split(place)[-1]}. The kind decides which other keys are allowed."
        return Entry(full, text, (*also, more), tuple(_types(place)))
    facts = [("type", ", ".join(filter(None, (key.type, "" if key.choices else key.allowed))))]
    facts += [("one of", ", ".join(key.choices))] if key.choices and not _types(full) else []
    facts += [("required", "yes") if key.default == "required" else ("default", key.default)] if key.default else []
    some = 0 < len(found.types) < len(_types(place))
    facts += [("with type", ", ".join(found.types))] if some else []
    return Entry(full, key.meaning, (*facts, *also, more), tuple(_below(full)))


def _places(places: Iterable[str]) -> str:
    """Return the places of a key as text. Places inside of phases are not listed one by one, because every method can have phases. The text
    ends with `and in phases` instead."""
    every = [*places]
    whole = [place for place in every if ".phases." not in place]
    return ", ".join([*whole, "and in phases"] if whole and len(whole) < len(every) else every)


def _below(full: str) -> Iterator[tuple[str, str]]:
    if types := _types(full):
        yield from ((f"type: {name}", text) for name, text in types)
        return
    found: dict[str, str] = {}  # each key once: `data.train` is one set, or sets by name with the same keys
    for part in reference():
        if full and (full in part.places or f"{full}.{NAME}" in part.places):
            found |= {key.name: _sentence(key.meaning) for key in part.keys}
    yield from found.items()


def _types(place: str) -> list[tuple[str, str]]:
    return [(part.type, _sentence(part.meaning)) for part in reference() if part.type and place in part.places]


def _named(word: str) -> Iterator[Entry]:
    for part in reference():
        if part.type == word:
            yield _group(part, f"{part.places[0]}, type {word}")
    if word in METHODS:
        settings = tuple((name, ", ".join(f"{key} {value}" for key, value in given.items())) for name, given in METHODS[word].items())
        yield Entry(
            f"method: {word}", "A published method by name.", (*settings, ("more in", page_text("reference/recipe.md#methods-by-name")))
        )
    for part in reference():
        for key in part.keys:
            if word in key.choices and word not in METHODS and key.type == "text" and key.name != "type":
                yield _entry(_Found(part.places[0], key, part, 0, (part.type,) if part.type else ()))


def _group(part: Part, title: str) -> Entry:
    keys = tuple((key.name, _sentence(key.meaning)) for key in part.keys if key.name != "type")
    return Entry(title, part.meaning, (("more in", part.more),), keys)


def _hint(asked: str, words: list[str], others: Iterable[str]) -> str:
    if words and (known := SYNONYMS.get(words[-1].lower().replace("-", "_"))):
        return f"did you mean `{known}`?"
    full = {dotted(place, key.name) for part in reference() for place in part.places for key in part.keys}
    names = {name.rsplit(".", 1)[-1] for name in full} | {part.type for part in reference() if part.type} | {*METHODS}
    close = difflib.get_close_matches(asked.lower(), sorted(full.union(others)), n=1, cutoff=0.8)
    close = close or difflib.get_close_matches((words or [""])[-1], sorted(names), n=1)
    return f"did you mean `{close[0]}`?" if close else f"{page_text('reference/recipe.md')} explains the parts of a recipe"


def _split(place: str) -> list[str]:
    return place.split(".") if place else []


def _sentence(text: str) -> str:
    return re.split(r"(?<!al\.)(?<=\.) (?=[A-Z`(])", " ".join(text.split()), maxsplit=1)[0]


# --- words of other programs ------------------------------------------------------------------------------------------------

WORDS = {
    # our key, alone or with its place or value -> words for it in TRL, transformers, peft, axolotl and ms-swift
    "study": "output_dir run_name",
    "seeds": "seed",
    "method: seqkd": "seq_kd",
    "lr": "learning_rate",
    "lr_min": "min_lr",
    "epochs": "num_epochs num_train_epochs",
    "steps": "max_steps updates",
    "batch": "batch_size train_batch_size global_batch_size",
    "micro_batch": "per_device_train_batch_size micro_batch_size gradient_accumulation_steps",
    "packed": "packing padding_free sample_packing",
    "evaluate.batch": "per_device_eval_batch_size eval_batch_size",
    "warmup": "warmup_steps warmup_ratio",
    "clip": "max_grad_norm gradient_clipping",
    "schedule": "lr_scheduler lr_scheduler_type scheduler",
    "betas": "adam_beta1 adam_beta2",
    "eps": "adam_epsilon",
    "precision": "dtype torch_dtype bf16 fp16",
    "optim": "optimizer",
    "objective": "loss loss_type",
    "objective: {type: uld}": "use_uld_loss",
    "method.sampler.lam": "lmbda",
    "engine": "use_vllm",
    "max_length": "max_seq_length max_seq_len sequence_len cutoff_len",
    "max_prompt": "max_prompt_length",
    "max_new_tokens": "max_completion_length max_tokens",
    "load": "model_name_or_path base_model model_id pretrained path",
    "models": "model student_model",
    "teacher": "teacher_model teacher_model_name_or_path teacher_model_init_kwargs",
    "train": "dataset datasets dataset_name train_file",
    "dev": "val validation eval_dataset",
    "template": "chat_template",
    "lora": "peft_config",
    "r": "lora_r lora_rank rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target_modules target_modules",
    "select": "load_best_model_at_end",
    "every": "eval_steps save_steps eval_every",
    "metric": "metric_for_best_model",
    "patience": "early_stopping_patience",
    "trackers": "report_to",
}
SYNONYMS = {word: key for key, words in WORDS.items() for word in words.split()}
"""Maps a key of another program, such as `learning_rate`, to our key, such as `lr`."""
