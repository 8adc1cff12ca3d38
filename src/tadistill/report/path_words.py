"""Describe in words how an arm makes its student, from its path, its method, and the text that it trains on.

path                              words
xl > l > s                        taught by xl through l
xl > l then xl > s, s from l      pruned from l, then taught by xl
l > s then xl > s                 taught by l, then by xl
xl > m > s, dense                 taught by xl and m together
s > s, context                    taught by itself with a context
s > s, context, ema               taught by its moving average with a context
m on maths + xl on chat > s       taught by m on maths and xl on chat
xl > s, control no_teacher of d   trained without a teacher (control of d)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tadistill.config.arm import Control, flat, is_route, path_text, teachers_of
from tadistill.constants import misses_budget
from tadistill.results.collect import Results
from tadistill.results.number_text import parameters_text
from tadistill.results.study import ArmRecord, PhaseRecord
from tadistill.text import listed

_TEXTS = {
    "dataset": "the training data",
    "teacher": "the teacher's answers",
    "student": "its own answers",
    "student, recorded": "its own answers, written before training",
    "teacher_mixed": "answers that teacher and student write together",
    "speculative": "its own answers, corrected by the teacher",
    "mix": "the training data and its own answers",
    "replay": "the training data and a buffer of its own answers",
    "pair": "the teacher's and its own answers",
}


@dataclass(frozen=True)
class Route:
    """An arm's path, parsed from its text. `parts` are the paths between the words `then`. In a part, each model teaches the next one."""

    parts: tuple[tuple[str, ...], ...]
    starts: Mapping[str, str]
    """Maps a model to the model from which it is pruned. The initial weights of the pruned model are a part of the weights of the other."""
    dense: bool
    """True if each model learns from all models before it in its part."""
    context: bool = False
    """True if the teachers have prompts of their own."""
    ema: bool = False
    """True if the teacher is a moving average of the student."""
    control: Control | None = None
    """The kind of control, and the arm to which the control belongs. None if the arm is not a control."""

    @property
    def learners(self) -> set[str]:
        """The models that learn from a teacher."""
        return {model for part in self.parts for model in part[1:]}

    def above(self, part: tuple[str, ...], at: int) -> tuple[str, ...]:
        """Return the elements of a part that teach the model at place `at`."""
        return part[:at] if self.dense else part[at - 1 : at]

    def teachers(self, model: str) -> list[tuple[str, ...]]:
        """Return the teachers of a model: one tuple of teachers for each of its distillations, in order."""
        places = ((part, at) for part in self.parts for at, name in enumerate(part) if at and name == model)
        return [flat(self.above(part, at)) for part, at in places]


def route(arm: ArmRecord) -> Route:
    """Parse the text of an arm's path."""
    if arm.path_text == path_text(arm.path):  # names of models may contain commas
        return Route((arm.path,), {}, dense=False)
    text, *marks = arm.path_text.split(", ")
    pairs = [mark.split(" from ", 1) for mark in marks if " from " in mark]
    parts = tuple(tuple(part.split(" > ")) for part in text.split(" then "))
    return Route(parts, dict(pairs), "dense" in marks, "context" in marks, "ema" in marks, arm.control)


def taught(arm: ArmRecord) -> str:
    """Say in a few words how an arm with a teacher makes its model, such as "pruned from l, then taught by xl"."""
    found = route(arm)
    if found.control:
        return found.control.words
    if len(found.parts) == 1 and not found.dense:
        first, *through, last = found.parts[0]
        itself = "its moving average" if found.ema else "itself"
        who = itself if first == last else in_words(first)
        how = f"taught by {who}{f' through {listed(through)}' if through and first != last else ''}"
    else:
        each = [found.above(part, part.index(arm.model)) for part in found.parts if arm.model in part[1:]]
        how = f"taught {', then '.join(map(_by, each))}"
    how += " with a context" if found.context else ""
    start = found.starts.get(arm.model)
    return f"pruned from {start}, then {how}" if start else how


def steps(arm: ArmRecord) -> str:
    """Return all steps of an arm's path, such as "xl teaches l; s is pruned from l; xl teaches s"."""
    found, said, begun = route(arm), [], set()
    if found.control:
        return f"{arm.model} is {found.control.words}"
    for part in found.parts:
        for at, model in enumerate(part[1:], start=1):
            if model in found.starts and model not in begun:
                said.append(f"{model} is pruned from {found.starts[model]}")
            begun.add(model)
            teachers = found.above(part, at)
            learner = "itself" if teachers == (model,) else model
            phases = f" in {len(arm.phases)} phases" if arm.is_phased and model == arm.model else ""
            how = f"{phases}{' with a context' * found.context}"
            if found.ema and teachers == (model,):
                said.append(f"the moving average of {model} teaches {model}{how}")
            else:
                alone = len(flat(teachers)) == 1
                said.append(f"{listed([*map(in_words, teachers)])} teach{'es' if alone else ''} {learner}{how}")
    return "; ".join(said)


def _by(teachers: Sequence[str]) -> str:
    return f"by {listed([*map(in_words, teachers)])}{' together' if len(teachers) > 1 else ''}"


def arm_words(results: Results) -> dict[str, str]:
    """Describe each trained arm in a few words, such as "taught by xl through l". The keys of the result are the names of the arms.

    If an arm trains on another kind of text than most arms, its description names this text. If two arms would have the same description,
    their descriptions also name the objectives.
    """
    arms = [arm for arm in results.plan.arms if arm.is_trained]
    distilled = [arm for arm in arms if arm.is_taught]
    usual = Counter(_sampler(arm) for arm in distilled if not arm.is_phased).most_common(1)
    found = {arm.name: _words(arm, usual[0][0] if usual else "") for arm in arms}
    twins = Counter((arm.model, found[arm.name], arm.compute) for arm in distilled)
    alike = {arm.name for arm in distilled if twins[arm.model, found[arm.name], arm.compute] > 1 and not arm.is_phased}
    objective = {arm.name: f", {arm.method.partition(' ')[0]}" if arm.name in alike else "" for arm in arms}
    return {arm.name: f"{found[arm.name]}{objective[arm.name]}{_budget(arm)}" for arm in arms}


def _sampler(arm: ArmRecord) -> str:
    return arm.method.partition(" (")[2].rstrip(")")


def _words(arm: ArmRecord, usual: str) -> str:
    if not arm.is_taught:
        return "plain fine-tuning, continued" if arm.method.endswith("continued") else "plain fine-tuning"
    if arm.is_phased:
        return f"{taught(arm)} in {len(arm.phases)} phases: {', then '.join(_phase(phase, arm.path[-2]) for phase in arm.phases)}"
    if not arm.is_plain:
        return taught(arm)
    assistants = arm.path[1:-1]
    texts = _TEXTS.get(_sampler(arm), "").replace("the teacher's", f"{arm.path[-2]}'s")
    if arm.method.startswith("cross_entropy"):
        return f"fine-tuned on {texts}{f' through {listed(assistants)}' if assistants else ''}"
    return f"{taught(arm)}{f' on {texts}' if texts and _sampler(arm) != usual else ''}"


def _phase(phase: PhaseRecord, teacher: str) -> str:
    text = _TEXTS.get(phase.sampler, phase.sampler).replace("the teacher's", f"{teacher}'s")
    how = "fine-tuned" if phase.objective.startswith("cross_entropy") else phase.objective
    return f"{how} on {text}{f' ({phase.settings})' if phase.settings else ''}"


def _budget(arm: ArmRecord) -> str:
    if not arm.compute:
        return ""
    times, _, other = arm.compute.partition(" ")
    if arm.of_budget and misses_budget(arm.of_budget):
        return f", with {float(times.rstrip('x') if times != 'as' else 1) * arm.of_budget:.2g} times {other}'s compute"
    return f", with {other}'s compute" if times == "as" else f", with {times.rstrip('x')} times {other}'s compute"


def ways_text(arms: Sequence[ArmRecord]) -> str:
    """Name what the arms have in common: "ways to use an assistant" if all arms have assistants, else "ways to distil"."""
    return "ways to use an assistant" if all(arm.assistants for arm in arms) else "ways to distil"


def in_words(name: str) -> str:
    """Return an element of a path as text: the name of a model, or several first teachers such as "m on maths and xl on chat"."""
    return listed([f"{teacher} on {name}" for name, teacher in teachers_of(name).items()]) if is_route(name) else name


def sized(results: Results, model: str, *, words: bool = False) -> str:
    """Return the name of a model with its number of parameters: ``s (23.8 k)``, or ``s (23.8 k parameters)`` if `words` is True."""
    if model not in results.plan.parameters:  # several first teachers, such as `m on maths + xl on chat`
        return in_words(model)
    count = parameters_text(results.plan.parameters[model])
    return f"{model} ({count} parameters)" if words else f"{model} ({count})"


def hop_text(models: tuple[str, ...], j: int) -> str:
    """Return step `j` of a path as text, such as ``xl > l``. `j` counts from the end of the path: step 0 trains the student."""
    return path_text((models[-2 - j], models[-1 - j]))


def some(names: Sequence[str]) -> str:
    """Return names as text, such as "a, b and c". If there are more than three, the rest is a number: "a, b, c and 2 more"."""
    return listed([*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else names)
