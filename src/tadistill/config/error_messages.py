"""Turn pydantic's errors into sentences: the key, what is wrong, and how to mend it.

Users never see pydantic's own texts. `_FIXES` has a text of our own for each type of error.
"""

import difflib
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from tadistill.config.common import FUNCTION, Strict, message_of
from tadistill.config.data import OF_TRAINING, ONE, SETS
from tadistill.config.key_help import SYNONYMS
from tadistill.config.method import METHODS
from tadistill.config.reference import classes, dotted, groups, meaning, named_classes, tag
from tadistill.config.shorthand import chooses_on_dev
from tadistill.errors import did_you_mean_then
from tadistill.text import counted

_SHORT_WITHOUT = (("seeds",), ("data", "dev"))  # keys that the long form of a recipe needs


def problems(error: ValidationError, raw: Any, root: type[BaseModel]) -> list[tuple[tuple, str]]:
    """Return pairs of a key and a text that says what is wrong with this key. A message shows the text right after the key.

    Unknown keys come first, because they cause other problems. The key is empty if the text is about the whole recipe.

    Args:
        raw: the plain data that pydantic refused.
        root: the class for the whole data, such as `Recipe`.
    """
    found: dict[tuple, str] = {}
    meant: set[tuple] = set()
    for problem in sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "too_short")):
        location, kind = tuple(problem["loc"]), problem["type"]
        key = _resolve(location, root)[0]
        if kind == "extra_forbidden":
            name, hint = _unknown(location, key, root)
            meant.add((*key[:-1], name))
            found.setdefault(key, f" is not a known key; {hint}")
            continue
        if kind == "missing" and isinstance(key[-1], int):  # an index of a list
            key, kind = key[:-1], "too_short"
        if kind == "missing":
            if key not in meant:  # a mistyped key has its own sentence
                found.setdefault(key, f" is missing{_needed(key, raw)}")
            continue
        key = _given(key, raw)  # without the names that pydantic gives to the choices of a union
        if kind == "too_short" and any(other[: len(key)] == key for other in found):
            continue  # pydantic counts only the items that are right
        if kind == "value_error":
            for sentence in message_of(problem).split("\n"):
                at, text = _own(sentence, key, raw, problem["input"])
                found[at] = found[at] if at in found and at else text if at not in found else f"{found[at]} {text}"
            continue
        found.setdefault(key, _sentence(kind, problem, key, location, root))
    return [*found.items()]


def _needed(key: tuple, raw: Any) -> str:
    if key == ("data", "dev") and isinstance(raw, dict) and (chosen := chooses_on_dev(raw)):
        return f", but `{chosen}` chooses a checkpoint on it; add it. A recipe in the short form without `{chosen}` needs no dev."
    only = " Only a recipe in the short form (with `student`) may leave it out." if key in _SHORT_WITHOUT else ""
    return f"; add it.{only}"


def _own(sentence: str, key: tuple, raw: Any, value: Any) -> tuple[tuple, str]:
    # a message of our own validators can begin with a key; returns this key and the rest of the message
    first, _, rest = sentence.partition(" ")
    named = tuple(first.strip("`").split("."))
    sentence = sentence.rstrip(".")
    if _given(named, raw) and named[: len(key)] == key:
        return named, f" {rest.rstrip('.')}."
    if key and first.strip("`") == key[-1]:
        return key, f" {rest.rstrip('.')}."
    named = sentence.startswith(f"`{value}` ")
    shown = f" is {_shown(value)}:" if not named and isinstance(value, (str, int, float, bool)) else ":"
    return key, f"{shown} {sentence}." if key else f" {sentence}."


def _sentence(kind: str, problem: Any, key: tuple, location: tuple, root: type[BaseModel]) -> str:
    value, context = problem["input"], problem.get("ctx", {})
    if kind == "union_tag_invalid":
        return _type(str(context.get("tag")), re.findall(r"'([^']+)'", str(context.get("expected_tags"))), key)
    if kind == "union_tag_not_found":
        return f" needs a `type`, which decides its other keys; write for instance {{type: {_first_type(location, root)}}}."
    if value is None:
        return f" has no value; {_empty(kind, context)}, or remove the key."
    if kind in ("too_short", "too_long"):
        return _length(kind, value, context, location, root)
    if kind in _MAPPING:
        wanted = " or ".join([*_short_forms(location, root), "a group of keys"])
        return f" is {_shown(value)}, but it must be {wanted}; {_mapping(value, key, location, root)}."
    fix = _FIXES.get(kind) or problem["msg"][:1].lower() + problem["msg"][1:].rstrip(".")
    return f" is {_shown(value)}: {fix if isinstance(fix, str) else fix(value, context)}."


def _short_forms(location: tuple, root: type[BaseModel]) -> list[str]:
    # what can stand for a group of keys here, such as a text
    if any(named_classes(_fields(model).get(location[-1])) for model in _resolve(location[:-1], root)[1]):
        return []  # a mapping from names; only its entries have short forms
    models = [model for model in _resolve(location, root)[1] if issubclass(model, Strict)]
    forms = {"a text": {model.text_sets for model in models}, "a list": {model.list_sets for model in models}}
    return [f"{form} (the value of `{'` or `'.join(sorted(keys - {''}))}`)" for form, keys in forms.items() if keys - {""}]


# --- values -------------------------------------------------------------------------------------------------------------

_MAPPING = ("model_type", "model_attributes_type", "dict_type", "dataclass_type", "mapping_type")


def _choice(value: Any, context: Mapping[str, Any]) -> str:
    names = re.findall(r"'([^']+)'", str(context.get("expected")))
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? It can be " if close else "write "
    return f"{hint}{context.get('expected')}"


def _pattern(value: Any, context: Mapping[str, Any]) -> str:
    if context.get("pattern") == r"\S":
        return "write a name that is not empty"
    if context.get("pattern") == FUNCTION:
        module, _, name = str(value).removesuffix(".py").replace(".py:", ":").replace("/", ".").replace(":", ".").rpartition(".")
        example = f"{module}:{name}" if re.fullmatch(FUNCTION, f"{module}:{name}") else "losses:squared"
        return f"a function is named as MODULE:FUNCTION, for instance {example}"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-._")
    example = f", for instance {plain}" if plain else ""
    return f"use only letters (a-z), digits, `.`, `_` and `-`, and begin with a letter or a digit{example}"


def _list_of(value: Any, context: Mapping[str, Any]) -> str:
    return f"write a list: [{_plain(value)}]" if isinstance(value, (str, int, float, bool)) else "write a list, with [ ]"


def _quoted(value: Any) -> str:
    if isinstance(value, bool):  # what the recipe has is not known
        return "YAML reads yes, no, on, off, true and false as true or false; put the text in quotes"
    number = isinstance(value, (int, float))
    return "YAML reads this text as a number; put it in quotes" if number else "write one text, without [ ] or { }"


_FIXES: dict[str, str | Callable[[Any, Mapping[str, Any]], str]] = {
    "tuple_type": _list_of,
    "list_type": _list_of,
    "int_type": "write a whole number",
    "int_parsing": "write a whole number",
    "int_parsing_size": "the number is too large; write a smaller one",
    "int_from_float": "write a whole number",
    "float_type": "write a number, such as 0.5 or 1e-4",
    "float_parsing": "write a number, such as 0.5 or 1e-4",
    "finite_number": "write a finite number",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "string_type": lambda value, context: _quoted(value),
    "string_pattern_mismatch": _pattern,
    "literal_error": _choice,
    "greater_than": lambda value, context: f"write a number greater than {_plain(context['gt'])}",
    "greater_than_equal": lambda value, context: f"write a number of at least {_plain(context['ge'])}",
    "less_than": lambda value, context: f"write a number less than {_plain(context['lt'])}",
    "less_than_equal": lambda value, context: f"write a number of at most {_plain(context['le'])}",
}


def _empty(kind: str, context: Mapping[str, Any]) -> str:
    if kind in _MAPPING:
        return "write its keys below it"
    if kind in ("tuple_type", "list_type"):
        return "write a list, with [ ]"
    return _choice("", context) if kind == "literal_error" else "write a value after the colon"


def _length(kind: str, value: Any, context: Mapping[str, Any], location: tuple, root: type[BaseModel]) -> str:
    have = len(value) if isinstance(value, (list, tuple, dict, str)) else int(context.get("actual_length", 0))
    default = _default(location, root)
    if (default and kind != "too_short") or "actual_length" not in context:
        wanted = f"{len(default)}, such as {json.dumps(default)}" if default else "more"
        return f" has {counted(have, 'value')}; write {wanted}."
    if kind == "too_long":
        return f" has {counted(have, 'value')}; write at most {context.get('max_length')}."
    size = f"has {counted(have, 'value')}" if have else "is empty"
    return f" {size}; write at least {context.get('min_length')}."


def _default(location: tuple, root: type[BaseModel]) -> tuple:
    # the default of a list; empty if it has none
    names = [part for part in location if not isinstance(part, int)]
    for model in _resolve(tuple(names[:-1]), root)[1]:
        field = model.model_fields.get(str(names[-1]))
        if field is not None and isinstance(field.default, tuple):
            return field.default
    return ()


_LINES = {"models": "xl: {load: ORG/NAME}", "arms": "direct: xl > s", "resources": "default: {hours: 3}"}


def _mapping(value: Any, key: tuple, location: tuple, root: type[BaseModel]) -> str:
    models = _resolve(location, root)[1]
    if any("type" in model.model_fields for model in models):
        return f"write {{type: {value if isinstance(value, str) else _first_type(location, root)}}}"
    names = sorted({name for model in models for name in _fields(model)})
    if key[:1] == ("arms",) and len(key) == 2:
        return "write a path, such as xl > s, or several keys, one of them `path`"
    if key[:1] == ("models",) and len(key) == 2 and isinstance(value, str):
        return f"write {key[1]}: {{load: {value}}}"
    if not names or (len(key) == 1 and key[0] in ("models", "arms", "resources")):
        return f"write lines of the form NAME: … below {key[-1]}, for instance {_LINES.get(str(key[-1]), 'NAME: …')}"
    few = f"{', '.join(names[:6])} …" if len(names) > 7 else ", ".join(names)
    place = "in braces" if isinstance(key[-1], int) else f"below {key[-1]}, or in braces"
    return f"write keys {place} (possible keys: {few})"


def _first_type(location: tuple, root: type[BaseModel]) -> str:
    return next((name for model in _resolve(location, root)[1] if (name := tag(model))), "…")


_TYPES = {
    # words that are neither an objective, nor a sampler, nor a method by name
    "kl": "objective: {type: forward_kl} or {type: reverse_kl}",
    "jsd": "objective: {type: jensen_shannon}",
    "on_policy": "sampler: {type: student}",
}


def _type(given: str, known: list[str], key: tuple) -> str:
    if key[-1] == "objective" and given in METHODS:
        return f" has type {_shown(given)}, which is a method and not an objective; write `method: {given}`."
    if (kind := _TYPES.get(given.lower().replace("-", "_"))) and key[-1] in kind:
        hint = f"write {kind}. Known types: {', '.join(known)}"
    else:
        hint = did_you_mean_then(given, known, f"known types: {', '.join(known)}")
    return f" has type {_shown(given)}; {hint}."


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"
    return repr(value)


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# --- keys ---------------------------------------------------------------------------------------------------------------


def _unknown(location: tuple, key: tuple, root: type[BaseModel]) -> tuple[str, str]:
    name, blocks = str(key[-1]), _resolve(location[:-1], root)[1]
    others = {name} if "train" in key else {name, *OF_TRAINING}  # without `name`: another class for this key can have it
    here = sorted({n for m in blocks for n in _fields(m)} - others)
    plain = name.lower().replace("-", "_")
    wanted = [plain, *([SYNONYMS[plain]] if plain in SYNONYMS else [])]
    for other in wanted:
        *place, last = other.split(".")
        if last in here and place[-1:] in ([], [*key[-2:-1]]):
            return last, f"did you mean `{last}`?"
    alike = {n for m in blocks for n in m.model_fields if n != name and _is_called(plain, meaning(m, n))}
    if len(alike) == 1:
        (other,) = alike
        return other, f"did you mean `{other}`?"
    close = difflib.get_close_matches(name, here, n=1, cutoff=0.5)
    if close and plain not in SYNONYMS and (plain not in _places(root) or difflib.SequenceMatcher(None, name, close[0]).ratio() > 0.7):
        return close[0], f"did you mean `{close[0]}`?"
    of = [tag(m) for m, place in groups(root) if len(key) > 1 and place.split(".")[-1] == key[-2] and tag(m) and name in _fields(m)]
    if of:
        return "", f"it belongs to another `type` ({', '.join(dict.fromkeys(of))}); the keys of the chosen type are: {', '.join(here)}."
    for other in wanted:
        if re.search(r"[.:]", other) and other != plain:
            return "", f"did you mean `{other}`?"
        if found := _places(root).get(other):
            # of two, that of a training in place of that of `evaluate`, and then the one with fewer words
            place = max(found, key=lambda place: (_shared(place.split("."), key), not place.startswith("evaluate.")))
            return "", f"did you mean `{place}`{'' if '.' in place else ', at the top level of the recipe'}?"
    return "", f"the known keys here are: {', '.join(here)}."


def _shared(place: Sequence[str], key: tuple) -> int:
    # the number of words at the beginning of a key that a place begins with too; each key of a model begins with `models`
    if place[0] == "models" and place[2:3] != [*key[2:3]]:
        return 0
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(place, key, strict=False)))


def _is_called(word: str, text: str) -> bool:
    # `temperature` means the key that is described as "The temperature. …"; but "Name of …" is the name of something else
    return word != "name" and re.match(rf"(the )?{re.escape(word.replace('_', ' '))}([.,:;]| of )", text, re.IGNORECASE) is not None


@functools.cache
def _places(root: type[BaseModel]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for model, place in groups(root):
        for name in _fields(model):
            found.setdefault(name, []).append(dotted(place, name))
    return {name: sorted(places, key=lambda place: place.count(".")) for name, places in found.items()}


def _given(key: tuple, raw: Any) -> tuple:
    for n, part in enumerate(key):
        inside = (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int) and part < len(raw))
        if not inside:
            return key[:n]
        raw = raw[part]
    return key


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {f.alias or name: f.annotation for name, f in model.model_fields.items()}


def _resolve(location: tuple, root: type[BaseModel]) -> tuple[tuple, list[type[BaseModel]]]:
    # returns the key without the union tags that pydantic inserts into a location, and the classes that are allowed for this key
    models: list[type[BaseModel]] = [root]
    key: list = []
    for part in location:
        if part in (ONE, SETS):
            continue
        tagged = [m for m in models if part and tag(m) == part]
        if tagged and part not in {n for m in models for n in _fields(m)}:
            models = tagged
            continue
        annotations = [_fields(m)[part] for m in models if part in _fields(m)]
        # a name in a mapping or an index of a list does not change the classes
        models = [c for a in annotations for c in classes(a)] if annotations else models
        key.append(part)
    return tuple(key), models
