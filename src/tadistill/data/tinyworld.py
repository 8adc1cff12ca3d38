"""Generate tinyworld, a data set about a fictional world. The same seed gives the same bytes on every machine.

People and places have attributes, and relations to each other. Questions about a fact have several wordings. Answers have several
phrasings with unequal frequencies, so mode-seeking and mode-covering training give different models. A small student cannot learn all
facts. Skills (sort, reverse, count, extract, …) are tasks with an input. Each test set corresponds to one that MiniLLM uses:

    tinyworld            unseen wordings for known facts, skills on new inputs     (like Dolly)
    tinyworld_reworded   wordings that training never uses                         (like SelfInst)
    tinyworld_open       "tell me about …": several facts in one answer            (like Vicuna)
    tinyworld_lengths    references of one word and references of thirty words     (like S-NI)
    tinyworld_multi      every phrasing is a reference                             (like UnNI)
    tinyworld_choices    classification: the value or one of its rivals            (like SST-2, BoolQ)

Two more data sets are the halves of tinyworld, with training, dev and test rows: tinyworld_facts and tinyworld_skills.
Training contains all facts, so the test sets measure knowledge and not guessing. No pair of instruction and input is in two splits.

There are two tokenizers. Both encode the same rows, so models with different tokenizers can be compared on the same text:

    tinyworld        each word is one token, and so is each line break; spaces are not tokens
    tinyworld-bpe    byte-level BPE with 512 tokens, learnt from the training rows of the world; rare words have several tokens

Both tokenizers have the special tokens `SPECIALS`, with the same ids. A world of another seed or size has other words, and so its
tokenizers have other tokens.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tadistill.data import fictional_world as pieces
from tadistill.data.fictional_world import Fact, FictionalWorld, rivals_in, world
from tadistill.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VERSION = 1
"""The version of the generated rows. It is a part of the keys of stored results, so increase it whenever a row changes."""

SPLITS: dict[str, tuple[str, ...]] = {"tinyworld": ("train", "dev", "test")}
SPLITS |= {f"tinyworld_{part}": ("test",) for part in ("reworded", "open", "lengths", "multi", "choices")}
HALVES = {"tinyworld_facts": False, "tinyworld_skills": True}
"""Maps each half of tinyworld to True if it has the rows with an input, and to False if it has the rows without an input."""
SPLITS |= dict.fromkeys(HALVES, SPLITS["tinyworld"])

SPECIALS = ("<pad>", "<eos>", "<unk>")

# rows about facts (the limit, and the limit as a share of all facts, for small worlds); rows of each skill; rows of open questions
_FACTS = {"dev": (140, 0.16), "test": (130, 0.15), "multi": (120, 0.14)}
_FACTS |= {"reworded": (130, 0.5), "lengths": (70, 0.5), "choices": (150, 0.5)}
_INPUTS = {"train": 180, "dev": 7, "test": 6, "multi": 4, "reworded": 4, "lengths": 3}
_OPEN, _LENGTHS_OPEN = 150, 60

Row = dict[str, Any]


def world_rows(name: str, split: str, *, seed: int = 0, people: int = 120) -> list[Row]:
    """Return the rows of a split of the data set `name`. A row has an instruction, an input (which can be empty), outputs, and facts as
    pairs [value, rivals].

    An answer states a fact if it contains the value and none of the rivals (the wrong values), as whole words. Only rows of tinyworld_multi
    have several outputs. Rows of tinyworld_choices also have choices: the value and its rivals, sorted.
    """
    return [dict(row) for row in _splits(seed, people)[name, split]]


def corpus(*, seed: int = 0, people: int = 120) -> list[dict[str, str]]:
    """Return plain text about the world, for a language-modelling loss, as rows with the column `text`. Its sentences have other wordings
    than the answers."""
    here = world(seed, people)
    residents = {place: [f.subject for f in here.facts if f.value == place] for place in here.places}
    documents = []
    for subject, facts in here.by_subject.items():
        for telling in range(3):
            rng = pieces.rng(seed, "corpus", subject, telling)
            sentences = [pieces.pick(pieces.STORY_OPENINGS, rng).format(x=subject)]
            sentences += [f.say(pieces.pick(pieces.KINDS[f.kind].prose, rng)) for f in pieces.shuffled(list(facts.values()), rng)[:4]]
            who = pieces.shuffled(residents.get(subject, []), rng)[:3]
            if len(who) == 3:
                sentences.append(pieces.RESIDENTS.format(a=who[0], b=who[1], c=who[2], x=subject))
            documents.append({"text": " ".join(sentences)})
    return pieces.shuffled(documents, pieces.rng(seed, "corpus order"))


@lru_cache
def words(*, seed: int = 0, people: int = 120) -> tuple[str, ...]:
    """Return all words of a world, sorted. The line break counts as a word. Special tokens are not included."""
    here = world(seed, people)
    kinds, skills = pieces.KINDS.values(), pieces.SKILLS.values()
    phrases = [p for k in kinds for p in (*k.asks, *k.short_asks, *k.rewordings, *k.answers, *k.prose)]
    phrases += [p for s in skills for p in (*s.asks, *s.rewordings, *s.answers)]
    phrases += [*pieces.OPEN_ASKS, *pieces.SALES, *pieces.STORY_OPENINGS, pieces.RESIDENTS]
    used = {word for phrase in phrases for word in phrase.split() if not word.startswith("{")}
    return tuple(sorted(used.union(here.names, here.places, pieces.NUMBERS, *pieces.DOMAINS.values(), "\n")))


def fingerprint(*, seed: int = 0, people: int = 120) -> str:
    """Return a string that identifies the rows of a world. It is the same on every machine."""
    return f"tinyworld:v{VERSION}:seed={seed}:people={people}"


def _row(instruction: str, outputs: Sequence[str], facts: Iterable[tuple[str, tuple[str, ...]]], given: str = "") -> Row:
    return {"instruction": instruction, "input": given, "outputs": list(outputs), "facts": [list(f) for f in facts]}


@lru_cache
def _splits(seed: int, people: int) -> dict[tuple[str, str], tuple[Row, ...]]:
    here = world(seed, people)
    parts = defaultdict[str, list[Row]](list)
    for source in (_fact_rows, _open_rows, _skill_rows):
        for part, found in source(here).items():
            parts[part] += found
    mixed = {part: tuple(pieces.shuffled(found, pieces.rng(seed, "order", part))) for part, found in parts.items()}

    def rows_of(name: str, split: str) -> tuple[Row, ...]:
        if name in HALVES:
            return tuple(row for row in mixed[split] if bool(row["input"]) == HALVES[name])
        return mixed[split if name == "tinyworld" else name.removeprefix("tinyworld_")]

    return {(name, split): rows_of(name, split) for name, splits in SPLITS.items() for split in splits}


def _fact_rows(here: FictionalWorld) -> dict[str, list[Row]]:
    # One long and one short wording of each fact stay out of training. The long ones go to dev, test and multi, the short ones to lengths
    # and choices.
    parts = defaultdict[str, list[Row]](list)
    queue = iter(pieces.shuffled(here.facts, pieces.rng(here.seed, "deal")))
    counts = {part: min(most, int(share * len(here.facts))) for part, (most, share) in _FACTS.items()}
    part_of = {next(queue): part for part in ("dev", "test", "multi") for _ in range(counts[part])}
    chosen = {part: set(pieces.shuffled(here.facts, pieces.rng(here.seed, part))[: counts[part]]) for part in ("reworded", "lengths")}
    others = [fact for fact in here.facts if fact not in chosen["lengths"]]
    chosen["choices"] = set(pieces.shuffled(others, pieces.rng(here.seed, "choices"))[: counts["choices"]])
    for fact in here.facts:
        kind, rng = pieces.KINDS[fact.kind], pieces.rng(here.seed, "wordings", fact.kind, fact.subject)
        held, *asks = pieces.shuffled(kind.asks, rng)
        held_short, *short_asks = pieces.shuffled(kind.short_asks, rng)
        part, answers = part_of.get(fact), [fact.say(a) for a in kind.answers]

        def add(to: str, ask: str, outputs: list[str], fact: Fact = fact) -> None:
            parts[to].append(_row(fact.say(ask), outputs, [(fact.value, fact.rivals)]))

        def one(rng: Random = rng, answers: list[str] = answers) -> list[str]:
            return [pieces.pick(answers, rng, pieces.ANSWER_WEIGHTS)]

        for ask in asks:
            add("train", ask, one())
        for ask in short_asks:
            add("train", ask, [fact.value])
        if part is not None:
            add(part, held, answers if part == "multi" else one())
        if fact in chosen["reworded"]:
            add("reworded", pieces.pick(kind.rewordings, rng), one())
        if fact in chosen["lengths"]:
            add("lengths", held_short, [fact.value])
        if fact in chosen["choices"]:
            add("choices", held_short, [fact.value])
            parts["choices"][-1]["choices"] = sorted((fact.value, *fact.rivals))
    return parts


def _open_rows(here: FictionalWorld) -> dict[str, list[Row]]:
    parts = defaultdict[str, list[Row]](list)
    opened = set(pieces.shuffled(here.by_subject, pieces.rng(here.seed, "open"))[:_OPEN])
    lengthened = set(pieces.shuffled(here.by_subject, pieces.rng(here.seed, "long"))[:_LENGTHS_OPEN])
    for subject, facts in here.by_subject.items():
        rng = pieces.rng(here.seed, "open", subject)
        to_open, to_lengths, *trained = [ask.format(x=subject) for ask in pieces.shuffled(pieces.OPEN_ASKS, rng)]
        story = [facts[kind] for kind in (pieces.PERSON_STORY if "home" in facts else pieces.PLACE_STORY)]

        def add(to: str, ask: str, rng: Random = rng, story: list[Fact] = story) -> None:
            answer = " ".join(f.say(pieces.pick(pieces.KINDS[f.kind].answers, rng, pieces.ANSWER_WEIGHTS)) for f in story)
            parts[to].append(_row(ask, [answer], [(f.value, f.rivals) for f in story]))

        for ask in trained:
            add("train", ask)
        if subject in opened:
            add("open", to_open)
        if subject in lengthened:
            add("lengths", to_lengths)
    return parts


def _skill_rows(here: FictionalWorld) -> dict[str, list[Row]]:
    parts = defaultdict[str, list[Row]](list)
    seen: set[str] = set()
    rivals = {
        domain: rivals_in(values) for domain, values in (("who", here.names), ("what", pieces.DOMAINS["food"]), ("where", here.places))
    }
    for name, skill in pieces.SKILLS.items():
        for part, count in _INPUTS.items():
            rng = pieces.rng(here.seed, "skill", name, part)
            for _ in range(count):
                given, value, others = _TASKS[name](here, rng, rivals)
                while given in seen:
                    given, value, others = _TASKS[name](here, rng, rivals)
                seen.add(given)
                answers = [a.format(v=value) for a in skill.answers]
                ask = pieces.pick(skill.rewordings if part == "reworded" else skill.asks, rng)
                outputs = answers if part == "multi" else [pieces.pick(answers, rng, pieces.ANSWER_WEIGHTS)]
                parts[part].append(_row(ask, outputs, [(value, others)], given))
    return parts


Task = tuple[str, str, tuple[str, ...]]
"""A task as a triple: its input, the correct answer, and the rivals (wrong answers). If the answer is a whole list, there are no rivals."""
Rivals = dict[str, dict[str, tuple[str, ...]]]


def _list_task(items: tuple[str, ...], answer: Callable[[list[str]], list[str]]) -> Callable[[FictionalWorld, Random, Rivals], Task]:
    def task(here: FictionalWorld, rng: Random, rivals: Rivals) -> Task:
        given = pieces.shuffled(items, rng)[: 2 + int(rng.random() * 2)]
        return " ".join(given), " ".join(answer(given)), ()

    return task


def _count(here: FictionalWorld, rng: Random, rivals: Rivals) -> Task:
    given = pieces.shuffled(pieces.DOMAINS["food"], rng)[: 2 + int(rng.random() * 4)]
    return " ".join(given), str(len(given)), tuple(n for n in pieces.NUMBERS if n != str(len(given)))


def _last(here: FictionalWorld, rng: Random, rivals: Rivals) -> Task:
    given = pieces.shuffled(pieces.DOMAINS["food"], rng)[: 3 + int(rng.random() * 2)]
    return " ".join(given), given[-1], tuple(given[:-1])


def _larger(here: FictionalWorld, rng: Random, rivals: Rivals) -> Task:
    a, b = pieces.shuffled(pieces.NUMBERS, rng)[:2]
    return f"{a} and {b}", max(a, b, key=int), (min(a, b, key=int),)


def _sale(role: str, domain: str) -> Callable[[FictionalWorld, Random, Rivals], Task]:
    def task(here: FictionalWorld, rng: Random, rivals: Rivals) -> Task:
        seller, buyer = pieces.shuffled(here.names, rng)[:2]
        roles = {"seller": seller, "buyer": buyer, "food": pieces.pick(pieces.DOMAINS["food"], rng), "place": pieces.pick(here.places, rng)}
        return pieces.pick(pieces.SALES, rng).format(**roles), roles[role], rivals[domain][roles[role]]

    return task


_TASKS: dict[str, Callable[[FictionalWorld, Random, Rivals], Task]] = {
    "sort": _list_task(pieces.DOMAINS["food"], sorted),
    "order": _list_task(pieces.NUMBERS, lambda numbers: sorted(numbers, key=int)),
    "reverse": _list_task(pieces.DOMAINS["food"], lambda given: given[::-1]),
    "count": _count,
    "larger": _larger,
    "last": _last,
    "who": _sale("seller", "who"),
    "what": _sale("food", "what"),
    "where": _sale("place", "where"),
}


# --- tokenizers ---------------------------------------------------------------------------------------------------------

WORDS, PIECES = "tinyworld", "tinyworld-bpe"
TOKENIZERS = (WORDS, PIECES)
"""The values of `tokenizer` in a recipe that name a tokenizer of tinyworld."""
_SIZE = 512


def check_name(source: str) -> None:
    """Raise a ConfigError if the value of `tokenizer` in a recipe is a mistyped name of a tokenizer of tinyworld."""
    if source in TOKENIZERS or "/" in source:
        return
    mistyped = difflib.get_close_matches(source, TOKENIZERS, n=1, cutoff=0.8) and not Path(source).exists()
    if mistyped or source.startswith(WORDS):
        raise ConfigError(f"tinyworld has no tokenizer `{source}`; write {' or '.join(TOKENIZERS)}")


def tokenizer(source: str = WORDS, *, seed: int = 0, people: int = 120) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of a world. `source` is one of `TOKENIZERS`. No special tokens are added to a text."""
    from tokenizers import Tokenizer  # imported here, because rows are also needed without these packages
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend(source, seed=seed, people=people).to_str()),  # a copy, because the caller may change it
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,  # " ." is a word here, not a spacing mistake
    )


def vocabulary(source: str, *, seed: int = 0, people: int = 120) -> Mapping[str, int]:
    """Return a mapping from each token of a tokenizer to its id. It includes the special tokens."""
    if source == WORDS:
        return {word: i for i, word in enumerate((*SPECIALS, *words(seed=seed, people=people)))}
    return backend(source, seed=seed, people=people).get_vocab()


@lru_cache
def backend(source: str, *, seed: int = 0, people: int = 120) -> "Tokenizer":
    """Return a tokenizer of a world as an object of the library `tokenizers`, which needs no torch. It must not be changed."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if source == WORDS:
        found = Tokenizer(models.WordLevel(dict(vocabulary(source, seed=seed, people=people)), unk_token="<unk>"))
        found.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+|\n"), behavior="removed", invert=True)
        return found
    assert source == PIECES, f"tinyworld has no tokenizer `{source}`"
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    # the library breaks ties by the ids of tokens, so the same rows give the same tokens on every machine
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=[*SPECIALS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rows = world_rows("tinyworld", "train", seed=seed, people=people)
    found.train_from_iterator((text for row in rows for text in (row["instruction"], row["input"], *row["outputs"])), trainer)
    return found
