"""Bad arguments: a ConfigError (a ValueError) of one sentence with the argument's name, its value and what is allowed."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from tests.conftest import naming
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tadistill.errors import ConfigError
from tadistill.objectives import (
    Head,
    Hidden,
    TaidSchedule,
    TargetMixture,
    TopK,
    adaptive_kl,
    alpha_beta,
    alpha_mixture,
    clipped_ratio,
    contrastive,
    contrastive_alpha,
    cross_entropy,
    forward_kl,
    fused_divergence,
    jensen_shannon,
    log_probs,
    moments,
    no_teacher,
    policy_gradient,
    returns,
    reverse_kl,
    single_step,
    skew_forward_kl,
    skew_reverse_kl,
    sorted_distance,
    taid,
    taid_target,
    token_log_probs,
    top_k,
    top_k_forward_kl,
    top_k_reverse_kl,
)

from .cases import CASES, draw, name

LOGITS = [c for c in CASES if c.module != "sampled"]  # cross-entropy has no teacher's logits
ALL = pytest.mark.parametrize("case", LOGITS, ids=name)
ONE_VOCABULARY = pytest.mark.parametrize("case", [c for c in LOGITS if c.module != "vocabularies"], ids=name)
S, T = draw(2, 3, 9)
TEACHERS = torch.tensor([[True], [False]])
IDS = torch.tensor([[0, 3, 8], [1, 2, 5]])
IMPOSSIBLE = torch.zeros_like(S).index_fill(-1, torch.tensor([4]), -math.inf)
NAN = math.nan
HIDDEN, WEIGHT, TARGET = torch.ones(2, 3, 4), torch.ones(9, 4), Hidden(torch.ones(2, 3, 5), Head(torch.ones(9, 5)))


def refused(call, *parts: str) -> str:
    """The message of the error, which holds all the parts and is one sentence."""
    with pytest.raises(ConfigError) as info:
        call()
    message = str(info.value)
    assert isinstance(info.value, ValueError)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    assert ". " not in message
    assert not message.endswith(".")
    return message


@ONE_VOCABULARY
def test_shapes(case):
    """Shapes that differ, and no vocabulary."""
    for other in (T[..., :8], T[:, :2], T[0], T.unsqueeze(0)):
        refused(lambda z=other: case.run(S, z), "`student_logits` has shape (2, 3, 9)", f"`teacher_logits` has shape {tuple(other.shape)}")
    for empty in (torch.ones(2, 0), torch.tensor(1.0)):
        refused(lambda z=empty: case.run(z, z), f"`student_logits` has shape {tuple(empty.shape)}")


@ALL
def test_temperature(case):
    for temperature in (0.0, -1.0, NAN, math.inf):
        with naming(temperature):
            refused(lambda t=temperature: case.run(S, T, temperature=t), f"`temperature` is {temperature}", "above 0")


@ALL
def test_logits_that_are_no_numbers(case):
    place = T[1, 2].argmax() if "top_k" in case.name else 5  # a dropped tail is not looked at
    for value, (side, other) in product([NAN, math.inf], [("student_logits", "teacher_logits"), ("teacher_logits", "student_logits")]):
        if "t=0)" in case.name and side == "teacher_logits":
            continue  # TAID at t = 0 does not look at the teacher
        bad = (S if side == "student_logits" else T).clone()
        bad[1, 2, place] = value
        pair = (bad, T) if side == "student_logits" else (S, bad)
        with naming(value, side):
            assert other not in refused(lambda pair=pair: case.run(*pair), f"`{side}` contains NaN or +inf")


def test_finite_logits_that_overflow():
    big = torch.tensor([[1e30, -1e30, 0.0]])
    refused(lambda: alpha_beta(big, -big, alpha=-0.5, beta=0.2), "`alpha` is -0.5", "`beta` is 0.2")


@pytest.mark.parametrize(
    ("parameter", "low", "high", "call"),
    [
        ("beta", 0, 1, lambda x: jensen_shannon(S, T, beta=x)),
        ("alpha", 0, 1, lambda x: skew_forward_kl(S, T, alpha=x)),
        ("alpha", 0, 1, lambda x: skew_reverse_kl(S, T, alpha=x)),
        ("mu", 0, 1, lambda x: adaptive_kl(S, T, mu=x)),
        ("t", 0, 1, lambda x: taid(S, T, t=x)),
        ("t", 0, 1, lambda x: taid_target(S, T, t=x)),
        ("lam", 0, 1, lambda x: alpha_mixture(S, T, lam=x)),
        ("start", 0, 1, lambda x: TaidSchedule(start=x)),
        ("end", 0.4, 1, lambda x: TaidSchedule(end=x)),
        ("base", 0.01, 1, lambda x: contrastive_alpha(S, 0.5, base=x)),
    ],
)
def test_parameters_outside_their_range(parameter, low, high, call):
    for value in (low - 0.01, high + 0.01, NAN, -math.inf):
        refused(lambda x=value: call(x), f"`{parameter}` is {value}", f"[{low:g}, {high:g}]")
    call(low)
    call(high)


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_skew_of_the_contrastive_pair(value):
    given = torch.tensor([[0.1], [value]])
    refused(lambda: contrastive(S, T, TEACHERS, alpha=value), "alpha", str(value)[:4], "[0, 1]")
    refused(lambda: contrastive(S, T, TEACHERS, alpha=given), "alpha", str(value)[:4], "[0, 1]")


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_parameters_that_are_no_numbers(value):
    refused(lambda: alpha_beta(S, T, alpha=value), f"`alpha` is {value}", "finite")
    refused(lambda: alpha_beta(S, T, beta=value), f"`beta` is {value}", "finite")
    refused(lambda: alpha_mixture(S, T, alpha=value), f"`alpha` is {value}", "finite")


@pytest.mark.parametrize("parameters", [(NAN, 0.5), (0.5, math.inf)])
def test_ab_parameters_that_are_no_numbers(parameters):
    refused(lambda: alpha_mixture(S, T, ab_parameters=parameters), "ab_parameters", "finite")


@pytest.mark.parametrize(("alpha", "beta"), [(-0.5, 0.7), (-0.5, 0.5), (-0.5, 0.0), (-0.5, 0.2), (-0.4, -0.3), (-1.0, 2.5)])
def test_negative_alpha_meets_a_token_that_the_teacher_excludes(alpha, beta):
    refused(lambda: alpha_beta(S, IMPOSSIBLE, alpha=alpha, beta=beta), f"`alpha` is {alpha}", f"`beta` is {beta}", ">= 0")


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, -0.5), (0.5, -0.5), (0.0, -0.5), (0.2, -0.5), (2.5, -1.0)])
def test_negative_beta_meets_a_token_that_the_student_excludes(alpha, beta):
    refused(lambda: alpha_beta(IMPOSSIBLE, T, alpha=alpha, beta=beta), f"`alpha` is {alpha}", f"`beta` is {beta}", ">= 0")


def test_kind_of_pair():
    refused(lambda: alpha_mixture(S, T, pair="pq"), "`pair` is 'pq'", "pr, rp, qr, rq")


# --- other types ----------------------------------------------------------------------------------------------------------


@ONE_VOCABULARY
def test_the_output_of_a_model_in_place_of_its_logits(case):
    refused(lambda: case.run(CausalLMOutput(logits=S), T), "`student_logits` is a CausalLMOutput", "give its `logits`")
    refused(lambda: case.run(S, CausalLMOutput(logits=T)), "`teacher_logits` is a CausalLMOutput", "give its `logits`")
    refused(lambda: case.run(S, T, temperature="2"), "`temperature` is '2'; it must be a number")


def test_outputs_of_models_elsewhere():
    output = CausalLMOutput(logits=S)
    for call in (log_probs, lambda z: cross_entropy(z, IDS)):
        refused(lambda call=call: call(output), "`logits` is a CausalLMOutput", "give its `logits`")
    refused(lambda: sorted_distance(S, output), "`teacher_logits` is a CausalLMOutput")
    refused(lambda: top_k(output, 2), "`teacher_logits` is a CausalLMOutput")
    refused(lambda: top_k(T, 2).align(output), "`student_logits` is a CausalLMOutput")
    refused(lambda: fused_divergence(forward_kl, BaseModelOutput(HIDDEN), Head(WEIGHT), TARGET), "`student_hidden` is a BaseModelOutput")


@pytest.mark.parametrize("value", ["0.5", None])
def test_parameters_of_other_types(value):
    for call, parameter in (
        (lambda: jensen_shannon(S, T, beta=value), "beta"),
        (lambda: alpha_beta(S, T, alpha=value), "alpha"),
        (lambda: contrastive(S, T, TEACHERS, alpha=value), "alpha"),
        (lambda: top_k(T, value), "k"),
    ):
        refused(call, f"`{parameter}` is {value!r}; it must be a number")


def test_ids_of_tokens():
    """Ids outside the vocabulary, ids of other positions (which torch accepts, and misreads) and of another type."""
    for call in (cross_entropy, token_log_probs, lambda z, ids: single_step(z, T, tokens=ids, log_behaviour=S[..., 0], clip=0.2)):
        for wrong in (-100, 9):
            ids = IDS.clone()
            ids[1, 2] = wrong
            refused(lambda call=call, ids=ids: call(S, ids), f"{wrong}", "[0, 8]", "which mark padding")
        refused(lambda call=call: call(S, IDS[:, 1:]), "`tokens` has shape (2, 2)", "shape (2, 3, 9)", "one int64 id per position")
        refused(lambda call=call: call(S, IDS.float()), "dtype torch.float32")
        refused(lambda call=call: call(S, IDS.tolist()), "`tokens` is a list")


# --- top-k --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k(k):
    for call in (lambda: top_k_forward_kl(S, T, k=k), lambda: top_k_reverse_kl(S, T, k=k), lambda: top_k(T, k)):
        refused(call, f"`k` is {k}", "[1, 9]")


def test_tail():
    for call in (lambda: top_k(T, 2, tail="keep"), lambda: top_k_reverse_kl(S, T, k=2, tail="keep")):
        refused(call, "`tail` is 'keep'", "`lump` or `drop`")


def test_a_lumped_tail_with_a_temperature():
    refused(lambda: top_k(T, 2).align(S, 2.0), "`temperature` is 2.0", "is known at temperature 1 only")
    refused(lambda: top_k(T, 2).align(S, 0.0), "`temperature` is 0.0", "above 0")


def test_ids_outside_the_vocabulary():
    found = top_k(T, 2)
    for shift in (9, -9):
        bad = TopK(found.ids + shift, found.log_probs, found.tail)
        refused(lambda t=bad: t.align(S), f"ids of a top-k target are from {int(bad.ids.min())} to {int(bad.ids.max())}", "[0, 8]")
    refused(lambda: TopK(found.ids[:1], found.log_probs, found.tail).align(S), "`ids` (1, 3, 2)", "`student_logits` (2, 3, 9)")
    refused(lambda: TopK(found.ids, found.log_probs[..., :1], found.tail).align(S), "`log_probs` (2, 3, 1)")


# --- mixtures -----------------------------------------------------------------------------------------------------------


def test_mixture_kind():
    refused(lambda: TargetMixture("mean", (1, 1)), "`kind` is 'mean'", "`geometric` or `arithmetic`")


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.1), (NAN, 1.0), (1.0, NAN), (math.inf, 1.0)])
def test_mixture_weights(weights):
    refused(lambda: TargetMixture("geometric", weights), f"`weights` is {weights}", ">= 0")


@pytest.mark.parametrize("drop", [-0.1, 1.0, NAN])
def test_mixture_drop(drop):
    refused(lambda: TargetMixture("geometric", (1, 1), drop), f"`drop` is {drop}", "[0, 1)")


@pytest.mark.parametrize("count", [1, 3])
def test_mixture_of_another_number_of_teachers(count):
    refused(lambda: TargetMixture("arithmetic", (1, 1)).logits([T] * count), "2 weights", f"`teacher_logits` has {count}")
    mixture = TargetMixture("arithmetic", (1, 1))
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), [TARGET] * count, mixture=mixture), "2 weights", f"{count}")


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_mixture_temperature(temperature):
    refused(lambda: TargetMixture("arithmetic", (1, 1)).logits([T, T], temperature=temperature), f"`temperature` is {temperature}")


# --- fused --------------------------------------------------------------------------------------------------------------


def test_fused_mask_of_another_shape():
    for shape in ((2, 2), (3, 2), (2, 3, 1), (6,)):
        refused(
            lambda s=shape: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), TARGET, mask=torch.ones(s)),
            f"`mask` has shape {shape}", "`student_hidden` has shape (2, 3, 4)",
        )  # fmt: skip


def test_fused_teachers_without_a_mixture():
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), [TARGET, TARGET]), "`teacher` is a list of 2 targets", "mixture")
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), []), "teacher", "at least one")


def test_fused_top_k_in_a_mixture():
    sparse = top_k(torch.ones(2, 3, 9), 2)
    mixture = TargetMixture("geometric", (1, 1))
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), [sparse, sparse], mixture=mixture), "top-k", "mixture")


@pytest.mark.parametrize("vocab", [0, -1, 10])
def test_fused_vocab(vocab):
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), TARGET, vocab=vocab), f"`vocab` is {vocab}", "from 1 to 9")


def test_fused_widths_that_differ():
    wide = Hidden(torch.ones(2, 3, 5), Head(torch.ones(11, 5)))
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), wide), "[9, 11]", "vocab", "9")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_fused_teacher_of_other_tokens(masked, kind):
    target = Hidden(torch.ones(2, 4, 5), TARGET.head) if kind == "hidden" else torch.ones(2, 4, 9)
    mask = torch.ones(2, 3, dtype=torch.bool) if masked else None
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), target, mask=mask), "teacher", "student_hidden")


def test_fused_hidden_states_that_are_no_numbers():
    bad = HIDDEN.clone()
    bad[1, 2, 0] = NAN
    message = refused(lambda: fused_divergence(reverse_kl, bad, Head(WEIGHT), TARGET), "`student_hidden` contains NaN")
    assert "student_head" not in message
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False  # what is masked is not computed, so its NaN does no harm
    assert torch.isfinite(fused_divergence(reverse_kl, bad, Head(WEIGHT), TARGET, mask=mask)[1]).all()


@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf])
def test_heads_that_are_no_numbers(wrong):
    """With a row of -inf, the message said that the divergence overflows."""
    states = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(2, 3, 4)
    target, broken = Hidden(states, Head(WEIGHT)), WEIGHT.clone()
    broken[3] = wrong
    refused(
        lambda: fused_divergence(reverse_kl, states, Head(broken), target), "row 3 of `student_head` contains NaN or infinity", "finite"
    )
    broken[1, 1] = wrong
    refused(
        lambda: fused_divergence(reverse_kl, states, Head(WEIGHT), Hidden(states, Head(broken))), "row 1 (and 1 more) of the teacher's head"
    )
    hidden = states.clone()
    hidden[0, 0, :2] = wrong
    varied = Head(torch.arange(36.0).view(9, 4).sin())
    refused(lambda: fused_divergence(reverse_kl, hidden, varied, target), "`student_hidden` contains NaN or infinity")


@pytest.mark.parametrize("kind", ["student", "teacher", "logits"])
def test_rows_that_are_not_used_are_not_blamed(kind):
    """The message named a row beyond `vocab`, on which nothing depends."""

    def own(student, teacher, *, temperature=1.0):
        return (student - teacher).sum(-1) * NAN

    broken = WEIGHT.clone()
    broken[7] = NAN
    target = {
        "student": TARGET,
        "teacher": Hidden(HIDDEN, Head(broken)),
        "logits": torch.ones(2, 3, 9).index_fill(-1, torch.tensor(7), NAN),
    }
    head = Head(broken if kind == "student" else WEIGHT)
    refused(lambda: fused_divergence(own, HIDDEN, head, target[kind], vocab=6), "the divergence of student_hidden and teacher overflows")


def test_an_attribute_of_a_loss_of_ones_own_is_no_setting():
    class Own:
        keywords = ("first", "second")

        def __call__(self, student, teacher, *, temperature=1.0):
            return (student - teacher).abs().sum(-1)

    assert fused_divergence(Own(), HIDDEN, Head(WEIGHT), TARGET)[1].isfinite().all()


def test_a_bias_that_is_no_number():
    bias = torch.zeros(len(WEIGHT))
    bias[2] = -math.inf  # a token without probability
    for divergence in (forward_kl, jensen_shannon):
        assert fused_divergence(divergence, HIDDEN, Head(WEIGHT, bias), Hidden(HIDDEN, Head(WEIGHT, bias)))[1].isfinite().all()
    bias[4] = math.inf
    refused(lambda: fused_divergence(reverse_kl, HIDDEN, Head(WEIGHT, bias), TARGET), "row 4 of `student_head`")


def test_tensors_that_are_no_values_of_tokens():
    """A setting with a number for each token of the vocabulary was cut like values of tokens if the text had as many positions."""

    def own(student, teacher, *, rare, temperature=1.0):
        return (rare * (student - teacher).abs()).sum(-1)

    rare = torch.rand(len(WEIGHT))
    states = torch.randn(len(WEIGHT), HIDDEN.shape[-1])  # as many positions as the vocabulary has tokens
    _, values = fused_divergence(partial(own, rare=rare), states, Head(WEIGHT), Hidden(states.roll(1, 0), Head(WEIGHT)))
    expected = own(states @ WEIGHT.T, states.roll(1, 0) @ WEIGHT.T, rare=rare)
    assert torch.allclose(values, expected, atol=1e-5)
    words = ("`rare` has shape (9,), but the tokens have shape (2, 3)", "functools.partial(divergence, rare=...)")
    refused(lambda: fused_divergence(own, HIDDEN, Head(WEIGHT), TARGET, rare=rare), *words)
    learnt = rare.clone().requires_grad_()
    refused(lambda: fused_divergence(partial(own, rare=learnt), HIDDEN, Head(WEIGHT), TARGET), "`rare` needs a gradient")


def test_fused_teachers_that_are_no_numbers():
    bad = torch.ones(2, 3, 5)
    bad[0, 1, 2] = NAN
    refused(lambda: fused_divergence(reverse_kl, HIDDEN, Head(WEIGHT), Hidden(bad, TARGET.head)), "teacher", "NaN")


def test_fused_parameters_of_the_divergence():
    refused(lambda: fused_divergence(jensen_shannon, HIDDEN, Head(WEIGHT), TARGET, beta=1.5), "`beta` is 1.5", "[0, 1]")
    refused(lambda: fused_divergence(forward_kl, HIDDEN, Head(WEIGHT), TARGET, temperature=0.0), "`temperature` is 0.0")


def test_tensors_per_token():
    """`from_teacher` and `alpha` of other shapes were broadcast against the vocabulary's or the text's axis without a word."""
    for call in (contrastive, lambda *z, **p: fused_divergence(contrastive, HIDDEN, Head(WEIGHT), TARGET, **p)):
        of = (S, T) if call is contrastive else ()
        refused(lambda call=call, of=of: call(*of, from_teacher=TEACHERS.unsqueeze(-1)), "`from_teacher` has shape (2, 1, 1)")
        refused(lambda call=call, of=of: call(*of, from_teacher=TEACHERS.long()), "`from_teacher` has dtype torch.int64", ".bool()")
        refused(lambda call=call, of=of: call(*of, from_teacher=TEACHERS, alpha=torch.full((4,), 0.1)), "`alpha` has shape (4,)")


def test_texts_of_minillm():
    log_q, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    refused(lambda: policy_gradient(log_q, log_q, log_q, clip=0.2, clipping="Ratio"), "`clipping` is 'Ratio'", "`ratio` or `ppo`")
    refused(lambda: policy_gradient(log_q, log_q, log_q, clip=-1), "`clip` is -1")
    refused(lambda: clipped_ratio(log_q, log_q, clip=NAN), "`clip` is nan")
    refused(lambda: returns(log_q, mask, length_normalisation="foo"), "`length_normalisation` is 'foo'", "`none`")
    for call in (returns, moments):
        refused(lambda call=call: call(log_q, mask.long()), "`mask_BT` has dtype torch.int64")


def test_numbers_of_one_value():
    refused(lambda: jensen_shannon(S, T, beta=torch.full((2, 3), 0.5)), "`beta` is a tensor of shape (2, 3)", "one number")
    for below in (0, -1, 2):
        refused(lambda below=below: no_teacher(torch.zeros(3), below=below), f"`below` is {below}")


def test_weights_and_gradients_of_the_fused_loss():
    run = partial(fused_divergence, forward_kl, HIDDEN, Head(WEIGHT), TARGET)
    empty = torch.zeros(2, 3)
    refused(lambda: run(mask=empty / empty.sum()), "`mask` contains NaN", "clamp(min=1)")
    refused(lambda: run(mask=[[1.0] * 3] * 2), "`mask` is a list")
    learned = torch.ones(2, 3, requires_grad=True)
    refused(lambda: run(mask=learned), "`mask` needs a gradient", "`mask.detach()`")
    refused(lambda: run(temperature=torch.tensor(2.0, requires_grad=True)), "`temperature` needs a gradient")
    with torch.no_grad():
        assert torch.isfinite(run(mask=learned)[0])
