"""Monitor a training without changing it: count its tokens and FLOPs, and measure the text that the student samples.

The loss does not show that sampled text becomes short or repeats itself. The reverse KL may even fall meanwhile, as in MiniLLM's ablation
without length normalisation. If the text gets worse, alarms say what to change.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill import objectives
from tadistill.constants import WATCHED_ROWS
from tadistill.data.batch import Batch
from tadistill.data.rows import repeated_grams
from tadistill.models.flops_and_memory import CostPart
from tadistill.models.forward import is_packed
from tadistill.models.modify import adapters_in
from tadistill.models.parameter_counts import Size, Work, forward_flops, size_of, training_flops, with_adapters
from tadistill.models.teachers import HiddenTeacher, Teacher, nothing
from tadistill.objectives import Head
from tadistill.objectives.fused_loss import heads_watched
from tadistill.rollout.decoder import cache_name, tokens_in
from tadistill.rollout.draw import difference
from tadistill.train import spans
from tadistill.train.step import Step, mixture_of

_TOP = 10  # `teacher_top_mass` is the probability of this number of tokens


class _Side:
    def __init__(self, name: str, model: PreTrainedModel):
        self.name, self.model, self.adapters, self.memory = name, model, adapters_in(model), cache_name(model)
        size = size_of(model.config.get_text_config().to_dict())
        self.size = None if size is None else with_adapters(size, self.adapters)
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        self.head = head


class Meter:
    """A counter for the tokens and FLOPs of a student and its teachers, separately for each part of the work, such as sampling.

        meter = Meter(student, (teacher,))
        with meter.counting(), meter.timed("sampling"):
            ...                                     # counts every call of a model and every fused head
        meter.state()                               # plain numbers, for a checkpoint and for the manifest

    Counting uses only the shapes of tensors, so it never waits for the GPU. Matrix products with weights and attention are counted; norms,
    softmax, rotary tables, the optimizer and vLLM are not. A backward pass counts as two forward passes or, with LoRA adapters, as
    `models.parameter_counts` says. The FLOPs of a teacher on a server come from its tokens. `models.flops_and_memory` names the parts.
    """

    def __init__(self, student: PreTrainedModel, teachers: tuple[PreTrainedModel | Teacher, ...], *, checkpointing: bool = False):
        """If `checkpointing` is True (gradient checkpointing), the backward pass computes the student's layers again, which is counted."""
        self._again = checkpointing
        self._phase = "training"
        here = [teacher.model if isinstance(teacher, Teacher) else teacher for teacher in teachers]
        self._sides = [_Side("student", student), *(_Side("teacher", model) for model in here if model is not None)]
        self._elsewhere = [teacher for teacher in teachers if isinstance(teacher, Teacher) and teacher.model is None]
        self._parts: dict[str, CostPart] = {}
        self._seconds: dict[str, float] = {}
        self._padding = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the `with` block, every call of a model or of the fused head is counted."""
        handles = [side.model.register_forward_pre_hook(self._body(side), with_kwargs=True) for side in self._sides]
        handles += [side.head.register_forward_hook(self._logits(side)) for side in self._sides]
        for teacher in self._elsewhere:
            teacher.passed = self._remote(size_of(teacher.config))
        try:
            with heads_watched(self._fused):
                yield
        finally:
            for teacher in self._elsewhere:
                teacher.passed = nothing
            for handle in handles:
                handle.remove()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the `with` block, all calls are counted for the phase `name`.

        The phase `sampling` has two counts: `rollout` for calls in inference mode, and `scoring` for all other calls.
        """
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Do the same as `phase`, and also add up the seconds that the `with` block takes."""
        # Each phase copies numbers from the device near its end, and so waits for the work before. Only the optimizer's update comes later.
        start = time.perf_counter()
        try:
            with self.phase(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def saw(self, batches: list[Batch]) -> None:
        """Count the padding tokens in an update's batches."""
        for batch in () if is_packed(self._sides[0].model) else batches:
            self._padding += batch.attention_BT.numel() - int(batch.attention_BT.sum())

    def state(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, Any]:
        """Return counts and seconds as plain numbers. The seconds are those of this process.

        Each process counts only its own work. `gather` is a function that returns its argument's value in each process, and the counts are
        summed over the processes.
        """
        parts, padding = dict[str, CostPart](), 0
        for own, own_padding in gather((self._parts, self._padding)):
            padding += own_padding
            for name, part in own.items():
                parts[name] = parts.get(name, CostPart()) + part
        kept = {name: dict(vars(part)) for name, part in sorted(parts.items()) if part.positions or part.heads}
        return {"parts": kept, "seconds": dict(self._seconds), "padding": padding}

    def restore(self, state: Mapping[str, Any], *, counts: bool = True) -> None:
        """Continue from a saved `state`. An empty state sets all counts to zero, as does `counts=False`.

        The counts of a state are those of all processes, so only one process continues with them.
        """
        before = state if counts else {}
        self._parts = {name: CostPart(**part) for name, part in before.get("parts", {}).items()}
        self._seconds, self._padding = dict(state.get("seconds", {})), before.get("padding", 0)

    # --- the hooks ------------------------------------------------------------------------------------------------------

    def _add(self, who: str, flops: float, positions: int, heads: int) -> None:
        at = self._phase
        if at == "sampling":
            at = "rollout" if torch.is_inference_mode_enabled() else "scoring"
        name = f"{at}/{who}"
        self._parts[name] = self._parts.get(name, CostPart()) + CostPart(flops, positions, heads)

    def _body(self, side: _Side) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            rows, width = ids.shape
            if packed := kwargs.get("rows"):
                pairs = sum(length**2 for length in packed)
            elif mask is not None and mask.ndim == 4:  # (B, 1, new tokens, columns), as in `teacher_mixed_fast` and `static_cache`
                pairs = mask.shape[0] * mask.shape[2] * mask.shape[3]
            else:
                pairs = rows * width * (width + tokens_in(kwargs.get(side.memory)))
            work, backward = Work(rows * width, pairs), side.name == "student" and torch.is_grad_enabled()
            self._add(side.name, _flops(side, work, backward, self._again), rows * width, 0)

        return count

    def _remote(self, size: Size | None) -> Callable[[Work], None]:
        def count(work: Work) -> None:
            self._add("teacher", float("nan") if size is None else forward_flops(size, work), int(work.positions), int(work.heads))

        return count

    def _logits(self, side: _Side) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.numel():
                self._add(side.name, 2 * output.numel() * args[0].shape[-1], 0, output.numel() // output.shape[-1])

        return count

    def _fused(self, head: Head, rows: int, width: int, grad: bool) -> None:
        student = head.weight is self._sides[0].head._parameters["weight"]
        backward = (2 if head.weight.requires_grad else 1) if student and grad else 0
        flops = 2 * rows * width * head.weight.shape[1] * (1 + backward)
        self._add("student" if student else "teacher", flops, 0, rows)


def _flops(side: _Side, work: Work, backward: bool, again: bool) -> float:
    if side.size is None:
        return float("nan")
    if backward and side.adapters:
        return training_flops(side.size, side.adapters, work, again=again)
    return forward_flops(side.size, work) * ((4 if again else 3) if backward else 1)


# --- the sampled text ---------------------------------------------------------------------------------------------------


def watch(
    step: Step, batches: list[Batch], *, fresh: bool = False, scores: bool = True, gather: Callable[[Tensor], Tensor] = lambda own: own
) -> dict[str, float]:
    """Return metrics of an update's sampled sequences. Return an empty dict if the text was not sampled in this run.

    If all text is `fresh`, sampled from the present student, `apart` is the `difference` of log q between sampling and training.
    p is a token's probability under the teacher, q under the student, q_old under the student at the time of sampling, and behaviour under
    the distribution from which the text was sampled. `gather` joins the rows (1, N) of all processes to (processes, N).

    Over all sequences of all processes:
    length              tokens per response
    repetition          share of 4-grams that occurred earlier in the same response
    left_out            share of tokens whose text a teacher with another tokenizer cannot read (see `spans.metrics`)
    reward              mean of log p - log q_old over tokens (nats); with `dense`, MiniLLM's log p is not normalised
    weight_min, weight_max    smallest and largest q_old / behaviour

    With `scores`, over the first 8 sequences of the first micro-batch, as is the reward if log p needs a forward pass:
    reverse_kl          mean of the k3 estimator of KL(q || p) over tokens, weighted by q / behaviour (nats)
    entropy             entropy of the student's next token (nats)
    teacher_top_mass    probability that the student gives to the teacher's 10 most probable tokens
    teacher_entropy     entropy of the teacher's next token (nats)
    clip_fraction       share of tokens that the objective clips: q / behaviour, or q / q_old with `clip_weight: false`, is beyond 1 ± clip

    If the tokenizers differ, reverse_kl and reward are means over spans without the teacher's unknown token; its tokens have no values.
    """
    if "student" not in batches[0].values:  # then nothing is moved to the device: recorded targets can be large
        return {}
    batches = [batch.to(step.models.student_model.device) for batch in batches]
    found = (_of_first_rows(step, batches[0].first(WATCHED_ROWS), fresh) if scores else {}) | _of_text(step, batches, gather)
    return {name if name == "apart" else f"rollout/{name}": value for name, value in found.items()}


def _of_text(step: Step, batches: list[Batch], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    known = "teacher" in batches[0].values and (step.clip is not None or mixture_of(batches[0]) is None)
    unread = spans.counts([batch.aligned for batch in batches if batch.aligned is not None])
    weights = torch.cat([batch.counted(batch.values["student"] - batch.values["behaviour"]) for batch in batches]).double()
    texts = [row.tolist() for b in batches for row in b.counted(b.targets_BT).cpu().split(b.mask_BT.sum(1).tolist())]
    of_grams = map(sum, zip(*map(repeated_grams, texts), strict=True))
    counts = weights.new_tensor([len(texts), len(weights), *of_grams, unread.get("left_out", 0), unread.get("tokens", 0)])
    rewards = sum((spans.known_rewards(batch) for batch in batches if known), weights.new_zeros(2))
    every = gather(torch.cat([counts, rewards, torch.stack([-weights.min(), weights.max()])]).unsqueeze(0))
    rows, tokens, grams, again, left_out, read, reward, judged = every[:, :-2].sum(0).tolist()
    least, most = every[:, -2:].amax(0).exp().tolist()
    found = {"length": tokens / rows, "repetition": again / max(grams, 1), "weight_min": 1 / least, "weight_max": most}
    return found | ({"left_out": left_out / max(read, 1)} if unread else {}) | ({"reward": reward / judged} if judged else {})


def _of_first_rows(step: Step, part: Batch, fresh: bool) -> dict[str, float]:
    old, behaviour = part.counted(part.values["student"]), part.counted(part.values["behaviour"])
    scored = _scored(step, part)
    log_q, log_p = scored["log_q"], scored.get("log_p")
    found = {name: float(scored[name].mean()) for name in ("entropy", "teacher_top_mass", "teacher_entropy") if name in scored}
    found |= {"apart": difference(old, log_q)} if fresh else {}
    if step.clip is not None:
        ratio = (log_q - part.counted(part.values[step.clipped_over])).exp()
        found["clip_fraction"] = float(((ratio - 1).abs() > step.clip).float().mean())
    if part.aligned is not None:
        known = torch.from_numpy(~part.aligned.unknown).to(old.device)
        log_q, old, behaviour = (spans.summed(part.aligned, values)[known] for values in (log_q, old, behaviour))
        log_p = scored["log_p"][known]
    if log_p is not None and len(log_p):  # these rows can be without a span
        ratio = (log_q - behaviour).exp()
        found |= {"reverse_kl": float((ratio * objectives.k3(log_q, log_p)).sum() / ratio.sum()), "reward": float((log_p - old).mean())}
    return found


@torch.no_grad()
def _scored(step: Step, batch: Batch) -> dict[str, Tensor]:
    # one pass for the rows of all teachers: a sharded student makes equally many passes in all processes, but these have other shares
    hidden = step.models.student.hidden(step.models.student_model, batch)
    if not batch.shares:
        return _of_teachers(step, batch, hidden)
    parts = [_of_teachers(step, batch.of_share(i), hidden.index_select(0, share.loss)) for i, share in enumerate(batch.shares)]
    order = torch.cat([share.loss for share in batch.shares]).argsort()  # back to the order of the whole batch
    known = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts])[order] for name in known}


def _of_teachers(step: Step, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
    """Return one value per token: `entropy`, `log_q`, and if they are known `teacher_top_mass`, `log_p` and `teacher_entropy`.

    `hidden` has the student's last hidden states at these tokens. If the teacher has another tokenizer, `log_p` has one value per span.
    """
    models, tokens = step.models, batch.counted(batch.targets_BT)
    exact = all(isinstance(teacher, HiddenTeacher) for teacher in models.teachers)
    known = batch.aligned is not None and "teacher" in batch.values
    teachers = models.targets(batch) if not known and (batch.targets or (models.teachers and exact)) else ()
    beside = teachers if batch.aligned is None else ()  # the teachers' outputs at the student's own tokens
    mixture = mixture_of(batch)

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        q = objectives.log_probs(logits)
        found = [-(q.exp() * q).sum(-1), objectives.token_log_probs(logits, tokens[rows])]
        if targets:
            target = targets[0] if mixture is None else mixture.logits(targets)
            top, p = target.topk(min(_TOP, target.shape[-1]), dim=-1).indices, objectives.log_probs(target).exp()
            entropy = torch.special.entr(p).sum(-1)  # 0 where the teacher's logit is -inf
            found += [q.gather(-1, top).exp().sum(-1), objectives.token_log_probs(target, tokens[rows]), entropy]
        return torch.stack(found)

    weights = torch.ones(5 if beside else 2, 1, device=hidden.device)
    _, found = objectives.fused_head(hidden, models.student.head, values, weights, teachers=beside, vocab=models.vocab)
    scored: dict[str, Tensor] = dict(zip(("entropy", "log_q", "teacher_top_mass", "log_p", "teacher_entropy"), found, strict=False))
    if batch.aligned is not None:
        return scored | {"log_p": spans.teacher_log_probs(models.again, batch, teachers)}
    if not beside and "teacher" in batch.values:
        return scored | {"log_p": batch.counted(batch.values["teacher"])}
    if not beside and not exact:
        return scored | {"log_p": models.teachers[batch.route[0] if batch.route else 0].scored(batch.of_teacher, models.vocab)[1]}
    return scored


class Alarms:
    """Alarms about sampled text, which compare with the first watched update. Each alarm is given once in a training."""

    def __init__(self, *, minillm: bool, precise: bool = True) -> None:
        self.most_apart = 0.01 if precise else 0.1  # rounding causes less, as for vLLM (`rollout.vllm`)
        self.restore({})
        more = "raise sampler.alpha, keep objective.length_normalisation on, " if minillm else ""
        self.advice = f"{more}lower optim.lr, or stop earlier; the loss does not show this problem"

    def check(self, step: int, metrics: Mapping[str, float], apart: float | None = None) -> list[str]:
        """Return the alarms that are new at this update, one line each. `apart` is None if no text is new (see `watch`)."""
        if "rollout/length" not in metrics:
            return []
        self.first = self.first or dict(metrics)
        now, then = ({name.removeprefix("rollout/"): value for name, value in m.items()} for m in (metrics, self.first))
        found: dict[str, str] = {}
        if now["repetition"] > max(0.3, 2 * then["repetition"]):
            found["collapse"] = f"{now['repetition']:.0%} of 4-grams repeat within a response (at first {then['repetition']:.0%})"
        if not 0.5 * then["length"] <= now["length"] <= 2 * then["length"]:
            found["length drift"] = f"responses have {now['length']:.0f} tokens (at first {then['length']:.0f})"
        if now["entropy"] < 0.3 * then["entropy"] and (beside := _below_the_teacher(now, then)):
            found["entropy drop"] = f"the entropy is {now['entropy']:.2f} nats per token (at first {then['entropy']:.2f}{beside})"
        if (share := now.get("left_out", 0)) > max(0.1, 2 * (before := then.get("left_out", 0))):
            text = f"the teacher cannot read {share:.0%} of the sampled tokens (at first {before:.0%})"
            found["text that the teacher cannot read"] = f"{text}, so no loss compares them with the teacher"
        found = {name: f"{text}; {self.advice}" for name, text in found.items()}
        if (apart or 0) > self.most_apart:
            found["sampling and training disagree"] = (
                f"log-probabilities of new tokens differ by {apart:.0%} on average, more than rounding explains, so the student does "
                "not train on its own text; set `engine: native` and `precision: fp32` if they are not set, or choose another model"
            )
        new = [f"update {step}: {name}: {text}" for name, text in found.items() if not any(f": {name}: " in line for line in self.given)]
        self.given += new
        return new

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "given": [*self.given]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved `state`, which may be empty."""
        self.first, self.given = dict[str, float](state.get("first", {})), list[str](state.get("given", []))


def _below_the_teacher(now: Mapping[str, float], then: Mapping[str, float]) -> str:
    # an untrained student must lose entropy, down to the teacher's; it then comes closer to the teacher
    if "teacher_entropy" in now:
        return f", the teacher's is {now['teacher_entropy']:.2f}" if now["entropy"] < 0.5 * now["teacher_entropy"] else ""
    return ", and the reverse KL has risen" if now.get("reverse_kl", 0) > then.get("reverse_kl", 0) else ""
