"""What MiniLLM's released code spends, from its call graph (sampler.py and trainer.py of microsoft/LMOps/minillm). Imports no torch."""


def minillm_flops(student: float, teacher: float, *, length: float, corpus: float, epochs: int) -> float:
    """FLOPs for one rollout.

    For every rollout the code traverses the student five times and the teacher four times: sampling from the mixture (both), the teacher's
    reward, the student's log-probabilities, a second generation by the student alone with a teacher and a student pass over it (for
    logging), and once more both over the rollout. In each inner epoch the student runs forward and backward on rollout and plain text,
    and the teacher forward on both.

    Args:
        student, teacher: forward FLOPs per token, head included (2 x parameters in the usual estimate).
        length: tokens of a rollout with its prompt; corpus: tokens of a row of plain text, 0 without.
        epochs: PPO epochs on each rollout.
    """
    trained = epochs * (length + corpus)
    return student * (5 * length + 3 * trained) + teacher * (4 * length + trained)
