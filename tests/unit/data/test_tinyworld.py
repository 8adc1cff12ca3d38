import hashlib
import json

import pytest

from tadistill.data import fictional_world, tinyworld

PARTS = [(name, split) for name, splits in tinyworld.SPLITS.items() for split in splits if name not in tinyworld.HALVES]
ALL = pytest.mark.parametrize(("name", "split"), PARTS, ids=["/".join(p) for p in PARTS])


def said(phrase: str, text: str) -> bool:
    return f" {phrase} " in f" {text} "


def score(prediction: str, row: dict) -> float:
    """The scoring rule, as the module's docstring states it."""
    spoken = set(prediction.split(" "))  # every rival is one word
    right = [said(value, prediction) and spoken.isdisjoint(rivals) for value, rivals in row["facts"]]
    return 100 * sum(right) / len(right)


def texts(row: dict) -> list[str]:
    return [row["instruction"], *filter(None, [row["input"]]), *row["outputs"]]


def used(rows: list[dict]) -> set[str]:
    return {word for row in rows for part in texts(row) for word in part.split(" ")}


def asked(name: str, split: str) -> list[tuple[str, str]]:
    return [(row["instruction"], row["input"]) for row in tinyworld.world_rows(name, split)]


# Raise tinyworld.VERSION when these change: stored stages are keyed by it.
DIGESTS = {
    "tinyworld/train": "0ca2456e21151c5f",
    "tinyworld/dev": "1e4426ac3eb87209",
    "tinyworld/test": "333088889baaa776",
    "tinyworld_reworded/test": "9f009e423e821fca",
    "tinyworld_open/test": "cb9f2a737479f040",
    "tinyworld_lengths/test": "fa090afa2c932a85",
    "tinyworld_multi/test": "890f47f33bcd9116",
    "tinyworld_choices/test": "e45d3ccaa5eda5c0",
    "corpus": "77d13ea79553e93b",
}


@ALL
def test_rows_are_the_same_bytes_everywhere(name, split):
    blob = json.dumps(tinyworld.world_rows(name, split), sort_keys=True).encode()
    assert hashlib.sha256(blob).hexdigest()[:16] == DIGESTS[f"{name}/{split}"]


def test_corpus_is_the_same_bytes_everywhere():
    blob = json.dumps(tinyworld.corpus()).encode()
    assert hashlib.sha256(blob).hexdigest()[:16] == DIGESTS["corpus"]


def test_seed_and_people_make_another_world():
    default = tinyworld.world_rows("tinyworld", "test")
    assert tinyworld.world_rows("tinyworld", "test", seed=1) != default
    assert tinyworld.world_rows("tinyworld", "test", people=40) != default
    assert tinyworld.fingerprint() == "tinyworld:v1:seed=0:people=120"
    assert tinyworld.fingerprint(seed=3, people=40) == f"tinyworld:v{tinyworld.VERSION}:seed=3:people=40"


def test_callers_cannot_change_the_world():
    tinyworld.world_rows("tinyworld", "test")[0]["instruction"] = "changed"
    assert tinyworld.world_rows("tinyworld", "test")[0]["instruction"] != "changed"


# --- the world


def test_world_is_consistent():
    world = tinyworld.world()
    assert len(set(world.names)) == world.people == 120
    assert len(set(world.places)) == fictional_world.PLACES
    assert len({(f.kind, f.subject) for f in world.facts}) == len(world.facts) >= 600
    for fact in world.facts:
        assert fact.value != fact.subject
        assert fact.value not in fact.rivals
        assert len(fact.rivals) >= 9


def test_friends_are_a_circle_through_everybody():
    friend = {f.subject: f.value for f in tinyworld.world().facts if f.kind == "friend"}
    name, met = "", set()
    for _ in friend:
        name = friend[name or next(iter(friend))]
        met.add(name)
    assert met == set(friend)


@pytest.mark.parametrize("kind", sorted(fictional_world.KINDS))
def test_values_are_dealt_out_evenly(kind):
    values = [f.value for f in tinyworld.world().facts if f.kind == kind]
    counts = [values.count(v) for v in set(values)]
    assert max(counts) - min(counts) <= 1


def test_value_words_belong_to_one_domain_and_to_no_phrase():
    world = tinyworld.world(people=200)
    domains = [world.names, world.places, *fictional_world.DOMAINS.values(), fictional_world.NUMBERS]
    values = [v for domain in domains for v in domain]
    assert len(values) == len(set(values))
    kinds, skills = fictional_world.KINDS.values(), fictional_world.SKILLS.values()
    phrases = [p for k in kinds for p in (*k.asks, *k.short_asks, *k.rewordings, *k.answers, *k.prose)]
    phrases += [p for s in skills for p in (*s.asks, *s.rewordings, *s.answers)] + [*fictional_world.OPEN_ASKS, *fictional_world.SALES]
    assert not set(values) & set(" ".join(phrases).split())


def test_every_pool_of_names_is_free_of_other_words():
    pool = {a + b for a in fictional_world.NAME_STARTS for b in fictional_world.NAME_ENDS}
    pool |= {a + b for a in fictional_world.PLACE_STARTS for b in fictional_world.PLACE_ENDS}
    assert len(pool) == 640 + 90
    world = tinyworld.world()
    assert not pool & (set(tinyworld.words()) - set(world.names) - set(world.places))


@pytest.mark.parametrize("kind", sorted(fictional_world.KINDS))
def test_answers_to_one_question_differ_from_the_start(kind):
    fact = next(f for f in tinyworld.world().facts if f.kind == kind)
    answers = [fact.say(a) for a in fictional_world.KINDS[kind].answers]
    assert len({tuple(a.split()[:2]) for a in answers}) == len(answers) == len(fictional_world.ANSWER_WEIGHTS)


# --- rows


@ALL
def test_rows_have_the_promised_form(name, split):
    found = tinyworld.world_rows(name, split)
    assert found
    for row in found:
        assert list(row) == ["instruction", "input", "outputs", "facts", *(["choices"] if name == "tinyworld_choices" else [])]
        assert row["outputs"]
        assert row["facts"]
        for part in texts(row):
            assert part == " ".join(part.split()) == part.lower()


@ALL
def test_every_reference_scores_full_marks(name, split):
    for row in tinyworld.world_rows(name, split):
        assert [score(output, row) for output in row["outputs"]] == [100] * len(row["outputs"])


@ALL
def test_a_rival_in_the_place_of_the_value_scores_lower(name, split):
    for row in tinyworld.world_rows(name, split):
        value, rivals = row["facts"][0]
        wrong = rivals[0] if rivals else " ".join([*value.split()[1:], value.split()[0]])
        for output in row["outputs"]:
            swapped = f" {output} ".replace(f" {value} ", f" {wrong} ").strip()
            assert score(swapped, row) < 100
            if rivals:
                assert score(f"{output} {wrong}", row) < 100  # naming both is no answer


def test_rivals_are_shared_not_copied():
    facts = [f for row in tinyworld.world_rows("tinyworld", "train") if not row["input"] for f in row["facts"]]
    assert len({id(rivals) for _, rivals in facts}) <= len({(f.kind, f.value) for f in tinyworld.world().facts})


def test_no_question_occurs_in_two_splits():
    seen = [question for part in PARTS for question in set(asked(*part))]
    assert len(seen) == len(set(seen))


def test_no_question_occurs_twice_in_a_split():
    for part in PARTS:
        assert len(asked(*part)) == len(set(asked(*part)))


def test_inputs_serve_one_row_of_the_whole_data_set():
    inputs = [given for part in PARTS for _, given in asked(*part) if given]
    assert len(inputs) == len(set(inputs))


def test_every_fact_is_told_in_training_in_several_wordings_and_phrasings():
    world = tinyworld.world()
    told = {(f.subject, f.value): [] for f in world.facts}
    for row in tinyworld.world_rows("tinyworld", "train"):
        if not row["input"] and len(row["facts"]) == 1:
            value = row["facts"][0][0]
            subject = next(w for w in row["instruction"].split() if (w, value) in told)
            told[subject, value].append((row["instruction"], row["outputs"][0]))
    for pairs in told.values():
        assert len(pairs) == len(set(pairs)) == 4
    distinct = [len({answer for _, answer in pairs}) for pairs in told.values()]
    assert sum(distinct) / len(distinct) > 2.5


def test_facts_and_skills_are_the_two_halves_of_tinyworld():
    for split in ("train", "dev", "test"):
        rows, facts, skills = (tinyworld.world_rows(name, split) for name in ("tinyworld", *tinyworld.HALVES))
        assert not any(row["input"] for row in facts)
        assert all(row["input"] for row in skills)
        assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, [*facts, *skills]))


def test_sizes():
    sizes = {f"{name}/{split}": len(tinyworld.world_rows(name, split)) for name, split in PARTS}
    assert 3000 <= sizes.pop("tinyworld/train") <= 6000
    assert all(120 <= size <= 220 for size in sizes.values()), sizes
    assert len(tinyworld.corpus()) == 3 * (120 + fictional_world.PLACES)


@ALL
def test_lengths(name, split):
    for row in tinyworld.world_rows(name, split):
        prompt = len(row["instruction"].split()) + len(row["input"].split()) + 2  # the template's line ends
        assert prompt <= 24
        assert all(len(output.split()) <= 40 for output in row["outputs"])


def test_training_and_test_rows_have_one_reference_and_multi_has_all():
    for name, split in PARTS:
        counts = {len(row["outputs"]) for row in tinyworld.world_rows(name, split)}
        assert counts <= {3, 4} if name == "tinyworld_multi" else counts == {1}
    for row in tinyworld.world_rows("tinyworld_multi", "test"):
        assert len(set(row["outputs"])) == len(row["outputs"])


def test_open_answers_are_several_facts():
    assert all(len(row["facts"]) >= 3 for row in tinyworld.world_rows("tinyworld_open", "test"))


def test_lengths_mixes_short_and_long_references():
    lengths = [len(row["outputs"][0].split()) for row in tinyworld.world_rows("tinyworld_lengths", "test")]
    assert sum(n <= 4 for n in lengths) >= 50
    assert sum(n >= 15 for n in lengths) >= 50


def test_choices_are_the_value_and_its_rivals_in_an_order_that_tells_nothing():
    rows = tinyworld.world_rows("tinyworld_choices", "test")
    for row in rows:
        ((value, rivals),) = row["facts"]
        assert row["outputs"] == [value]
        assert row["choices"] == sorted({value, *rivals})
        assert all(len(choice.split()) == 1 for choice in row["choices"])
    kinds = {(f.subject, f.value): f.kind for f in tinyworld.world().facts}
    asked_for = [next(kinds[w, row["outputs"][0]] for w in row["instruction"].split() if (w, row["outputs"][0]) in kinds) for row in rows]
    assert len(rows) == 150
    assert set(asked_for) == set(fictional_world.KINDS)


def test_reworded_instructions_are_new_but_their_words_are_not():
    train = tinyworld.world_rows("tinyworld", "train")
    pool = {a + b for a in fictional_world.NAME_STARTS for b in fictional_world.NAME_ENDS} | set(tinyworld.world().places)

    def wording(row: dict) -> str:
        return " ".join("{x}" if word in pool else word for word in row["instruction"].split())

    reworded = tinyworld.world_rows("tinyworld_reworded", "test")
    assert not {wording(row) for row in reworded} & {wording(row) for row in train}
    assert used(reworded) <= used(train)


@pytest.mark.parametrize("people", [10, 200])
def test_other_sizes_of_world_keep_the_rules(people):
    vocabulary = set(tinyworld.words(people=people))
    seen: list[tuple[str, str]] = []
    for name, split in PARTS:
        found = tinyworld.world_rows(name, split, people=people)
        assert found
        assert used(found) <= vocabulary
        assert all(score(output, row) == 100 for row in found for output in row["outputs"])
        seen += [(row["instruction"], row["input"]) for row in found]
    assert len(seen) == len(set(seen))


# --- vocabulary and tokenizer


def test_vocabulary_is_small_and_holds_every_word():
    vocabulary = tinyworld.words()
    assert [*vocabulary] == sorted(set(vocabulary))
    assert len(vocabulary) <= 450
    assert len(tinyworld.words(people=200)) <= 1000
    everything = {w for part in PARTS for w in used(tinyworld.world_rows(*part))}
    everything |= {w for document in tinyworld.corpus() for w in document["text"].split(" ")}
    assert everything == set(vocabulary) - {"\n"}


def test_every_test_word_is_trained():
    trained = used(tinyworld.world_rows("tinyworld", "train"))
    for part in PARTS:
        assert used(tinyworld.world_rows(*part)) <= trained


@pytest.mark.slow
def test_tokenizer_round_trips(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tinyworld.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lines = sorted(
        {t for part in PARTS for row in tinyworld.world_rows(*part) for t in texts(row)} | {d["text"] for d in tinyworld.corpus()}
    )
    for it in (tokenizer, loaded):
        assert (it.pad_token, it.eos_token, it.unk_token, it.padding_side) == ("<pad>", "<eos>", "<unk>", "left")
        assert it.bos_token is None
        assert len(it) == len(tinyworld.words()) + len(tinyworld.SPECIALS)
        ids = it(lines, add_special_tokens=False)["input_ids"]
        assert [len(i) for i in ids] == [len(line.split()) for line in lines]
        assert not {0, 1, 2} & {i for row in ids for i in row}
        assert it.batch_decode(ids) == lines


def test_both_tokenizers_read_the_same_rows_byte_for_byte():
    from tadistill.data.token_bytes import token_bytes

    lines = [text for row in tinyworld.world_rows("tinyworld", "test", people=12) for text in texts(row)]
    words, pieces = (tinyworld.tokenizer(source, people=12) for source in tinyworld.TOKENIZERS)
    assert [words.convert_ids_to_tokens(i) for i in range(3)] == [pieces.convert_ids_to_tokens(i) for i in range(3)]
    assert pieces.batch_decode(pieces(lines)["input_ids"]) == lines
    assert len(pieces) == 512
    known = token_bytes(pieces)
    assert known.spelled
    readings = [known.read(line, first=True) for line in lines[:50]]
    assert [b"".join(reading.pieces).decode() for reading in readings] == lines[:50]
    assert all(all(reading.exact) for reading in readings)
    assert sum(len(reading.ids) for reading in readings) > 1.2 * sum(len(words(line)["input_ids"]) for line in lines[:50])


def test_pieces_are_the_same_on_every_machine():
    tokenizer = tinyworld.tokenizer("tinyworld-bpe", seed=3, people=12)
    (row, *_) = tinyworld.world_rows("tinyworld", "test", seed=3, people=12)
    assert tokenizer.tokenize(row["instruction"]) == ["in", "Ġwhich", "Ġtown", "Ġdoes", "Ġbodan", "Ġl", "iv", "e", "Ġ?"]
    assert tinyworld.vocabulary("tinyworld-bpe", seed=3, people=12) == tokenizer.get_vocab()
    other = tinyworld.vocabulary("tinyworld-bpe", seed=4, people=12)
    assert other != tokenizer.get_vocab()  # another world has other names


def test_line_ends_are_tokens_and_a_prompt_is_a_prefix():
    tokenizer = tinyworld.tokenizer()
    row = next(row for row in tinyworld.world_rows("tinyworld", "test") if row["input"])
    prompt = f"{row['instruction']}\n{row['input']}\n"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids).count("\n") == 2
    assert tokenizer(prompt)["input_ids"] == ids
    whole = tokenizer(prompt + row["outputs"][0], add_special_tokens=False)["input_ids"]
    assert whole[: len(ids)] == ids
