"""A large training set is read once and tokenised once. What is kept on the disk equals what a direct reading gives."""

import ast
import importlib
import json
import multiprocessing
from contextlib import suppress
from pathlib import Path

import pytest
from tests.unit.models.conftest import word_tokenizer

from tadistill.config import Data, DataRef
from tadistill.data import datasets, encoding, survey, token_cache
from tadistill.data.batch import references
from tadistill.data.datasets import SplitRows
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.token_cache import glance, keep, tokenizer_digest
from tadistill.errors import DataError

RULES = Rules(6, 10, template="plain")
ROWS = 250  # more than two parts of 100


@pytest.fixture(autouse=True)
def small_is_large(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "LARGE", 100)
    monkeypatch.setattr(survey, "SAMPLE", 51)
    monkeypatch.setattr(encoding, "PART", 100)
    survey._known.clear()


@pytest.fixture
def ref(tmp_path) -> DataRef:
    return DataRef(load=write(tmp_path / "train.jsonl"))


def write(path, rows: int = ROWS, **more) -> str:
    lines = [{"instruction": " ".join(["w1", f"w{i % 7}"] * (i % 5)), "output": f"w{i % 9} " * (i % 6 + 1)} | more for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def rows_of(ref: DataRef, limit: int | None = None) -> SplitRows:
    return SplitRows(ref, "train", limit=limit)


def kept(ref: DataRef, tokenizer=None, rules: Rules = RULES, limit: int | None = None, **more):
    return keep(rows_of(ref, limit), tokenizer or word_tokenizer(), rules, name="d", **more)


def direct(ref: DataRef, rules: Rules = RULES, limit: int | None = None):
    return encode(rows_of(ref, limit).read(), word_tokenizer(), rules, name="d")


def files(tmp_path, folder: str = "encoded", ending: str = "arrow") -> list:
    return sorted((tmp_path / "cache" / folder).glob(f"*.{ending}"))


@pytest.mark.parametrize("long_prompts", ["drop", "cut"])
@pytest.mark.parametrize("limit", [None, 123])
def test_kept_rows_equal_those_of_a_direct_reading(ref, long_prompts, limit):
    rules = Rules(6, 10, long_prompts, template="plain")
    found, (rows, counts) = kept(ref, rules=rules, limit=limit), direct(ref, rules, limit)
    assert list(found.rows) == rows
    assert found.counts == counts
    assert [found.rows[5], found.rows[-1], *found.rows[7:11]] == [rows[5], rows[-1], *rows[7:11]]
    assert found.longest.whole == max(len(e.prompt) + len(e.response) for e in rows)
    assert (found.longest.prompt, found.longest.top) == (max(len(e.prompt) for e in rows), max(max(e.prompt + e.response) for e in rows))
    assert [references(found.rows)[i] for i in (0, 3)] == [references(rows)[i] for i in (0, 3)]
    assert references(found.rows)[2:5] == references(rows)[2:5]


def test_the_key_depends_on_all_code_that_reads_rows_and_writes_prompts_and_answers(tmp_path, ref, monkeypatch):
    hashed, needed, found = set[str](), ["tadistill.data.encoding", "tadistill.data.datasets"], set[str]()
    monkeypatch.setattr(survey, "sha256", lambda file: hashed.add(file.stem) or "digest")
    kept(ref)
    while needed:
        name = needed.pop()
        with suppress(ModuleNotFoundError):  # it is a function
            source = Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8")
            found.add(name)
            froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
            names = {n for f in froms for n in (f.module, *(f"{f.module}.{each.name}" for each in f.names))}
            needed += [n for n in names - found if n.startswith("tadistill.data.")]
    assert hashed == {name.rsplit(".", 1)[-1] for name in found} - {"hub"}  # rows of the Hub are not kept


def test_choices_are_kept(tmp_path):
    ref = DataRef(load=write(tmp_path / "c.jsonl", 300, choices=["w1 w2", "w3"], output="w3"), columns={"choices": "choices"})
    rows, _ = direct(ref)
    assert rows[0].choices
    assert list(kept(ref).rows) == rows


def test_a_set_is_tokenised_once(ref, monkeypatch):
    first = kept(ref)
    monkeypatch.setattr(token_cache, "encode_parts", None)  # no second call
    assert list(kept(ref).rows) == list(first.rows)
    found = glance(rows_of(ref), word_tokenizer(), RULES, name="d")
    assert found is not None
    assert found.counts == first.counts


def test_other_tokens_rules_and_rows_have_their_own_files(tmp_path, ref):
    other = word_tokenizer()
    other.add_tokens(["w1 w2"])
    copy = DataRef(load=write(tmp_path / "copy.jsonl"))
    kept(ref)
    kept(copy)
    assert len(files(tmp_path)) == 1  # by content, not by name
    kept(ref, other)
    kept(ref, rules=Rules(5, 10, template="plain"))
    kept(ref, limit=100)
    write(tmp_path / "train.jsonl", ROWS - 1)
    kept(ref)
    assert len(files(tmp_path)) == 5


def test_digest_of_a_tokenizer_ignores_padding_of_its_last_call():
    used = word_tokenizer()
    used(["w1", "w1 w2"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(used) == tokenizer_digest(word_tokenizer())
    used.chat_template = "{{ messages }}"
    assert tokenizer_digest(used) != tokenizer_digest(word_tokenizer())


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:5000] + b"\x07" + b[5001:]])
@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_a_damaged_file_is_made_again(tmp_path, ref, damage, ending):
    good = list(kept(ref).rows)
    (file,) = files(tmp_path, ending=ending)
    file.write_bytes(damage(file.read_bytes()))
    assert list(kept(ref).rows) == good
    assert not list((tmp_path / "cache" / "encoded").glob("*.tmp"))


def test_an_interrupted_writer_leaves_nothing_that_is_read(tmp_path, ref):
    def stop(done: int) -> None:
        if done > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(ref, tick=stop)
    assert files(tmp_path) == []
    assert list(kept(ref).rows) == direct(ref)[0]


def _writer(ref: DataRef, barrier, results) -> None:
    barrier.wait(60)
    parts = []
    kept(ref, tick=parts.append)
    results.put((len(parts), kept(ref).rows[11]))


def test_of_two_processes_one_tokenises(ref):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=_writer, args=(ref, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join(60)
    assert sorted(parts for parts, _ in found) == [0, 3]
    assert found[0][1] == found[1][1] == direct(ref)[0][11]


def test_no_row_is_short_enough(ref):
    with pytest.raises(DataError, match="no row of d has a prompt of at most 0 tokens"):
        kept(ref, rules=Rules(0, 10, template="plain"))
    with pytest.raises(DataError, match="no row of d"):
        glance(rows_of(ref), word_tokenizer(), Rules(0, 10, template="plain"), name="d")


# --- the survey ---------------------------------------------------------------------------------------------------------


def test_a_survey_counts_rows_and_takes_even_places(ref, monkeypatch):
    data = Data(train=ref, dev=ref, test=(ref,), limit={"train": 200})
    found, rows = survey.survey(ref, "train", data), datasets.load(ref, "train", data)
    assert (found.rows, found.instructions, found.conversations, found.choices) == (200, True, False, False)
    for changes, plain in (({}, True), ({"template": "chat"}, False), ({"long_prompts": "refuse"}, False)):
        assert found.plain(data.model_copy(update=changes)) is plain
    assert list(found.sample) == [rows[i * 200 // 51] for i in range(51)]
    survey._known.clear()
    monkeypatch.setattr(datasets, "json_rows", None)  # the file is not parsed again
    assert survey.survey(ref, "train", data) == found


def test_a_damaged_survey_is_made_again(tmp_path, ref):
    data = Data(train=ref, dev=ref, test=(ref,))
    found = survey.survey(ref, "train", data)
    (file,) = files(tmp_path, "rows", "json")
    for text in ("", "{}", "[1]", file.read_text(encoding="utf-8")[:999]):
        file.write_text(text, encoding="utf-8")
        survey._known.clear()
        assert survey.survey(ref, "train", data) == found


def test_a_survey_of_rows_with_everything(tmp_path):
    """A right answer can be an object that JSON lacks. Messages, facts and tools are restored as they were."""
    more = {"n": 5, "letter": "w3", "choices": ["w3", "w1"], "facts": [["w3", ["w1", "w2"]]], "tools": [{"name": "f"}]}
    more["messages"] = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}]
    columns = {"numeric": "n", "choice": "letter"} | {name: name for name in ("choices", "facts", "tools", "messages")}
    ref = DataRef(load=write(tmp_path / "n.jsonl", **more), columns=columns)
    data = Data(train=ref, dev=ref, test=(ref,))
    found = survey.survey(ref, "test", data)
    assert found.choices
    assert found.sample[0].facts == (("w3", ("w1", "w2")),)
    survey._known.clear()
    assert len(files(tmp_path, "rows", "json")) == 1
    assert survey.survey(ref, "test", data) == found


def test_a_survey_names_the_wrong_row(tmp_path):
    path = tmp_path / "bad.jsonl"
    write(path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "w1"}\n')
    ref = DataRef(load=str(path))
    with pytest.raises(DataError, match=rf"line {ROWS + 1} has no column `output`"):
        survey.survey(ref, "train", Data(train=ref, dev=ref, test=(ref,)))


def test_rows_are_counted_as_they_are_read(tmp_path):
    path = tmp_path / "odd.jsonl"
    row = b'{"instruction": "w1", "output": "w2"}'
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\r".join([row, b"  ", b"", row, "\u2028\u3000".encode(), row]) + b"\r" + row)
    ref = DataRef(load=str(path))
    assert rows_of(ref).count() == len(rows_of(ref).read()) == 4
    assert rows_of(ref, 2).count() == 2


def test_few_rows_are_held_at_a_time(ref, monkeypatch):
    held, most = 0, 0

    class Counted(datasets.Example):
        def __new__(cls, *args, **kwargs):
            nonlocal held, most
            held += 1
            most = max(most, held)
            return object.__new__(cls)

        def __del__(self):
            nonlocal held
            held -= 1

    made = datasets.example
    monkeypatch.setattr(datasets, "example", lambda *args: Counted(**vars(made(*args))))
    kept(ref)
    assert 0 < most <= 2 * encoding.PART
