"""Routes: several teachers at the start of a path, each of which teaches on its own training sets.

`m on maths + xl on chat > s` means that m teaches s on the rows of the set maths, and xl on those of the set chat. This is multi-teacher
on-policy distillation (MOPD) if the student writes the text. The sets are those of `data.train`.
"""

from collections.abc import Iterable, Iterator

_AND, _ON = " + ", " on "


def is_route(name: str) -> bool:
    """Return True if the text between two `>` of a path is a route, such as `m on maths + xl on chat`."""
    return _ON in name


def members(name: str) -> tuple[str, ...]:
    """Return the models of one position of a path (the text between two `>`), without duplicates: one model, or the teachers of a route."""
    return tuple(dict.fromkeys(model for model, _ in _pairs(name))) if is_route(name) else (name,)


def teachers_of(name: str) -> dict[str, str]:
    """Map each training set of a route to its teacher. Return an empty dict for a single model."""
    return {set_: teacher for teacher, set_ in _pairs(name)} if is_route(name) else {}


def flat(path: Iterable[str]) -> tuple[str, ...]:
    """Return all models of a path, in order. A route is replaced by its teachers."""
    return tuple(model for name in path for model in members(name))


def routed(paths: Iterable[tuple[str, ...]]) -> bool:
    """Return True if one of the paths begins with a route."""
    return any(is_route(path[0]) for path in paths)


def problems(path: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each mistake in the routes of a path."""
    for place, name in enumerate(path):
        if not is_route(name):
            continue
        if place > 0:
            yield f"path has several teachers (`{name}`) after another model; write several teachers only at the start of a path"
        elif len(path) < 2:
            yield f"path `{name}` has no student; write for instance `{name} > s`"
        pairs = _pairs(name)
        names = [set_ for _, set_ in pairs]
        if wrong := next((part for part in name.split(_AND) if part.count(_ON) != 1 or not all(map(str.strip, part.split(_ON)))), None):
            yield f"path has `{wrong.strip()}`, which is not of the form MODEL on SET; write for instance `m on maths + xl on chat > s`"
        elif twice := next((set_ for set_ in names if names.count(set_) > 1), None):
            yield f"path `{name}` names two teachers for the set {twice}; name one teacher for each set"
        elif own := next((model for model in path[1:] if model in members(name)), None):
            yield f"path `{name} > …` names {own} as a teacher and as a student; a model that teaches itself must be its only teacher"


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(model.strip(), set_.strip()) for part in name.split(_AND) for model, _, set_ in [part.partition(_ON)]]
