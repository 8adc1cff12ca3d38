"""Divergences over spans: exact where the documentation says so, against an oracle of dictionaries everywhere, and bad input."""

from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
import pytest
import torch
from tests.unit.objectives.largest import Largest
from tests.unit.objectives.text_oracle import Side, text_divergence
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import (
    Head,
    Hidden,
    alpha_beta,
    forward_kl,
    fused_span_divergence,
    jensen_shannon,
    next_symbol,
    reverse_kl,
    tiles,
    total_variation,
)
from tadistill.objectives.next_symbol import SpelledPair
from tadistill.objectives.spelling import SpelledText, SpelledVocabulary, Spelling

Symbols = tuple[int, ...]
A, B, END = 97, 98, 256
EVENTS = 257  # bytes and the end of the text
LETTERS: tuple[Symbols, ...] = ((A,), (B,), (END,))


def greedy(vocabulary: tuple[Symbols, ...], text: Symbols) -> list[int] | None:
    """Return the tokens of a text: always the longest one. None if a place of the text has no token."""
    found, place = list[int](), 0
    while place < len(text):
        fits = [i for i, token in enumerate(vocabulary) if text[place : place + len(token)] == token]
        if not fits:
            return None
        found.append(max(fits, key=lambda i: len(vocabulary[i])))
        place += len(vocabulary[found[-1]])
    return found


def cells(student: tuple[Symbols, ...], teacher: tuple[Symbols, ...]) -> list[list[tuple[int, int]]]:
    """Return the cells of two vocabularies: each token and the first token of the other tokenizer are in one cell."""
    both, parts = (student, teacher), [{(s, i)} for s, v in enumerate((student, teacher)) for i in range(len(v))]
    for s, vocabulary in enumerate(both):
        for i, token in enumerate(vocabulary):
            other = greedy(both[1 - s], token)
            if other:
                joined = [part for part in parts if part & {(s, i), (1 - s, other[0])}]
                parts = [part for part in parts if part not in joined] + [set().union(*joined)]
    found = [[(-1, 1)] * len(v) for v in both]
    whole = [part for part in parts if len({s for s, _ in part}) == 2]
    for cell, part in enumerate(whole):
        root = min(len(both[s][i]) for s, i in part)
        for s, i in part:
            found[s][i] = (cell, root)
    return [[(cell if cell >= 0 else len(whole) + s, n) for cell, n in own] for s, own in enumerate(found)]


class Toy:
    """Two models of texts of two letters. Every context has its own random logits. Texts end."""

    def __init__(self, student: tuple[Symbols, ...], teacher: tuple[Symbols, ...], *, canonical: bool, pairs: bool = False):
        self.vocabularies, self.canonical, self.pairs = (student, teacher), canonical, pairs
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(len(v), 4, generator=generator, dtype=torch.float64) for v in self.vocabularies]
        self.weights[0].requires_grad_()
        roots = cells(student, teacher)
        self.spelled = [SpelledVocabulary.of(v, EVENTS, own) for v, own in zip(self.vocabularies, roots, strict=True)]

    def text(self, side: int, tokens: tuple[int, ...]) -> Symbols:
        return sum((self.vocabularies[side][i] for i in tokens), ())

    def allowed(self, side: int, tokens: tuple[int, ...]) -> list[bool]:
        """Say which tokens can follow. A canonical model writes only what its tokenizer writes."""
        vocabulary, text = self.vocabularies[side], self.text(side, tokens)
        odd = self.pairs and side == 0 and len(text) % 2 == 1  # the teacher has only pairs of letters
        found = []
        for i, token in enumerate(vocabulary):
            if token == (END,):
                found.append(not odd)
            elif len(text) >= (3, 6)[side] and not odd:
                found.append(False)
            else:
                found.append(not self.canonical or greedy(vocabulary, text + token) == [*tokens, i])
        return found

    def state(self, side: int, tokens: tuple[int, ...]) -> Tensor:
        seed = sum((k + 1) * 131 * (token + 1) for k, token in enumerate(tokens)) + 7919 * side
        random = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.cat([random, torch.tensor([0.0 if ok else -1.0 for ok in self.allowed(side, tokens)], dtype=torch.float64)])

    def head(self, side: int) -> Tensor:
        size = len(self.vocabularies[side])
        return torch.cat([self.weights[side], 1e3 * torch.eye(size, dtype=torch.float64)], 1)

    def log_probs(self, side: int, tokens: tuple[int, ...]) -> Tensor:
        return (self.head(side) @ self.state(side, tokens)).log_softmax(-1)

    def texts(self, side: int, within: Symbols | None = None) -> list[tuple[tuple[int, ...], Tensor]]:
        """Return all token sequences that end, with their log-probabilities. `within` allows only beginnings of this text."""
        found = list[tuple[tuple[int, ...], Tensor]]()
        open_: list[tuple[tuple[int, ...], Tensor]] = [((), torch.zeros((), dtype=torch.float64))]
        while open_:
            tokens, total = open_.pop()
            scores, allowed = self.log_probs(side, tokens), self.allowed(side, tokens)
            for i in range(len(allowed)):
                more = (*tokens, i)
                if allowed[i] and (within is None or within[: len(self.text(side, more))] == self.text(side, more)):
                    (found if self.vocabularies[side][i] == (END,) else open_).append((more, total + scores[i]))
        return found

    def exact(self) -> Tensor:
        """Return KL(Q || P) of whole texts, over all tokenisations."""
        q = dict[Symbols, Tensor]()
        for tokens, score in self.texts(0):
            q[self.text(0, tokens)] = q.get(self.text(0, tokens), torch.zeros(())) + score.exp()
        p = {text: sum(score.exp() for _, score in self.texts(1, text)) for text in q}
        return torch.stack([mass * (mass / p[text]).log() for text, mass in q.items()]).sum()

    def pair(self, tokens: tuple[int, ...]) -> tuple[SpelledPair, list[Hidden]]:
        other = greedy(self.vocabularies[1], self.text(0, tokens))
        assert other is not None
        sides = tokens, tuple(other)
        ends = [[*accumulate(len(v[i]) for i in own)] for v, own in zip(self.vocabularies, sides, strict=True)]
        common = sorted(set(ends[0]) & set(ends[1]))
        texts, hidden = [], []
        for side, own in enumerate(sides):
            spans, no = np.searchsorted(common, ends[side]), np.zeros(len(own), bool)
            texts.append(SpelledText(self.spelled[side], np.array(own), spans, no, no))
            states = torch.stack([self.state(side, own[:k]) for k in range(len(own))])
            hidden.append(Hidden(states, Head(self.head(side) if side == 0 else self.head(side).detach())))
        return SpelledPair.of(texts[0], texts[1], np.arange(len(common)) > 0, np.ones(len(common), bool)), hidden

    def expected(self) -> Tensor:
        """Return the expectation of our loss over the student's texts."""
        losses = []
        for tokens, score in self.texts(0):
            pair, hidden = self.pair(tokens)
            losses.append(score.exp() * fused_span_divergence(reverse_kl, hidden[0], hidden[1], pair)[0])
        return torch.stack(losses).sum()


EXACT = {
    "student of longer tokens": ((LETTERS[0], (B, A), (B, B), (END,)), LETTERS, False),
    "teacher of longer tokens": (LETTERS, ((A, A), (A, B), (B, A), (B, B), (END,)), False),
    "student with a choice": (((A,), (B,), (B, A), (END,)), LETTERS, True),
    "teacher with a choice": (LETTERS, ((A,), (B,), (A, B), (END,)), True),
    "both with a choice": (((A,), (B,), (B, A), (END,)), ((A,), (B,), (A, B), (END,)), True),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_expected_loss_is_the_kl_of_texts(case):
    """Value and gradient, in float64. In the last three cases, the models write only what their tokenizers write."""
    student, teacher, canonical = EXACT[case]
    toy = Toy(student, teacher, canonical=canonical, pairs=case == "teacher of longer tokens")
    exact, found = toy.exact(), toy.expected()
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-9)
    slopes = [torch.autograd.grad(value, toy.weights[0], retain_graph=True)[0] for value in (exact, found)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-8, atol=1e-9)
    assert slopes[0].abs().max() > 0.01


@pytest.mark.parametrize(
    ("case", "error"), [("student with a choice", -0.0095), ("teacher with a choice", 0.236), ("both with a choice", 0.028)]
)
def test_models_that_use_all_tokenisations_are_not_exact(case, error):
    student, teacher, _ = EXACT[case]
    toy = Toy(student, teacher, canonical=False)
    exact, found = float(toy.exact().detach()), float(toy.expected().detach())
    assert found / exact - 1 == pytest.approx(error, rel=0.05)


GAPS = {
    "student": (((A,), (B,), (A, B, A), (END,)), LETTERS, -0.209),
    "teacher": (LETTERS, ((A,), (B,), (A, B, A), (END,)), -0.131),
    "both": (((A,), (B,), (A, B, A), (END,)), ((A,), (B,), (B, A, A), (END,)), -0.294),
}


@pytest.mark.parametrize("case", GAPS)
def test_a_token_with_a_beginning_that_is_no_token_has_unsure_places(case):
    """`aba` is a token, and `ab` is not. After `ab`, a model may be inside `aba`, or have written `a` and `b`. Such places are left out."""
    student, teacher, error = GAPS[case]
    toy = Toy(student, teacher, canonical=True)
    assert float(toy.expected().detach()) / float(toy.exact().detach()) - 1 == pytest.approx(error, abs=0.001)


@pytest.mark.parametrize("swapped", [False, True])
def test_models_of_equal_texts_have_no_loss(swapped):
    """Both write `aba` or `abb` with probability 1/2. One has letters only, the other also the token `aba`."""
    letters, words = LETTERS, ((A,), (B,), (A, B, A), (END,))
    chances: dict[Symbols, list[dict[Symbols, float]]] = {
        (A, B, A): [{(A,): 1}, {(B,): 1}, {(A,): 0.5, (B,): 0.5}, {(END,): 1}],
        (A, B, B): [{(A, B, A): 0.5, (A,): 0.5}, {(B,): 1}, {(B,): 1}, {(END,): 1}],
    }
    for text in ((A, B, A, END), (A, B, B, END)):
        own, other = greedy(letters, text), greedy(words, text)
        assert own is not None
        assert other is not None
        sides = []
        for vocabulary, tokens, kind in ((letters, own, (A, B, A)), (words, other, (A, B, B))):
            rows = chances[kind] if len(tokens) == 4 else [chances[kind][0], chances[kind][3]]
            probs = torch.tensor([[row.get(token, 0.0) for token in vocabulary] for row in rows], dtype=torch.float64)
            sides.append((vocabulary, np.array(tokens), Hidden(probs.clamp(min=1e-30).log(), Head(torch.eye(len(vocabulary)).double()))))
        sides = sides[::-1] if swapped else sides
        ends = [np.cumsum([len(v[i]) for i in tokens]) for v, tokens, _ in sides]
        common, roots = np.intersect1d(ends[0], ends[1]), cells(sides[0][0], sides[1][0])
        texts = []
        for (vocabulary, tokens, _), own_ends, root in zip(sides, ends, roots, strict=True):
            no = np.zeros(len(tokens), bool)
            texts.append(SpelledText(SpelledVocabulary.of(vocabulary, EVENTS, root), tokens, np.searchsorted(common, own_ends), no, no))
        pair = SpelledPair.of(texts[0], texts[1], np.arange(len(common)) > 0, np.ones(len(common), bool))
        for divergence in (forward_kl, reverse_kl, jensen_shannon):
            assert fused_span_divergence(divergence, sides[0][2], sides[1][2], pair)[1].abs().max() < 1e-9


# --- against the oracle ---------------------------------------------------------------------------------------------------

MINE: tuple[Symbols | None, ...] = ((A,), (B,), (A, B), (A, B, A), (32, A), (32, B, B), (END,), (32,), None)
THEIRS: tuple[Symbols | None, ...] = ((A,), (B,), (32,), (B, A), (32, A, B), (END,), (A, B, B), (32, B), None, (A, A))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(seed: int):
    """A random text of both models with random cells, states and heads; and the same for the oracle."""
    generator = np.random.default_rng(seed)
    spelled = [tuple(t for t in v if t) for v in (MINE, THEIRS)]
    roots = [[*own, *[(own[-1][0] + 90, 1)] * (len(v) - len(own))] for v, own in zip((MINE, THEIRS), cells(*spelled), strict=True)]
    aligned = [
        [dict(zip(s, r, strict=False)).get(t or (), (90 + k, 1)) for t in v]
        for k, (v, s, r) in enumerate(zip((MINE, THEIRS), spelled, roots, strict=True))
    ]
    tokens, follows, ends = ([], []), [], 0
    spans: tuple[list[int], list[int]] = ([], [])
    for row in range(3):
        text = tuple(generator.choice([A, B, 32], 7)) + ((END,) if row else ())
        sides = [greedy(tuple(t or (-5,) for t in v), text) for v in (MINE, THEIRS)]
        places = [[*accumulate(len(v[i] or ()) for i in own or ())] for v, own in zip((MINE, THEIRS), sides, strict=True)]
        common = sorted(set(places[0]) & set(places[1]))
        for k in range(2):
            tokens[k].extend(sides[k] or ())
            spans[k].extend(ends + np.searchsorted(common, places[k]))
        follows += [False] + [True] * (len(common) - 1)
        ends += len(common)
    stripped = [np.zeros(len(own), bool) for own in tokens]
    if MINE[tokens[0][0]][0] == THEIRS[tokens[1][0]][0] == 32 and len(MINE[tokens[0][0]]) > 1 and len(THEIRS[tokens[1][0]]) > 1:  # pyright: ignore
        stripped[0][0] = stripped[1][0] = True
    compared = generator.random(ends) < 0.9
    leaves = [drawn(len(tokens[0]), 3, seed=seed).requires_grad_(), drawn(len(MINE) + 1, 3, seed=seed + 1).requires_grad_()]
    heads = [Head(leaves[1]), Head(drawn(len(THEIRS), 2, seed=seed + 2), scale=1.3)]
    hidden = [Hidden(leaves[0], heads[0]), Hidden(drawn(len(tokens[1]), 2, seed=seed + 3), heads[1])]
    texts = [
        SpelledText(SpelledVocabulary.of(v, EVENTS, c), np.array(t), np.array(s), no, np.zeros(len(t), bool))
        for v, c, t, s, no in zip((MINE, THEIRS), aligned, tokens, spans, stripped, strict=True)
    ]
    pair = SpelledPair.of(texts[0], texts[1], np.array(follows), compared)

    def oracle(divergence, temperature: float) -> Tensor:
        sides = []
        for v, c, t, s, no, h in zip((MINE, THEIRS), aligned, tokens, spans, stripped, hidden, strict=True):
            probs = (h.head.logits(h.states)[:, : len(v)] / temperature).softmax(-1)
            sides.append(Side(v, c, t, s, probs, no.tolist()))
        return torch.stack(text_divergence(divergence, sides[0], sides[1], follows, compared.tolist()))

    return pair, hidden, leaves, oracle


DIVERGENCES = [
    (forward_kl, {}),
    (reverse_kl, {}),
    (jensen_shannon, {"beta": 0.3}),
    (total_variation, {}),
    (alpha_beta, {}),
]


@pytest.mark.parametrize(("divergence", "parameters"), DIVERGENCES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("tiny", [False, True], ids=["", "tiles"])
def test_equals_the_oracle(divergence, parameters, tiny, monkeypatch):
    if tiny:
        monkeypatch.setattr(tiles, "TILE_BYTES", 2 * (len(MINE) + len(THEIRS)) * 8)
        monkeypatch.setattr(tiles, "_CACHED", len(THEIRS))
        monkeypatch.setitem(next_symbol._AT_ONCE, "cpu", 3)
    for seed in range(6):
        pair, hidden, leaves, oracle = case(seed)
        weights = drawn(len(pair.follows), seed=seed).abs()
        total, values = fused_span_divergence(divergence, hidden[0], hidden[1], pair, weights=weights, temperature=1.4, **parameters)
        expected = oracle(partial(divergence, **parameters), 1.4)
        torch.testing.assert_close(values, expected.detach(), atol=1e-10, rtol=0)
        torch.testing.assert_close(total.detach(), (weights * expected).sum().detach(), atol=1e-10, rtol=0)
        for found, exact in zip(torch.autograd.grad(total, leaves), torch.autograd.grad((weights * expected).sum(), leaves), strict=True):
            torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
            assert exact.abs().max() > 1e-3


def test_a_softcap_has_the_same_gradient():
    """A head with a softcap has no written-out gradient, so autograd is used."""
    pair, hidden, leaves, _ = case(1)
    results = []
    for head in (Head(leaves[1]), Head(leaves[1], softcap=1e9)):
        total, _ = fused_span_divergence(reverse_kl, Hidden(leaves[0], head), hidden[1], pair)
        results.append(torch.autograd.grad(total, leaves))
    for plain, capped in zip(*results, strict=True):
        torch.testing.assert_close(plain, capped, atol=1e-6, rtol=1e-5)


def test_equal_models_have_no_loss():
    """Two vocabularies with the same tokens in another order, and the same model."""
    order = [2, 0, 1]
    student, teacher = LETTERS, tuple(LETTERS[i] for i in order)
    spelled = [SpelledVocabulary.of(v, EVENTS, own) for v, own in zip((student, teacher), cells(student, teacher), strict=True)]
    states, weight = drawn(5, 3, seed=0), drawn(3, 3, seed=1)
    tokens, no = np.array([0, 1, 1, 0, 2]), np.zeros(5, bool)
    texts = [SpelledText(v, t, np.arange(5), no, no) for v, t in zip(spelled, (tokens, np.argsort(order)[tokens]), strict=True)]
    pair = SpelledPair.of(texts[0], texts[1], np.arange(5) > 0, np.ones(5, bool))
    same = [Hidden(states, Head(w)) for w in (weight, weight[order])]
    assert fused_span_divergence(forward_kl, same[0], same[1], pair)[1].abs().max() < 1e-12
    other = Hidden(drawn(5, 3, seed=2), Head(weight[order]))
    plain = forward_kl(states @ weight.t(), other.states @ weight.t())
    torch.testing.assert_close(fused_span_divergence(forward_kl, same[0], other, pair)[1], plain, atol=1e-12, rtol=0)


def test_text_that_one_model_cannot_write_has_a_finite_loss():
    """The teacher has no token with `b`. Its probability counts as 1e-15."""
    teacher = ((A,), (END,))
    spelled = [SpelledVocabulary.of(v, EVENTS, own) for v, own in zip((LETTERS, teacher), cells(LETTERS, teacher), strict=True)]
    no = np.zeros(1, bool)
    texts = [SpelledText(v, np.array([0]), np.array([0]), no, no) for v in spelled]
    pair = SpelledPair.of(texts[0], texts[1], no, ~no)
    student, other = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log(), torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    eyes = [Head(torch.eye(n).double()) for n in (3, 2)]
    found = fused_span_divergence(reverse_kl, Hidden(student, eyes[0]), Hidden(other, eyes[1]), pair)[1]
    by_hand = 0.2 * np.log(0.2 / 0.6) + 0.3 * np.log(0.3 / 0.4) + 0.5 * np.log(0.5 / 1e-15)
    assert float(found) == pytest.approx(by_hand, rel=1e-9)


def test_no_tensor_has_a_row_of_logits_for_each_token(monkeypatch):
    """60 tokens of words of three letters, against the same text in letters."""
    words = tuple((x, y, z) for x in range(8) for y in range(8) for z in range(8))
    letters = tuple((x,) for x in range(8))
    spelled = [SpelledVocabulary.of(v, EVENTS, own) for v, own in zip((words, letters), cells(words, letters), strict=True)]
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * (len(words) + len(letters)) * 4)
    monkeypatch.setattr(tiles, "_CACHED", len(words))
    monkeypatch.setitem(next_symbol._AT_ONCE, "cpu", 3)
    tokens = np.arange(60) * 7
    no = np.zeros(180, bool)
    texts = [
        SpelledText(spelled[0], tokens, np.arange(60), no[:60], no[:60]),
        SpelledText(spelled[1], np.array([s for t in tokens for s in words[t]]), np.repeat(np.arange(60), 3), no, no),
    ]
    sides = [Hidden(drawn(n, 2, seed=n), Head(drawn(len(v), 2, seed=1))) for n, v in ((60, words), (180, letters))]
    sides[0].head.weight.requires_grad_()
    with Largest() as largest:
        fused_span_divergence(reverse_kl, sides[0], sides[1], SpelledPair.of(texts[0], texts[1], np.arange(60) > 0, np.ones(60, bool)))[
            0
        ].backward()
    assert largest.size <= 12 * len(words)  # of a few tokens, and not of 60


# --- groups of a vocabulary ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "stripped", "by cell"])
def test_groups_tile_the_vocabulary(kind):
    generator = np.random.default_rng(3)
    tokens = [*sorted({tuple(generator.choice([32, A, B], generator.integers(1, 5))) for _ in range(60)}), (END,), None]
    known = {token for token in tokens if token}
    cells = [(i % 3, 1) if t and t[0] == A else (9, 1) for i, t in enumerate(tokens)] if kind == "by cell" else None
    spelling, stripped = Spelling(tokens, EVENTS, cells), kind == "stripped"
    for token, own in enumerate(tokens):
        if (cells and cells[token][0] == 9) or (stripped and (own or (0,))[0] != 32):
            continue
        around = spelling.around(token, stripped)
        path = [*(own or (spelling.other,))][int(stripped) :]
        assert around.starts[0] == 0
        assert (np.diff(around.starts) > 0).all()
        whole = {t for i, t in enumerate(tokens) if t and (cells is None or cells[i] == cells[token])}
        whole = {t[1:] if t[0] == 32 else t for t in known} if stripped else whole
        assert [bool(end) for end in spelling.ends(token, stripped)[1:]] == [
            tuple(path[:n]) in whole or path == [spelling.other] for n in range(1, len(path) + 1)
        ]
        stops = [*around.starts[1:], len(tokens)]
        for start, stop, slot, closed in zip(around.starts, stops, around.slots, around.closed, strict=True):
            depth, symbol = divmod(int(slot), spelling.width)
            for i in spelling.order[start:stop]:
                written = [*(tokens[i] or (spelling.other,))]
                written = written[1:] if stripped and written[0] == 32 else written
                assert cells is None or cells[i][0] == cells[token][0] or depth == 0
                assert written[:depth] == path[:depth]
                assert (written[depth] if depth < len(written) else spelling.stop) == symbol
            if depth and closed and symbol < EVENTS:
                assert (*path[:depth], symbol) in whole


# --- bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input():
    pair, hidden, _, _ = case(0)
    with pytest.raises(ConfigError, match="different texts"):
        SpelledPair.of(
            replace(pair.student, tokens=pair.student.tokens[::-1].copy()), pair.teacher, pair.follows, np.ones(len(pair.follows), bool)
        )
    with pytest.raises(ConfigError, match="`teacher` has states of shape"):
        fused_span_divergence(reverse_kl, hidden[0], Hidden(hidden[1].states[1:], hidden[1].head), pair)
    with pytest.raises(ConfigError, match="temperature"):
        fused_span_divergence(reverse_kl, hidden[0], hidden[1], pair, temperature=0)
    broken = Hidden(hidden[0].states.detach() * float("nan"), hidden[0].head)
    with pytest.raises(ConfigError, match="student_hidden"):
        fused_span_divergence(reverse_kl, broken, hidden[1], pair)
