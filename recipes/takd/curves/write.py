"""Writes the data of recipes/takd/tinyworld-curves.yaml: tinyworld's facts about people, without places, skills and open questions.

    python recipes/takd/curves/write.py SEED [FOLDER]

For each fact, training has five of six wordings. The test sets have the sixth wording (`held`), a short wording that training does not use
for this fact (`short`), and a wording that training never uses (`reworded`). `dev` has a second wording that training never uses.
"""

import json
import sys
from pathlib import Path

from tadistill.data import fictional_world as parts
from tadistill.data import tinyworld

PEOPLE = 10


def splits(seed: int) -> dict[str, list[dict]]:
    """Return the rows of each split of a world."""
    found: dict[str, list[dict]] = {name: [] for name in ("train", "dev", "held", "short", "reworded")}
    for fact in tinyworld.world(seed, PEOPLE).facts:
        if fact.kind not in parts.PERSON_KINDS:
            continue
        kind, rng = parts.KINDS[fact.kind], parts.rng(seed, "curves", fact.kind, fact.subject)

        def add(to: str, ask: str, short: bool = False, fact=fact, kind=kind, rng=rng) -> None:
            answer = fact.value if short else fact.say(parts.pick(kind.answers, rng, parts.ANSWER_WEIGHTS))
            row = {"instruction": fact.say(ask), "output": answer, "facts": [[fact.value, list(fact.rivals)]]}
            found[to].append(row)

        held, *asks = parts.shuffled(kind.asks, rng)
        held_short, *short_asks = parts.shuffled(kind.short_asks, rng)
        for ask in asks:
            add("train", ask)
        for ask in short_asks:
            add("train", ask, short=True)
        add("held", held)
        add("short", held_short, short=True)
        for to, ask in zip(("reworded", "dev"), parts.shuffled(kind.rewordings, rng), strict=True):
            add(to, ask)
    return {name: parts.shuffled(rows, parts.rng(seed, "curves order", name)) for name, rows in found.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits(int(sys.argv[1])).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
