"""The glossary of reports and documentation, with one sentence per word.

The report shows a sentence when the mouse is over its word. `docs/reference/glossary.md` lists all of them.
"""

from tadistill.metrics import METRICS, PERCENT, POINTS

GLOSSARY: dict[str, str] = {
    "study": "Everything that one recipe describes: its arms, trained and evaluated with the same data and seeds.",
    "arm": "One way to get a student: a path of models and a method, repeated with every training seed.",
    "teacher": "The big model that the others learn from.",
    "student": "The small model that the study is about.",
    "assistant": "A teacher assistant (TA): a model of middle size that first learns from the teacher and then teaches the student.",
    "path": "The models from the teacher to the student, such as xl > l > s; each > is one distillation.",
    "route": "Several teachers at the start of a path, such as m on maths + xl on chat; each teaches on its own training sets.",
    "pruned": "Cut out of a bigger model: the initial weights are a part of that model's weights. Fine-tuning and distillation follow.",
    "on-policy": "Trained on text that the student itself samples during its training.",
    "direct": "Distillation from the teacher to the student without an assistant.",
    "chain": "A path from the teacher through at least one assistant to the student.",
    "x direct": "The FLOPs of an arm, divided by those of the direct arm with the same student and method.",
    "step of a path": "One distillation of a path, from one model to the next.",
    "phase": "A part of a distillation with its own method and share of the updates; the next phase starts from its weights.",
    "equal-compute baseline": "A direct arm that trains longer, so that it costs as many FLOPs as the path through assistants.",
    "control": "An arm that shows what another arm gains from its assistant, and what it would gain without it.",
    "tempered": "A control: the teacher itself teaches, at a temperature that gives it the assistant's mean entropy.",
    "random_teacher": "A control: a teacher with random weights teaches.",
    "SFT": "Supervised fine-tuning: training on the answers of the data set, without a teacher.",
    "seed": "The number from which random draws start; each training seed gives one trained model, each decoding seed one set of answers.",
    "decoding seed": "The number from which the draws of one set of answers start; it changes answers, not the model.",
    "95 % interval": "A range that contains the true value in 95 of 100 such studies; more seeds and prompts make it shorter.",
    "verdict": "The result of comparing two arms: clearly better, clearly worse, equivalent or undecided.",
    "caution": "A sentence of a report that limits what its numbers show, such as too few training seeds.",
    "clearly": "The 95 % interval excludes 0, also after adjustment for the number of comparisons, with at least three training seeds.",
    "undecided": "The data neither show a difference nor exclude one; more seeds or prompts may decide it.",
    "equivalent": "The true difference is significantly smaller than the margin of the recipe.",
    "margin": "A difference that is too small to matter, as the recipe sets it.",
    "paired difference": "The difference of two arms on the same prompts and training seeds; pairing makes the difference more precise.",
    "p": "The probability of a difference at least this large if the true difference were 0.",
    "Holm": "Holm's method: p-values corrected for the number of comparisons, so that the chance of any false claim is below 5 %.",
    "sign-flip test": "An exact test over training seeds: the differences get every pattern of signs, and p is the share of "
    "patterns whose sum is at least as far from 0 as the observed sum.",
    "power": "The probability that a study of this size finds a true difference of a given size.",
    "detectable": "The smallest true difference that a study of this size would find with a probability of 80 %.",
    "FLOPs": "Floating-point operations of the training of one seed, assistants included; the measure of compute.",
    "compute": "The FLOPs of all training that this study needs for an arm's model, including the training of its teachers. Often "
    "given as a multiple of direct distillation of the same model.",
    "nats/token": "The unit of losses and divergences: natural logarithms, per token.",
    "KL": "The Kullback-Leibler divergence, which says how far one distribution lies from another; 0 if they are equal.",
    "KL(student ‖ teacher)": "The reverse KL divergence of student and teacher on the student's own answers; 0 for equal models.",
    "KL(teacher ‖ student)": "The forward KL divergence of student and teacher on the reference answers; 0 for equal models.",
    "bits per byte of the teacher's answers": "Bits per byte of the student on answers that the teacher writes.",
    "extra bits per byte of the teacher's answers": "The student's bits per byte on the teacher's answers, minus the teacher's.",
    "teacher's bits per byte of its answers": "Bits per byte of the teacher on answers that the student writes.",
    "extra teacher's bits per byte of its answers": "The teacher's bits per byte on the student's answers, minus the student's.",
    "bridge": "An assistant with the student's tokenizer, taught by a model with another tokenizer. The student then learns "
    "only from teachers with its own tokenizer.",
    "teacher tokens": "The answer tokens that the original teacher writes or scores for an arm.",
    "bits per byte": "-log2 of the probability of a text and its end, divided by its bytes; comparable between tokenizers.",
    "error budget": "The parts of a path's KL(student ‖ teacher): the divergence from the last assistant, and what each step "
    "above this assistant adds.",
    "entropy": "How undecided a model is about the next token; 0 if it always has one choice.",
    "sharpening": "A higher score from lower entropy alone: it vanishes with greedy decoding or at equal entropy.",
    "entropy plane": "A figure of score against entropy. An arm is a curve over decoding temperatures; sharpening alone moves along it.",
    "matched entropy": "Both arms are decoded at temperatures that give the same entropy, so that sharpening cannot help one of them.",
    "t0.5": "Decoding at temperature 0.5, which a recipe in the long form also measures (`evaluate.also`).",
    "greedy": "Decoding that always takes the most likely token.",
    "sampled": "Decoding that draws tokens from the model's distribution.",
    "exposure bias": "The extra error of a student on its own answers, in per cent of the error on the teacher's answers (ExAccErr).",
    "calibration": "How well the confidence of a model agrees with the share of its correct predictions.",
    "ECE": "Expected calibration error: the mean gap between confidence and share of correct predictions, in percentage points.",
    "dev": "The data set that chooses checkpoints; test sets choose nothing.",
    "rollout": "Answers that a model samples during training.",
    "selection": "Measuring the checkpoints of a training on dev, so that the best one can be kept.",
    "watching": "Measuring answers of the student during its training. It changes no weights, and no comparison of compute counts it.",
    "store": "The folder with all finished stages, which studies share, so that no stage runs twice.",
    "tinyworld": "The data set that is a part of tadistill: questions and answers about people in a small invented world.",
    "~>": "A step of a path between two models with different tokenizers.",
    "stage": "One step of a study that the store keeps: a training, an evaluation or an analysis.",
    "fact accuracy": "The share of a prompt's facts that the answer states without a listed wrong value; most prompts ask for one fact.",
    "numeric accuracy": "The share of answers whose final number is the right number.",
    "choice accuracy": "The share of answers that choose the right letter or label word.",
    "math accuracy": "The share of answers whose final expression equals the right one, by the library math-verify.",
    "checks passed": "The share of answers that pass all checks of their row, such as a largest number of words.",
    "pass@k": "The chance that at least one of k sampled answers is right, estimated from all answers to a prompt (Chen et al. 2021).",
    "task score": "The first metric of a task of lm-eval; for most tasks, it is the share of right answers.",
    "ROUGE-L": "The overlap of an answer with the reference: the F-score of their longest common sequence of words.",
    "ROUGE-L (all scripts)": "ROUGE-L over the letters of every script, not only a-z.",
    "exact match": "The share of answers that equal a reference.",
    "label accuracy": "The share of prompts for which the model gives the right label the highest probability.",
    "reference loss": "The mean cross-entropy of the reference answers.",
    "perplexity": "The exponential of the reference loss per token.",
    "self-BLEU": "The similarity of a model's answers to the same prompt; high values mean little variety.",
    "repeated 4-grams": "The share of sequences of four tokens that an answer repeats.",
    "distinct 1-grams": "The share of different words among all words of a model's answers.",
    "distinct 2-grams": "The share of different pairs of words among all pairs of a model's answers.",
    "distinct 4-grams": "The share of different sequences of four words among all such sequences in a model's answers.",
    "calibration error of tokens": "The expected calibration error (ECE) of the predicted next token, on the reference answers.",
    "calibration error of labels": "ECE of the chosen label.",
    "answer length": "The number of tokens of an answer.",
}
"""Word -> one sentence."""
ALIASES = {
    "TA": "assistant",
    "teacher assistant": "assistant",
    "clear": "clearly",
    "clearly better": "clearly",
    "clearly worse": "clearly",
    "no evidence": "undecided",
    "interval": "95 % interval",
    "confidence interval": "95 % interval",
    "paired": "paired difference",
    "twin": "equal-compute baseline",
}
"""Other words for words of the glossary."""


def metric_text(name: str) -> str:
    """Return the meaning of a metric with its range and its direction, such as ``… From 0 to 100 %; higher is better.``"""
    metric = METRICS[name.partition("@")[0].partition("/")[0]]
    meaning = GLOSSARY.get(metric.title, f"{metric.title}, a metric of this study's own code.")
    sign = " %" if metric.unit == PERCENT else ""
    reach = f"from 0 to 100{sign}" if metric.unit in (PERCENT, POINTS) else f"in {metric.unit}" if metric.unit else ""
    better = f"{metric.better} is better" if metric.better else ""
    facts = "; ".join(filter(None, (reach, better))).rstrip(".")
    return f"{meaning} {facts[0].upper()}{facts[1:]}." if facts else meaning
