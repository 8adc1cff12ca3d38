"""Policy gradients on rewards of spans, against autograd of the exact sequence-level KL.

The toy: texts of up to 4 letters a and b. A tokenizer has the letters, and perhaps one pair of letters that it merges. A model has a random
distribution over the next token for every sequence of tokens. So all texts can be enumerated.
"""

from collections import defaultdict
from functools import cache

import pytest
import torch

from tadistill.data.alignment import align
from tadistill.data.token_bytes import END, Reading
from tadistill.errors import ConfigError
from tadistill.objectives import policy_gradient, returns, span_rewards

LENGTH = 4
Tokens = tuple[str, ...]


def read(text: str, pair: str) -> Tokens:
    """The tokenizer's own tokens: it merges from left to right."""
    tokens: list[str] = []
    while text:
        token = pair if pair and text.startswith(pair) else text[0]
        tokens.append(token)
        text = text[len(token) :]
    return (*tokens, END)


def reading(tokens: Tokens) -> Reading:
    return Reading(tuple(range(len(tokens))), tuple(t if t == END else t.encode() for t in tokens), (True,) * len(tokens))


class Model:
    """Random probabilities of the next token. A canonical model writes only what its tokenizer would write."""

    def __init__(self, pair: str, seed: int, *, canonical: bool):
        self.pair, self.canonical = pair, canonical
        self.vocabulary = ["a", "b", *([pair] if pair else []), END]
        self.generator = torch.Generator().manual_seed(seed)
        self.logits: dict[Tokens, torch.Tensor] = {}

    def allowed(self, before: Tokens, token: str) -> bool:
        written = "".join(before)
        if token == END:
            return True
        if len(written) + len(token) > LENGTH:
            return False
        return not self.canonical or read(written + token, self.pair)[:-1] == (*before, token)

    def log_probs(self, before: Tokens) -> dict[str, torch.Tensor]:
        if before not in self.logits:
            drawn = torch.randn(len(self.vocabulary), generator=self.generator, dtype=torch.float64)
            self.logits[before] = drawn.requires_grad_()
        tokens = [t for t in self.vocabulary if self.allowed(before, t)]
        rows = torch.tensor([self.vocabulary.index(t) for t in tokens])
        return dict(zip(tokens, self.logits[before][rows].log_softmax(0), strict=True))

    def score(self, tokens: Tokens) -> torch.Tensor:
        """Return the log-probability of each token."""
        return torch.stack([self.log_probs(tokens[:k])[token] for k, token in enumerate(tokens)])

    def everything(self, before: Tokens = ()) -> list[Tokens]:
        found = []
        for token in self.log_probs(before):
            found += [(*before, END)] if token == END else self.everything((*before, token))
        return found

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.cat(torch.autograd.grad(loss, list(self.logits.values())))


def text(tokens: Tokens) -> str:
    return "".join(tokens[:-1])


@cache
def models(student_pair: str, teacher_pair: str, canonical: bool) -> tuple[Model, Model, list[Tokens]]:
    student, teacher = Model(student_pair, 1, canonical=canonical), Model(teacher_pair, 2, canonical=canonical)
    sequences = student.everything()
    for model in (student, teacher):  # draws all of its numbers in one order, whichever test comes first
        assert sum(model.score(s).sum().detach().exp() for s in model.everything()) == pytest.approx(1, abs=1e-12)
    return student, teacher, sequences


def joint_kl(student: Model, teacher: Model, sequences: list[Tokens]) -> torch.Tensor:
    """E_q[log q(s) - log p(the teacher's own tokens of the text of s)]."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in sequences:
        log_q = student.score(tokens).sum()
        total = total + log_q.exp() * (log_q - teacher.score(read(text(tokens), teacher.pair)).sum().detach())
    return total


def by_text(model: Model) -> dict[str, torch.Tensor]:
    """The log-probability of every text: the sum over all sequences of tokens."""
    found = defaultdict(list)
    for tokens in model.everything():
        found[text(tokens)].append(model.score(tokens).sum())
    return {key: torch.stack(values).logsumexp(0) for key, values in found.items()}


def text_kl(student: Model, teacher: Model) -> torch.Tensor:
    log_p = by_text(teacher)
    return torch.stack([log_q.exp() * (log_q - log_p[key].detach()) for key, log_q in by_text(student).items()]).sum()


def estimated(student: Model, teacher: Model, sequences: list[Tokens], delay: int | None) -> torch.Tensor:
    """The expected gradient of the policy-gradient loss, over all sequences."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in sequences:
        own = read(text(tokens), teacher.pair)
        spans = align(reading(tokens), reading(own))
        log_q, log_p = student.score(tokens).unsqueeze(0), teacher.score(own).detach().unsqueeze(0)
        mine, theirs = torch.tensor([spans.student]), torch.tensor([spans.teacher])
        rewards = span_rewards(log_q.detach(), mine, log_p, theirs, delay=delay)
        gains = returns(rewards, mine >= 0, include_current=True, length_normalisation="none")
        loss = policy_gradient(log_q, log_q.detach(), gains, clip=float("inf"))
        total = total + log_q.detach().sum().exp() * loss.sum()
    return student.gradient(total)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


PAIRS = {"teacher-finer": ("ba", ""), "teacher-merges": ("", "ab"), "both-merge": ("ba", "ab"), "one-tokenizer": ("ab", "ab")}


@pytest.mark.parametrize("canonical", [True, False], ids=["canonical", "any"])
@pytest.mark.parametrize("name", PAIRS)
def test_all_rewards_at_the_end_give_the_exact_gradient(name, canonical):
    student, teacher, sequences = models(*PAIRS[name], canonical)
    exact = student.gradient(joint_kl(student, teacher, sequences))
    assert error(estimated(student, teacher, sequences, None), exact) < 1e-12


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_kl_of_texts_where_each_text_has_one_tokenisation(name):
    student, teacher, sequences = models(*PAIRS[name], True)
    joint, texts = joint_kl(student, teacher, sequences), text_kl(student, teacher)
    assert float((joint - texts).detach()) == pytest.approx(0, abs=1e-12)
    assert error(estimated(student, teacher, sequences, None), student.gradient(texts)) < 1e-12


@pytest.mark.parametrize(
    ("name", "delay", "bias"),
    [
        ("teacher-finer", 0, 0),  # every boundary of the student is one of the teacher
        ("teacher-finer", 2, 0),
        ("one-tokenizer", 0, 0),
        ("teacher-merges", 0, 0.1695),  # the letter after an `a` decides whether the teacher merges
        ("teacher-merges", 1, 0),  # one letter later this is known
        ("both-merge", 0, 0.3170),
        ("both-merge", 1, 0),
    ],
)
def test_bias_of_early_payment(name, delay, bias):
    student, teacher, sequences = models(*PAIRS[name], True)
    exact = student.gradient(joint_kl(student, teacher, sequences))
    assert error(estimated(student, teacher, sequences, delay), exact) == pytest.approx(bias, abs=1e-4 if bias else 1e-12)


@pytest.mark.parametrize(("name", "bias"), [("teacher-finer", 0.3269), ("teacher-merges", 0.1806), ("both-merge", 0.4032)])
def test_bias_where_a_text_has_several_tokenisations(name, bias):
    """J = KL of texts - the student's entropy over tokenisations + the teacher's probability of other tokenisations."""
    student, teacher, sequences = models(*PAIRS[name], False)
    log_Q, log_P = by_text(student), by_text(teacher)
    entropy = other = torch.zeros((), dtype=torch.float64)
    for tokens in sequences:
        log_q = student.score(tokens).sum()
        entropy = entropy - log_q.exp() * (log_q - log_Q[text(tokens)])
        other = other + log_q.exp() * (log_P[text(tokens)] - teacher.score(read(text(tokens), teacher.pair)).sum())
    joint, texts = joint_kl(student, teacher, sequences), text_kl(student, teacher)
    assert float((joint - (texts - entropy + other)).detach()) == pytest.approx(0, abs=1e-12)
    assert error(student.gradient(joint), student.gradient(texts)) == pytest.approx(bias, abs=1e-4)


def test_by_hand():
    # tokens of the student: prompt, x, y, z, tail without span; of the teacher: xy, z1, z2, padding
    log_q = torch.tensor([[9.0, -1, -2, -4, 9]])
    log_p = torch.tensor([[-0.5, -8, -16, 9]])
    mine, theirs = torch.tensor([[-1, 0, 0, 1, -1]]), torch.tensor([[0, 1, 1, -1]])
    for delay, expected in ((0, [0, 0, 2.5, -20, 0]), (1, [0, 0, 0, -17.5, 0]), (None, [0, 0, 0, -17.5, 0])):
        assert span_rewards(log_q, mine, log_p, theirs, delay=delay).tolist() == [expected]
    with pytest.raises(ConfigError, match="delay"):
        span_rewards(log_q, mine, log_p, theirs, delay=-1)


def test_one_tokenizer_gives_the_rewards_of_tokens():
    log_q, log_p = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    spans = torch.tensor([[-1, -1, 0, 1, 2, 3, -1], [-1, 0, 1, 2, 3, 4, 5], [-1] * 7])
    rewards = span_rewards(log_q, spans, log_p, spans, delay=0)
    assert torch.equal(rewards, torch.where(spans >= 0, log_p - log_q, 0.0))
    nothing = torch.full((1, 3), -1)
    assert span_rewards(torch.ones(1, 3), nothing, torch.ones(1, 3), nothing).abs().max() == 0
