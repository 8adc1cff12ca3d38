"""Our divergences against TRL 1.16, its chunked kernel and its GKD trainer; then where a peer's number is not ours, and why.

Axes: B sequences, T positions, N tokens, H hidden, V vocabulary.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch
from tests.conftest import tiny_model
from torch import Tensor

from tadistill.data import tinyworld
from tadistill.data.batch import Sequence, collate
from tadistill.models.forward import Reader
from tadistill.models.teachers import teacher_of
from tadistill.objectives import Head, Hidden, forward_kl, fused_divergence, jensen_shannon, reverse_kl, tiles

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# TRL is imported in functions, because every worker of pytest-xdist imports this file, and one of them runs its tests
pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
if TYPE_CHECKING:
    from trl.experimental.gkd import GKDTrainer

N, V, H_STUDENT, H_TEACHER = 11, 53, 8, 12
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
HEADS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"temperature": 0.6, "bias": True, "scale": 1.5, "softcap": 5.0},
}
ENDS = {0.0: forward_kl, 1.0: reverse_kl}


class Case:
    """Hidden states and heads of a student and a teacher, the same for every beta."""

    def __init__(
        self, dtype: torch.dtype, *, temperature: float = 1.0, bias: bool = False, scale: float = 1.0, softcap: float | None = None
    ):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # the same numbers in both precisions

        self.temperature = temperature
        self.hidden, self.teacher_hidden = normal(N, H_STUDENT).requires_grad_(), normal(N, H_TEACHER)
        self.weight, teacher_weight = normal(V, H_STUDENT).requires_grad_(), normal(V, H_TEACHER)
        self.bias, teacher_bias = (normal(V).requires_grad_(), normal(V)) if bias else (None, None)
        self.student = Head(self.weight, self.bias, scale, softcap)
        self.teacher = Head(teacher_weight, teacher_bias, scale * 0.8, softcap)
        self.weights = torch.rand(N, generator=generator).to(dtype)  # a different one for every token, so that no mix-up goes unseen

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of the student's hidden states, head and, if there is one, bias."""
        return list(torch.autograd.grad(loss, [x for x in (self.hidden, self.weight, self.bias) if x is not None]))

    def plain(self, divergence, **parameters) -> tuple[Tensor, list[Tensor]]:
        """Values per token, and gradients of their weighted sum, by autograd through whole logits."""
        logits, teacher_logits = self.student.logits(self.hidden), self.teacher.logits(self.teacher_hidden)
        values = divergence(logits, teacher_logits, temperature=self.temperature, **parameters)
        return values.detach(), self.gradients((values * self.weights).sum())

    def fused(self, divergence, **parameters) -> tuple[Tensor, list[Tensor]]:
        """Return the loss by `fused_divergence`."""
        teacher = Hidden(self.teacher_hidden, self.teacher)
        total, values = fused_divergence(
            divergence, self.hidden, self.student, teacher, mask=self.weights, temperature=self.temperature, **parameters
        )
        return values, self.gradients(total)

    def kernel(self, beta: float) -> tuple[Tensor, list[Tensor]]:
        """Return the loss by the kernel of TRL's DistillationTrainer."""
        from trl.kernels import chunked_divergence

        heads = self.hidden, self.weight, self.bias, self.teacher_hidden, self.teacher.weight, self.teacher.bias
        shapes = self.student.scale, self.student.softcap, self.teacher.scale, self.teacher.softcap
        values, _ = chunked_divergence.ChunkedDivergenceFunction.apply(*heads, beta, self.temperature, *shapes)
        return values.detach(), self.gradients((values * self.weights).sum())

    def gkd(self, beta: float) -> tuple[Tensor, list[Tensor]]:
        """Return the loss by the loss function of TRL's GKDTrainer, which takes logits."""
        from trl.experimental.gkd import GKDTrainer

        logits, teacher_logits = self.student.logits(self.hidden), self.teacher.logits(self.teacher_hidden)
        values = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, beta=beta, temperature=self.temperature, reduction="none").sum(-1)
        return values.detach(), self.gradients((values * self.weights).sum())


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    """Absolute in the values, which are differences of terms of order 1 to 20; relative to its largest entry in a gradient."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance * max(1.0, float(expected[0].max())))
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def ours(case: Case, way: str, beta: float):
    """Every function of ours that is the generalised JSD at this beta."""
    run = getattr(case, way)
    return [run(jensen_shannon, beta=beta), *([run(ENDS[beta])] if beta in ENDS else [])]


@pytest.mark.parametrize("way", ["plain", "fused"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("beta", BETAS)
def test_trl_kernel(beta, head, way):
    """Both in float32, and each sums in its own order: 1e-5 is four times the worst that was seen (2.7e-6, in a gradient)."""
    case = Case(torch.float32, **HEADS[head])
    for found in ours(case, way, beta):
        assert_same(found, case.kernel(beta), 1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_trl_kernel_where_both_work_in_tiles(beta, monkeypatch):
    """Tiles of 4 tokens and 16 words there, of 3 tokens and one token here: none divides 11 tokens or 53 words."""
    monkeypatch.setattr("trl.kernels.chunked_divergence.TOKEN_CHUNK_SIZE", 4)
    monkeypatch.setattr("trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE", 16)
    monkeypatch.setattr(tiles, "TILE_BYTES", 3 * 2 * V * 4)
    monkeypatch.setattr(tiles, "_CACHED", V)
    case = Case(torch.float32, **HEADS["all"])
    for found in ours(case, "fused", beta):
        assert_same(found, case.kernel(beta), 1e-5)


@pytest.mark.parametrize("way", ["plain", "fused"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("beta", BETAS)
def test_gkd_loss(beta, head, way):
    """In float64: 1e-13 is thirty times the worst that was seen, and leaves no room for another formula."""
    case = Case(torch.float64, **HEADS[head])
    for found in ours(case, way, beta):
        assert_same(found, case.gkd(beta), 1e-13)


@pytest.mark.parametrize(("end", "beta"), [(0.0, 1e-6), (1.0, 1 - 1e-6)])
def test_beta_jumps_at_the_ends_in_trl_as_in_ours(end, beta):
    """The JSD vanishes like beta KL(p || q) for beta -> 0, and like (1 - beta) KL(q || p) for beta -> 1, but at the ends themselves GKD,
    TRL and ours all switch to the KL. So the last step of a sweep over beta multiplies loss and gradient by up to 1 / beta; what runs
    smoothly into the KL is the JSD divided by its factor.
    """
    case = Case(torch.float64)
    factor = min(beta, 1 - beta)
    for at in (lambda b: case.gkd(b)[0], lambda b: case.plain(jensen_shannon, beta=b)[0]):
        assert (at(end) / at(beta)).min() > 0.9 / factor
        torch.testing.assert_close(at(beta) / factor, at(end), rtol=0.05, atol=0)


# --- where a peer's number is not ours ----------------------------------------------------------------------------------


@pytest.fixture
def gkd_trainer(tmp_path):
    """Builds a GKDTrainer of two random models, four rows of tinyworld, and a loss that is the forward KL."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = tinyworld.tokenizer(people=10)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = sorted(tinyworld.world_rows("tinyworld", "train", people=10), key=lambda row: len(row["outputs"][0]))
    turns = [(("user", row["instruction"]), ("assistant", row["outputs"][0])) for row in (*rows[:2], *rows[-2:])]  # short and long
    data = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns])

    def build(kind: str, **options) -> "GKDTrainer":
        models = [tiny_model(kind, vocab=len(tokenizer), seed=seed) for seed in (0, 1)]
        options = GKDConfig(output_dir=str(tmp_path), beta=0.0, max_length=64, report_to=[], use_cpu=True, bf16=False, **options)
        return GKDTrainer(models[0], models[1], args=options, train_dataset=data, processing_class=tokenizer)

    return build


def our_loss(trainer: "GKDTrainer", batch: dict[str, Tensor], **parameters) -> Tensor:
    """The mean over response tokens of the forward KL, by our batches, our forward pass and the fused head."""
    sequences = []
    for ids, real, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        answer = labels != -100
        sequences.append(Sequence(tuple(ids[(real == 1) & ~answer].tolist()), tuple(ids[answer].tolist())))
    ours, student, teacher = collate(sequences, pad=0), Reader(trainer.model), teacher_of(trainer.teacher_model)
    target = teacher.target(ours)
    total, values = fused_divergence(forward_kl, student.hidden(trainer.model, ours), student.head, target, **parameters)
    return total / len(values)


def test_gkd_trainer_samples_at_a_temperature_that_its_loss_does_not_know(gkd_trainer):
    """GKDTrainer's `temperature` (0.9 by default) reaches `generate` only; `compute_loss` leaves the loss function's own at 1.

    Text is then drawn from softmax(z / T) and the models are compared by softmax(z). The right loss at T is that of the tempered
    distributions, which TRL's own loss function gives when it is told T.
    """
    trainer = gkd_trainer("llama", temperature=2.0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.generation_config.temperature == 2.0
    theirs, right = trainer.compute_loss(trainer.model, batch), our_loss(trainer, batch, temperature=2.0)
    torch.testing.assert_close(theirs, our_loss(trainer, batch, temperature=1.0), rtol=1e-5, atol=0)
    assert theirs > 1.5 * right

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = [model(**inputs).logits[:, :-1] for model in (trainer.model, trainer.teacher_model)]
    told = type(trainer).generalized_jsd_loss(*logits, labels=batch["labels"][:, 1:], beta=0, temperature=2.0)
    torch.testing.assert_close(told, right, rtol=1e-5, atol=0)


def test_gkd_trainer_puts_a_padded_gpt2_at_wrong_positions(gkd_trainer, kind):
    """GKDTrainer's collator pads on the left and its forward pass gives no position_ids, so a GPT-2 counts positions from the padding.

    What a sequence costs then depends on how long its neighbours in the batch are. Ours does not: it is the mean over all response
    tokens of what they cost when each sequence is alone. Rotary positions are relative, so for a Llama both are right.
    """
    trainer = gkd_trainer(kind)
    rows = list(trainer.train_dataset)
    batch, singles = trainer.data_collator(rows), [trainer.data_collator([row]) for row in rows]
    assert bool((batch["attention_mask"][:, 0] == 0).any())
    assert all(bool(single["attention_mask"].all()) for single in singles)
    alone = torch.stack([trainer.compute_loss(trainer.model, single) for single in singles])
    others = ~torch.eye(len(rows), dtype=torch.bool).unsqueeze(-1)
    among_others = torch.stack(
        [trainer.compute_loss(trainer.model, batch | {"labels": batch["labels"].masked_fill(other, -100)}) for other in others]
    )
    if kind == "gpt2":
        assert (among_others / alone - 1).abs().max() > 0.05
    else:
        torch.testing.assert_close(among_others, alone, rtol=1e-5, atol=0)
    tokens = (batch["labels"] != -100).sum(1)
    torch.testing.assert_close(our_loss(trainer, batch), (alone * tokens).sum() / tokens.sum(), rtol=1e-5, atol=0)


def test_zero_padding_of_a_narrower_student_takes_all_its_mass():
    """Liger 0.8.5 fills a student's missing logits with 0 where the teacher's head is wider. Shown by that formula, without Liger.

    Softmax does not care where logits lie, but a 0 does: GPT-2's lie around -40, and four padded words then get all of the probability.
    Right is to cut the teacher to the shared vocabulary and to renormalise it, which `vocab` does.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, V, generator=generator) * 2 - 40
    teacher = torch.randn(5, V + 4, generator=generator) * 2 - 40
    zeros = torch.nn.functional.pad(student, (0, 4))
    assert zeros.softmax(-1)[:, V:].sum(-1).min() > 1 - 1e-6
    assert forward_kl(zeros, teacher).min() > 30  # nats; the models are alike

    right = forward_kl(student, teacher[:, :V])
    assert right.max() < 15
    torch.testing.assert_close(right, forward_kl(student + 40, teacher[:, :V] + 40), rtol=1e-4, atol=0)
    eye = Head(torch.eye(V)), Head(torch.eye(V + 4))  # heads that give hidden states back as logits
    total, values = fused_divergence(forward_kl, student, eye[0], Hidden(teacher, eye[1]), vocab=V)
    torch.testing.assert_close(values, right, rtol=1e-6, atol=1e-6)
    assert float(total) == pytest.approx(float(right.sum()), rel=1e-6)
