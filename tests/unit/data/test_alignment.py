"""Two tokenisations of one text, byte for byte: random Unicode, sampled tokens, special tokens, normalisers, and real rows."""

import random
import runpy
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.byte_models import SHAPE, byte_model, byte_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tadistill.data.alignment import NO_SPAN, Alignment, align, cells, read_again, shared_tokens
from tadistill.data.batch import Sequence
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.other_tokenizer import CHANGED, SPELLED, STRIPPED, Rereader, marks
from tadistill.data.rows import Example
from tadistill.data.token_bytes import END, Reading, TokenBytes, token_bytes, valid_runs
from tadistill.errors import DataError
from tadistill.objectives import Head, Hidden, forward_kl, fused_span_divergence
from tadistill.objectives.next_symbol import SpelledPair
from tadistill.objectives.spelling import SpelledText

WORDS = "the theatre then there is his history café naïve 東京 東 😀👍 don't it's 2024 20 a ab abc\n\n\n    def f(x):\n\treturn x"
LETTERS = [
    *("a", "b", "t", "h", "e", "the", " the", " ", "  ", "\n", "\t", "0", "2024", "'s", "é", "e\u0301", "\u0323", "ﬁ", "東", "京", "😀"),
    *("👩\u200d👧", "ß", "\u00a0", "\u2028", "\x00", "\ufffd", "▁", "Ġ", "</s>", "<|im_end|>", "<0x41>"),
]


def bpe(merges: int, *specials: str, normalizer=None, seed: int = 0, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that has learnt some merges from the words in a random order."""
    words = WORDS.split(" ") * 3
    random.Random(seed).shuffle(words)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = list(bytes_to_unicode().values())
    core.train_from_iterator(
        [" ".join(words)], trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    )
    core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, additional_special_tokens=list(specials))


def sentencepiece(*, llama: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer with byte fallback, in the form of Llama 2 (a space before the text) or of Gemma (none)."""
    pieces = ["▁", "▁the", "the", "▁a", "t", "h", "e", "a", "A", "b", "ab", "abc", "é", "東", "0", "20", "▁▁", "re", "n"]
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    core = Tokenizer(models.Unigram([*scores, *((piece, -8.0 + len(piece)) for piece in pieces)], unk_id=0, byte_fallback=True))
    first = [normalizers.Prepend("▁")] if llama else []
    core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if llama else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def words_only() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "the", "theatre", "is", "a", "ab", "\n"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+|\n"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@cache
def vocabulary(name: str) -> TokenBytes:
    made = {
        "small": lambda: bpe(20, "<|im_end|>"),
        "large": lambda: bpe(60, "<|user|>", seed=1, eos="<|end|>"),
        "nfc": lambda: bpe(60, "<|im_end|>", normalizer=normalizers.NFC()),
        "llama": lambda: sentencepiece(llama=True),
        "gemma": lambda: sentencepiece(llama=False),
        "words": words_only,
    }
    return token_bytes(made[name]())


BYTES = ("small", "large", "llama", "gemma")
ALL = (*BYTES, "nfc", "words")
UNIGRAM = ("llama", "gemma")  # the characters `▁`, `</s>` and `<0x41>` become tokens that stand for something else, which `exact` says


@pytest.mark.parametrize(("prompt", "answer"), [("the ", "abc re"), ("the\n", "the"), ("the", " a"), ("a", "\n the")])
def test_an_answer_behind_a_prompt_has_no_space_of_its_own(prompt, answer):
    """Llama 2's tokenizer puts a space before a text, also if the answer is encoded alone because it changes the prompt's last token."""
    example = Example(prompt, "", (answer,), verbatim=True)
    for name in ("llama", "gemma"):
        tokenizer = vocabulary(name)
        (row,), _ = encode([example], tokenizer.tokenizer, Rules(50, 100))
        pieces = tokenizer.spell(row.response[:-1]).pieces
        assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == answer.encode()


@cache
def random_texts(count: int) -> list[str]:
    draw, characters = random.Random(5), [*range(0xD800), *range(0xE000, 0x2FFFF)]
    texts = ["".join(draw.choices(LETTERS, k=draw.randint(1, 12))) for _ in range(count // 2)]
    return texts + ["".join(map(chr, draw.choices(characters, k=5))) for _ in range(count // 2)]


@cache
def read(name: str, text: str) -> Reading:
    return vocabulary(name).read(text)


def joined(reading: Reading) -> bytes:
    return b"".join(piece if isinstance(piece, bytes) else f"[{piece}]".encode() for piece in reading.pieces)


def single(spans: Alignment) -> tuple[bool, ...]:
    """True for each span that is one token in both tokenisations."""
    return tuple(spans.student.count(k) == spans.teacher.count(k) == 1 for k in range(len(spans.ends)))


def check(student: Reading, teacher: Reading, whole: bool = True) -> Alignment:
    """Every rule of an alignment, from the definition."""
    spans = align(student, teacher)
    widths = [[len(piece) if isinstance(piece, bytes) else 1 for piece in reading.pieces] for reading in (student, teacher)]
    mine, theirs = ({*accumulate(w)} for w in widths)
    assert list(spans.ends) == sorted((mine & theirs) - {0})  # each is a boundary in both, and none is left out
    texts = []
    for reading, found in ((student, spans.student), (teacher, spans.teacher)):
        assert len(found) == len(reading.ids)
        kept = [k for k in found if k != NO_SPAN]
        assert kept == sorted(kept)
        assert {*kept} == {*range(len(spans.ends))}
        assert not whole or len(kept) == len(found)
        texts.append(
            [[piece for piece, k in zip(reading.pieces, found, strict=True) if k == span and piece] for span in range(len(spans.ends))]
        )
    for a, b in zip(*texts, strict=True):  # one text on both sides, byte for byte
        assert a == b if isinstance(a[0], str) else b"".join(a) == b"".join(b)
    return spans


@pytest.mark.parametrize("name", ALL)
def test_pieces_are_the_text_byte_for_byte(name):
    own = vocabulary(name)
    for text in random_texts(120):
        reading = read(name, text)
        if reading.ids:
            assert joined(reading) == text.encode(), (text, reading)
        else:
            assert name == "words"
            assert not text.strip()
        if name in BYTES and not (name in UNIGRAM and any(mark in text for mark in ("</s>", "<0x", "▁"))):
            assert all(reading.exact)
            assert reading.dropped == reading.lone == 0
            again = own.spell(reading.ids)
            assert joined(again) == text.encode()
            decoded = own.tokenizer.decode([*reading.ids], clean_up_tokenization_spaces=False)
            assert str(decoded).strip(" ") == text.strip(" ")


@pytest.mark.parametrize("student", ALL)
@pytest.mark.parametrize("teacher", ALL)
def test_spans_of_random_text(student, teacher):
    for text in random_texts(120)[::2]:
        readings = read(student, text), read(teacher, text)
        if all(reading.ids for reading in readings):
            check(*readings)


@pytest.mark.parametrize("student", BYTES)
@pytest.mark.parametrize("teacher", BYTES)
def test_spans_of_sampled_tokens(student, teacher):
    """Tokens at random: most are not valid UTF-8, many are special."""
    own, other, draw = vocabulary(student), vocabulary(teacher), random.Random(1)
    complete = 0
    for _ in range(60):
        ids = draw.choices(range(len(own.pieces)), k=draw.randint(1, 10))
        mine, theirs = read_again(ids, own, other)
        assert mine.ids == tuple(ids[: len(mine.ids)])
        assert joined(theirs).startswith(joined(mine))
        check(mine, theirs, whole=False)
        stop = next((k for k, i in enumerate(ids) if own.pieces[i] == END), len(ids) - 1) + 1
        if own.same(other):
            assert theirs.ids == mine.ids == tuple(ids[:stop])
        elif len(mine.ids) == stop:
            complete += 1
            assert joined(mine) == joined(theirs)
            assert NO_SPAN not in align(mine, theirs).teacher
        else:  # a special token that the teacher lacks
            name = own.pieces[ids[len(mine.ids)]]
            assert isinstance(name, str)
            assert name not in other.of_event
        data = [piece if isinstance(piece, bytes) else piece.encode() for piece in own.spell(mine.ids).pieces]
        assert own.same(other) or bool(theirs.lone) == any(not valid for _, valid in valid_runs(b"".join(data)))
    assert own.same(other) or complete > 15


@pytest.mark.parametrize("name", ALL)
def test_one_tokenizer_gives_single_tokens(name):
    own = vocabulary(name)
    for text in random_texts(120)[::4]:
        ids = [i for i in read(name, text).ids if i != own.ends[0]] + [own.ends[0]]
        mine, theirs = read_again(ids, own, own)
        assert mine == theirs
        if name != "words":
            assert len(mine.ids) == len(ids)
        pieces = [piece for piece in mine.pieces if piece]  # but the space that Llama adds has no bytes, so it joins the next token
        assert len(align(mine, theirs).ends) == len(pieces)


def test_by_hand():
    student = Reading((1, 2, 3, 4, 0), (b" th", b"e", b" his", b"tory", END), (True,) * 5)
    teacher = Reading((7, 8, 9, 5, 6), (b" the", b" ", b"his", b"tory", END), (True,) * 5)
    spans = check(student, teacher)
    assert spans == Alignment((0, 0, 1, 2, 3), (0, 1, 1, 2, 3), (4, 8, 12, 13))
    assert single(spans) == (False, False, True, True)
    shorter = Reading(student.ids[:3], student.pieces[:3], (True, True, False))
    assert align(shorter, teacher) == Alignment((0, 0, 1), (0, 1, 1, NO_SPAN, NO_SPAN), (4, 8))
    assert align(Reading(), teacher) == Alignment((), (NO_SPAN,) * 5, ())


def test_the_space_that_llama_adds():
    llama, small = vocabulary("llama"), vocabulary("small")
    assert (llama.adds_space, vocabulary("gemma").adds_space, small.adds_space) == (True, False, False)
    names = llama.tokenizer.convert_ids_to_tokens
    first, later = llama.read("the", first=True), llama.read("the")
    assert (names([*first.ids]), first.pieces) == (["▁the"], (b"the",))
    assert (names([*later.ids]), later.pieces) == (["the"], (b"the",))  # after a prompt there is no space
    assert llama.spell(first.ids).pieces == (b" the",)
    newline = llama.read("\nthe", first=True)
    assert newline.pieces == (b"", b"\n", b"the")
    assert check(newline, small.read("\nthe")).student == (0, 0, 1)


def test_normalised_text_keeps_the_original_bytes():
    nfc, small = vocabulary("nfc"), vocabulary("small")
    text = "the e\u0301a"
    reading = nfc.read(text)
    assert joined(reading) == text.encode()
    assert reading.exact[-1]
    assert reading.changed == len("e\u0301".encode()) or reading.changed == len(" e\u0301".encode())
    assert reading.dropped == 2
    check(small.read(text), reading)
    assert all(nfc.read("the éa").exact)
    # tokens of a student with a normaliser spell the normalised text, and that is what the teacher reads
    mine, theirs = read_again(reading.ids, nfc, small)
    assert joined(theirs) == joined(mine) == "the éa".encode()
    assert all(mine.exact + theirs.exact)


def test_words_drop_spaces_and_do_not_spell_unknown_words():
    words, small = vocabulary("words"), vocabulary("small")
    reading = words.read(" the  theatre rules\n ")
    assert reading.pieces == (b" the", b"  theatre", b" rules", b"\n ")
    assert reading.exact == (True, True, False, True)
    assert (reading.dropped, reading.changed) == (5, 6)
    check(reading, small.read(" the  theatre rules\n "))
    mine, theirs = read_again([2, 3, 1], words, small)
    assert joined(theirs) == joined(mine) == b"the theatre[the end of the text]"
    half = small.spell(small.read("a東").ids[:-1])
    mine, theirs = read_again(half.ids, small, words)  # a teacher of words cannot read half a character
    assert (mine.pieces, theirs.pieces) == ((b"a",), (b"a",))


def test_special_tokens():
    small, large, nfc = vocabulary("small"), vocabulary("large"), vocabulary("nfc")
    end, turn = small.ends[0], small.of_event["<|im_end|>"]
    text = small.read("the</s>").ids  # the text of a special token is ordinary text
    assert end not in text
    mine, theirs = read_again([*text, end, *text], small, large)
    assert theirs.ids[-1] == large.ends[0] != end
    assert mine.ids == (*text, end)
    assert joined(theirs) == b"the</s>[the end of the text]"
    assert single(check(mine, theirs))[-1]
    mine, theirs = read_again([*text, turn, *text], small, large)  # `large` has no such token
    assert mine.ids == text
    assert joined(theirs) == b"the</s>"
    mine, theirs = read_again([*text, turn, *text], small, nfc)
    assert theirs.ids.count(nfc.of_event["<|im_end|>"]) == 1
    assert len(mine.ids) == 2 * len(text) + 1
    both = token_bytes(small.tokenizer, [turn, end])
    assert [both.spell([k]).pieces for k in (end, turn)] == [(END,), (END,)]
    assert read_again([end], both, large)[1].ids == (large.ends[0],)
    assert read_again([large.ends[0]], large, both)[1].ids == (turn,)


def test_bytes_that_are_no_text():
    assert valid_runs("é".encode() + b"\xff\xe6\x9d" + b"a") == [("é".encode(), True), (b"\xff", False), (b"\xe6\x9d", False), (b"a", True)]
    assert valid_runs(b"") == []
    small, gemma = vocabulary("small"), vocabulary("gemma")
    ids = small.read("a東").ids
    mine, theirs = read_again(ids[:-1], small, gemma)  # cut in the middle of a character
    assert theirs.lone == 2
    assert gemma.tokenizer.convert_ids_to_tokens([*theirs.ids]) == ["a", "<0xE6>", "<0x9D>"]
    check(mine, theirs)
    assert all(mine.exact + theirs.exact)


def test_shared_tokens():
    small, gemma, llama = vocabulary("small"), vocabulary("gemma"), vocabulary("llama")
    pairs = {small.tokens[a]: gemma.tokens[b] for a, b in zip(*shared_tokens(small, gemma), strict=True)}
    assert pairs["Ġ"] == "▁"
    assert pairs["a"] == "a"
    assert pairs["A"] == "A"  # not <0x41>, which has the same byte
    assert pairs["B"] == "<0x42>"  # the only one
    assert pairs["æ"] == "<0xE6>"
    assert pairs["</s>"] == "</s>"
    assert "<|im_end|>" not in pairs
    for a, b in zip(*shared_tokens(small, gemma), strict=True):
        assert small.pieces[a] == gemma.pieces[b]
    every = list(range(len(gemma.pieces)))
    assert shared_tokens(gemma, llama) == (every, every)  # one vocabulary, and duplicates of bytes keep their own ids
    large = vocabulary("large")
    turn = token_bytes(large.tokenizer, [large.of_event["<|user|>"], large.ends[0]])
    ends = dict(zip(*shared_tokens(small, turn), strict=True))
    assert ends[small.ends[0]] == turn.ends[0]


@pytest.mark.parametrize("names", [("small", "large"), ("large", "words"), ("llama", "gemma"), ("words", "small")], ids="-".join)
def test_all_tokens_of_a_cell_begin_with_its_root(names):
    student, teacher = map(vocabulary, names)
    sizes = len(student.tokens) + 2, len(teacher.tokens)
    found = cells(student, teacher, sizes)
    roots, last = dict[int, set[bytes]](), max(cell for own in found for cell, _ in own)
    for side, own, size in zip((student, teacher), found, sizes, strict=True):
        assert len(own) == size
        for token, (cell, length) in enumerate(own):
            piece = side.piece(token) if token < len(side.tokens) else None
            if isinstance(piece, bytes) and cell < last - 1:
                roots.setdefault(cell, set()).add(piece[:length])
                assert len(piece) >= length
    assert all(len(each) == 1 for each in roots.values())
    assert len({cell for cell, _ in found[0]} & {cell for cell, _ in found[1]}) > 5
    # the first tokens of one text are in one cell
    for text in (" the theatre", " is", " a ab", " theatre the"):
        mine, theirs = (side.read(text) for side in (student, teacher))
        if all(mine.exact) and all(theirs.exact):
            assert found[0][mine.ids[0]][0] == found[1][theirs.ids[0]][0], text


def test_only_the_first_word_of_a_text_may_lack_its_space():
    """A word stands for a space and its letters. After `a`, the letters `ab` without a space are another text."""
    student, teacher = vocabulary("words"), vocabulary("large")
    again = Rereader(student, teacher, (len(student.tokens), len(teacher.tokens)))
    split = student.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    ids = [split.token_to_id(word) for word in ("the", "a", "ab")]
    found = again(Sequence((0,), (*ids, student.ends[0]), teacher_prompt=(0,))).second
    assert found is not None
    assert found.student_marks.tolist() == [STRIPPED, SPELLED, SPELLED, SPELLED]
    text = Reading(tuple(ids[1:]), (b"a", b"ab"), (True, True))
    assert marks(text, student, len(student.tokens)).tolist() == [STRIPPED, CHANGED]


def test_two_models_with_different_tokenizers_come_closer():
    """From the text to the student's weights, as the page "Different tokenizers" does it."""
    student, teacher = token_bytes(byte_tokenizer()), vocabulary("large")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(teacher.tokens) + 3, **SHAPE)  # 3 rows of padding
    reader: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    reader.lm_head.weight *= 20
    learner = byte_model()
    mine, theirs = read_again([*student.read("the theatre there is 東").ids, *student.ends], student, teacher)
    spans = align(mine, theirs)
    spelled, count = Rereader(student, teacher, (len(student.tokens), len(teacher.tokens))).spelled, len(spans.ends)
    no = [np.zeros(len(reading.ids), bool) for reading in (mine, theirs)]
    texts = [
        SpelledText(v, np.array(r.ids), np.array(of), n, n)
        for v, r, of, n in zip(spelled, (mine, theirs), (spans.student, spans.teacher), no, strict=True)
    ]
    pair = SpelledPair.of(texts[0], texts[1], np.arange(count) > 0, np.ones(count, bool))

    def states(model, prompt: str, own: TokenBytes, reading: Reading) -> Hidden:
        before = own.read(prompt).ids
        found = model.model(torch.tensor([[*before, *reading.ids]])).last_hidden_state[0, len(before) - 1 : -1]
        return Hidden(found, Head(model.lm_head.weight))

    target = states(reader, "say", teacher, theirs)
    optimizer, losses = torch.optim.Adam(learner.parameters(), lr=0.01), []
    for _ in range(30):
        own = states(learner, "say ", student, mine)
        loss, values = fused_span_divergence(forward_kl, own, target, pair, weights=torch.full((count,), 1 / count))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert values.min() >= 0
    assert losses[-1] < 0.2 * losses[0]


def test_bad_input():
    class Slow:
        eos_token_id = None

    with pytest.raises(DataError, match="Slow"):
        token_bytes(Slow())  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="99999"):
        token_bytes(vocabulary("small").tokenizer, [99999])


def test_words_are_shared_with_tokens_that_begin_with_a_space():
    """A word of WordLevel is `Ġthe` for a byte-level BPE. The unknown token and a vocabulary with a normaliser share no words."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "then": 3, "\n": 4, "##re": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+|\n"), behavior="removed", invert=True)
    wordy = token_bytes(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"))
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("r", "e")]
    alphabet = {token: i for i, token in enumerate(["</s>", *bytes_to_unicode().values(), "th", "the", "Ġthe", "re", "<unk>"])}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    parts = token_bytes(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
    expected = {(1, alphabet["</s>"]), (2, alphabet["Ġthe"]), (4, alphabet["Ċ"]), (5, alphabet["re"])}
    assert set(zip(*shared_tokens(wordy, parts), strict=True)) == expected
    student, teacher = read_again((2, 4, 2, 1), wordy, parts)
    spans = align(student, teacher)
    pairs = [(student.ids[spans.student.index(k)], teacher.ids[spans.teacher.index(k)]) for k, one in enumerate(single(spans)) if one]
    assert (2, alphabet["the"]) in pairs  # the first word of a text, and the word behind a line break, have no space: no shared token
    wordy.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert set(zip(*shared_tokens(token_bytes(wordy.tokenizer), parts), strict=True)) == {(1, alphabet["</s>"])}


def test_the_command_that_counts_spans(tmp_path, monkeypatch, capsys):
    """The page "Different tokenizers" gives this command. It read a method of `Alignment` that no longer exists."""
    benchmarks = Path(__file__).parents[3] / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    script = runpy.run_path(str(benchmarks / "vocabularies.py"))
    (tmp_path / "rows.jsonl").write_text('{"output": "the theatre"}\n')
    for name, merges in (("student", 0), ("teacher", 3)):
        bpe(merges).save_pretrained(tmp_path / name)
    script["texts"](tmp_path / "rows.jsonl", str(tmp_path / "student"), str(tmp_path / "teacher"))
    pieces = token_bytes(bpe(3)).read("the theatre").pieces
    single = sum(len(piece) == 1 for piece in pieces)
    assert 0 < single < len(pieces)
    assert f"spans: {len(pieces)}\nspans of one token on both sides: {single}\n" in capsys.readouterr().out
