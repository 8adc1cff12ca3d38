"""A model beside others on the same texts: KL to the original teacher, the chain's error budget, exposure bias.

The error budget of a path T > A1 > … > Ak > q takes KL(q ‖ p_T) apart without remainder,

    KL(q ‖ p_T) = KL(q ‖ p_Ak) + E_q[log p_Ak - log p_A(k-1)] + … + E_q[log p_A1 - log p_T],

where each hop is KL(q ‖ its upper model) - KL(q ‖ its lower model): what training minimised, and what each hop adds (it may take
away, too). All are means over the tokens of the student's own answers, exact over the vocabulary.

Exposure bias is MiniLLM's (arXiv:2306.08543, section 3.4): the student's error KL(p ‖ q) before each token, on prefixes that
the student sampled beside prefixes that the teacher sampled. A position averages the answers that are that long; the released
code counts those that ended as without error, and starts at the second token.
"""

from collections.abc import Sequence as Seq
from itertools import pairwise

import numpy as np
from transformers import PreTrainedModel

from tadistill.data.batch import references
from tadistill.evaluation.run import Answers, EvalSet
from tadistill.evaluation.scoring import Subject, divergences, means

Exposure = dict[str, dict[str, list[float]]]
"""student and teacher -> kl (mean at each position) and count (answers that are that long)."""


def analyse(
    subject: Subject,
    data: EvalSet,
    answers: Answers,
    teacher_answers: Answers,
    *,
    teacher: PreTrainedModel,
    assistants: Seq[PreTrainedModel] = (),
    batch: int,
) -> tuple[dict[str, list[list[float]]], Exposure]:
    """Scores of one set beside the original teacher, and the exposure curves.

    Args:
        answers: the subject's own; teacher_answers: the teacher's to the same prompts.
        assistants: the models of the path between teacher and subject, from the teacher's end.

    Returns:
        {metric: [prompt][decoding seed]} with forward_kl (on the references), reverse_kl (on the subject's own answers) and, with
        assistants, budget/0, budget/1, … in the order of the sum above; and the exposure curves.
    """
    (on_references,) = divergences(subject, references(data.encoded), [teacher], batch=batch)
    columns: dict[str, list[np.ndarray]] = {}
    of_student: list[np.ndarray] = []
    for of_seed in answers.values():
        beside = divergences(subject, of_seed, [teacher, *assistants], batch=batch)
        of_student += beside[0]["forward_kl"]
        kl = [means(found["reverse_kl"]) for found in beside]
        columns.setdefault("reverse_kl", []).append(kl[0])
        if assistants:
            budget = [kl[-1], *(upper - lower for lower, upper in pairwise(reversed(kl)))]
            for j, term in enumerate(budget):
                columns.setdefault(f"budget/{j}", []).append(term)
    scores = {"forward_kl": means(on_references["forward_kl"])[:, None].tolist()}
    scores |= {name: np.stack(column, axis=1).tolist() for name, column in columns.items()}
    of_teacher = [
        kl for of_seed in teacher_answers.values() for kl in divergences(subject, of_seed, [teacher], batch=batch)[0]["forward_kl"]
    ]
    return scores, {"student": _by_position(of_student), "teacher": _by_position(of_teacher)}


def _by_position(per_token: Seq[np.ndarray]) -> dict[str, list[float]]:
    """Means over the sequences that reach a position, and how many do."""
    total, count = (np.zeros(max(map(len, per_token))) for _ in range(2))
    for values in per_token:
        total[: len(values)] += values
        count[: len(values)] += 1
    return {"kl": (total / count).tolist(), "count": count.tolist()}
