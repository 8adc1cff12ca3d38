"""Draws docs/pictures/objectives.png: how each objective fits a student that is too small for its teacher.

Run `python docs/draw_objectives.py` (needs matplotlib, which tadistill itself does not). The teacher is a mixture of two humps over 60
tokens. The student is one discretised Gaussian with two parameters, mean and width. Every fit minimises a function of
`tadistill.objectives` from many starts at once and keeps the lowest result.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from tadistill import objectives as ours

torch.set_num_threads(1)
V, STEPS = 60, 400
TOKENS = torch.arange(V, dtype=torch.float64)
GREY, BLUE = "0.78", "#0072B2"
Objective = Callable[[Tensor, Tensor], Tensor]

FITTED: dict[str, Objective] = {
    "forward_kl": ours.forward_kl,
    "skew_forward_kl, α = 0.1": ours.skew_forward_kl,
    "alpha_mixture, α = −5, λ = 0.5": ours.alpha_mixture,
    "jeffreys": ours.jeffreys,
    "adaptive_kl, μ = 0.5": ours.adaptive_kl,
    "alpha_beta, α = β = 0.5": partial(ours.alpha_beta, alpha=0.5, beta=0.5),
    "alpha_beta, α = 0.2, β = 0.7": ours.alpha_beta,
    "jensen_shannon, β = 0.1": partial(ours.jensen_shannon, beta=0.1),
    "jensen_shannon, β = 0.5": ours.jensen_shannon,
    "total_variation": ours.total_variation,
    "skew_reverse_kl, α = 0.1": ours.skew_reverse_kl,
    "reverse_kl": ours.reverse_kl,
}
# name: objective, Okabe-Ito colour, where the label goes (x, y, alignment)
PULLING: dict[str, tuple[Objective, str, tuple[float, float, str]]] = {
    "forward_kl": (ours.forward_kl, "#D55E00", (2.1, 8.5, "right")),
    "skew_forward_kl, α = 0.1": (ours.skew_forward_kl, "#E69F00", (5.95, 8.4, "right")),
    "reverse_kl": (ours.reverse_kl, "#0072B2", (4.7, 3.4, "left")),
    "skew_reverse_kl, α = 0.1": (ours.skew_reverse_kl, "#56B4E9", (-5.9, -2.2, "left")),
    "jensen_shannon, β = 0.5": (ours.jensen_shannon, "#009E73", (-5.9, 0.3, "left")),
    "total_variation": (ours.total_variation, "black", (5.95, 0.2, "right")),
}


def humps() -> Tensor:
    """Return the teacher's logits: 60 % around token 18, 40 % around token 42, and a little everywhere."""
    humps = [w * torch.softmax(-((TOKENS - m) ** 2) / (2 * s**2), -1) for w, m, s in [(0.6, 18, 3.0), (0.4, 42, 4.0)]]
    return (0.995 * sum(humps) + 0.005 / V).log()


def fit(objective: Objective, teacher: Tensor) -> tuple[Tensor, float]:
    """Return the student's probabilities at the best of 21 starts, and its standard deviation."""
    mean = torch.linspace(12, 48, 7, dtype=torch.float64).repeat(3).requires_grad_()
    width = torch.tensor([2.5, 5.0, 12.0], dtype=torch.float64).repeat_interleave(7).log().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [mean], "lr": 0.6}, {"params": [width], "lr": 0.06}])
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS + 1):
        logits = -((TOKENS - mean.unsqueeze(-1)) ** 2) / (2 * width.exp().unsqueeze(-1) ** 2)
        values = objective(logits, teacher.expand_as(logits))
        if step < STEPS:
            optimizer.zero_grad()
            values.sum().backward()
            optimizer.step()
            decay.step()
    q = logits[values.argmin()].detach().softmax(-1)
    return q, math.sqrt(float((q * (TOKENS - (q * TOKENS).sum()) ** 2).sum()))


def pull(objective: Objective, ratios: Tensor) -> Tensor:
    """Return the push on one rare token's logit, per unit of the student's probability, where p/q of that token is exp(ratio)."""
    rest = torch.zeros(len(ratios), 2, dtype=torch.float64)
    student = torch.cat([rest, torch.full_like(ratios, -14.0).unsqueeze(-1)], -1).requires_grad_()
    teacher = torch.cat([rest, (ratios - 14.0).unsqueeze(-1)], -1)
    (slope,) = torch.autograd.grad(objective(student, teacher).sum(), student)
    return -slope[:, -1] / student.detach().softmax(-1)[:, -1]


def main() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    teacher = humps()
    fits = sorted(((name, *fit(objective, teacher)) for name, objective in FITTED.items()), key=lambda found: -found[2])
    figure = plt.figure(figsize=(10, 9.4), dpi=150, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.05, 1])
    above.suptitle("One Gaussian fitted to a teacher with two modes, from the widest fit to the narrowest", fontsize=12, fontweight="bold")
    for i, (axis, (name, q, spread)) in enumerate(zip(above.subplots(3, 4, sharex=True, sharey=True).flat, fits, strict=True)):
        axis.fill_between(TOKENS, teacher.softmax(-1), color=GREY, lw=0)
        axis.plot(TOKENS, q, color=BLUE, lw=2)
        axis.set_title(name, fontsize=10)
        axis.text(59, 0.125, f"σ = {spread:.1f}", ha="right", va="top")
        axis.set(ylim=(0, 0.14), xticks=[0, 30, 59], yticks=[0, 0.1])
        if i == 0:
            axis.text(22.5, 0.07, "teacher", color="0.4")
            axis.text(44, 0.045, "student", color=BLUE)
        if i >= 8:
            axis.set_xlabel("token")
    axis = below.subplots()
    below.suptitle("How hard a token is pulled up, per unit of the student's probability", fontsize=12, fontweight="bold")
    ratios = torch.linspace(-6, 6, 401, dtype=torch.float64)
    for name, (objective, colour, place) in PULLING.items():
        axis.plot(ratios, pull(objective, ratios), color=colour, lw=2)
        axis.text(*place[:2], name, color=colour, fontweight="bold", ha=place[2])
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(xlim=(-6, 6), ylim=(-4, 9.5), ylabel="pull")
    axis.set_xlabel("log p − log q of the token  (left: the student overrates it, right: it underrates it)")
    target = Path(__file__).parent / "pictures" / "objectives.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target)
    print(*(f"{name:32} {spread:6.2f}" for name, _, spread in fits), f"wrote {target.name}", sep="\n")


if __name__ == "__main__":
    main()
