"""Short labels of stages that still tell the stages apart.

A full label is, for instance, `distill xl -> s, minillm on teacher_mixed (rounds of 256, 4 updates each), 160 updates, seed 10`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

_BRACKETS = re.compile(r" \((?!turn )[^()]*\)")
_UPDATES = re.compile(r", \d+ updates")


def distinct_labels(stages: Iterable[tuple[str, str, Collection[str]]], *, short: bool = True) -> dict[str, str]:
    """Return key -> label, with different labels for different stages. The model, the method and the seed are always part of a label.

    With `short`, text in brackets and the number of updates are left out where labels differ without them. If two full labels are equal,
    each label also names the arms that use the stage, or else the start of its key.

    Args:
        stages: the key, the full label and the names of the arms of each stage.
    """
    rows = list({key: (key, label, arms) for key, label, arms in stages}.values())
    full = {key: label for key, label, _ in rows}
    plain = {key: _BRACKETS.sub("", label) for key, label in full.items()}
    brief = {key: _UPDATES.sub("", label) for key, label in plain.items()}
    by_arm = {key: f"{brief[key]} ({', '.join(sorted(arms))})" if arms else full[key] for key, _, arms in rows}
    by_key = {key: f"{brief[key]} ({key[:8]})" for key in full}
    forms = (brief, plain, full, by_arm, by_key) if short else (full, by_arm, by_key)
    found: dict[str, str] = {}
    for form in forms:
        found |= _alone(form, found)
    return {key: found[key] for key in full}


def _alone(form: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    left, used = {key: text for key, text in form.items() if key not in found}, set(found.values())
    counts = Counter(left.values())
    return {key: text for key, text in left.items() if counts[text] == 1 and text not in used}
