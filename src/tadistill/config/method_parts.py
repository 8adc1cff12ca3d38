"""The parts of a method besides objective and sampler: the optimizer and the size of forward passes (`optim`), the choice of a checkpoint
(`select`), several teachers at a time (`dense`), the teacher's own prompt (`context`), and a teacher that is an average of the student
(`ema`)."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import MOST, Precision, Strict
from tadistill.errors import ConfigError
from tadistill.metrics import LAST, SELECTABLE

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The decay rate of a moving average. A larger value averages over more updates."""


class Optim(Strict):
    """Settings of AdamW and of the learning rate. All numbers are totals over all devices, so more devices do not change an update."""

    lr: float = Field(default=5e-4, gt=0, le=10)
    """Peak learning rate."""
    steps: int | None = Field(default=None, ge=1, le=MOST)
    """Number of optimizer updates. Give either `steps` or `epochs`."""
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    """Number of passes over the training set. All its rows are counted, even those that are left out because they are too long."""
    batch: int = Field(default=32, ge=1, le=MOST)
    """Number of sequences in an update."""
    micro_batch: int | None = Field(default=None, ge=1, le=MOST)
    """Number of sequences in one forward pass. It must divide `batch`. The default is the whole batch."""
    tokens: int | None = Field(default=None, ge=1, le=MOST)
    """Largest number of tokens in one forward pass, instead of `micro_batch`. Padding counts too, unless rows are `packed`. A row with more
    tokens has a forward pass of its own."""
    packed: bool = False
    """Train without padding: the rows of a forward pass are concatenated, and no token attends to another row. Student and teachers must be
    of a type that supports this. The page "Fit a run into memory" of the documentation lists these types."""
    warmup: int = Field(default=0, ge=0)
    """Number of updates at the start in which the learning rate rises linearly to `lr`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the learning rate after the warmup."""
    lr_min: float = Field(default=0.0, ge=0)
    """Lowest learning rate of the schedules `cosine` and `linear`. They would reach it one update after the last one."""
    weight_decay: float = Field(default=0.01, ge=0, le=100)
    """AdamW's weight decay, for weight matrices only, with torch's default."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment, with torch's defaults."""
    eps: float = Field(default=1e-8, ge=1e-30, le=1)
    """AdamW's epsilon, with torch's default."""
    clip: float = Field(default=1.0, gt=0, le=1e9)
    """Largest gradient norm. A larger gradient is scaled down to this norm."""
    precision: Precision = "fp32"
    """Number format of training. With `bf16` (mixed precision), weights are stored in float32, and matrix products and the teacher use
    bfloat16."""
    gradient_checkpointing: bool = False
    """Store only the input of each layer, and compute the layer again in the backward pass. This saves memory, but costs a third more
    compute."""

    def smaller(self, processes: int) -> str:
        """Return a setting that makes the forward passes of each process smaller, such as `optim.micro_batch: 4`. Return an empty text if
        there is none."""
        if self.tokens:
            return f"optim.tokens: {self.tokens // 2}" if self.tokens > 1 else ""
        rows = min(self.micro_batch or self.batch, self.batch // processes)
        sizes = [n for n in range(1, rows // 2 + 1) if self.batch % n == 0]
        return f"optim.micro_batch: {sizes[-1]}" if sizes else ""

    @model_validator(mode="after")
    def _check(self):
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; choose a `micro_batch` that divides `batch`"
            )
        if self.micro_batch and self.tokens:
            raise ValueError(
                f"micro_batch is {self.micro_batch} and tokens is {self.tokens}, but only one of them can set the size of a forward pass; "
                "remove `micro_batch` or `tokens`, or set it to null"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs:g}, but only one of them can set the number of updates; remove "
                "`steps` or `epochs`, or set it to null"
            )
        given = self.model_fields_set  # an arm's changes can have only one of two numbers; `merge_methods` checks both
        if {"lr", "lr_min"} <= given and self.lr_min > self.lr:
            raise ValueError(
                f"lr_min {self.lr_min} is above lr {self.lr}, but the learning rate falls from `lr` to `lr_min`; lower `lr_min`"
            )
        if {"lr", "weight_decay"} <= given and self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr {self.lr} times weight_decay {self.weight_decay} is 1 or more, so one update could change the sign of a weight; "
                "lower `lr` or `weight_decay`"
            )
        return self


_PARTS = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|[{}]")


class TeacherContext(Strict):
    """A prompt of the teacher's own. The teacher reads it in place of the student's prompt, and then the same response tokens.

    With a reference answer in it, a model can teach itself (`path: s > s`), as in OPSD (arXiv 2601.18734) and SDFT (arXiv 2601.19897). Only
    training uses the context. Dev sets and test sets are measured with the student's prompts. `context: TEXT` is short for `context:
    {template: TEXT}`.
    """

    text_sets: ClassVar[str] = "template"
    template: str | None = None
    """The text of the prompt. `{column}` stands for a column of the row: `{instruction}`, `{input}`, `{output}` (the first reference
    answer), `{prompt}` (the whole prompt of the student), or a column in `data.train.extra`. Write `{{` and `}}` for braces. With a chat
    template, this text is the user's message. In a conversation, the text replaces the last message before the answer, and `{instruction}`
    stands for that message."""
    system: str | None = None
    """Text of the system message. It replaces the system message that a conversation has. With this key, the tokenizer's chat template
    writes the prompt."""
    chat: bool | None = None
    """True if the tokenizer's chat template writes the prompt. By default, the chat template writes the prompt if `system` is set, or if it
    also writes the student's prompt."""
    max_prompt: int = Field(default=1024, ge=1, le=MOST)
    """Largest number of tokens in the teacher's prompt. If the prompt of a row is longer, `data.long_prompts` decides what happens to this
    row in training with the context."""

    @field_validator("template")
    @classmethod
    def _complete(cls, template: str | None) -> str | None:
        if template is None:
            return None
        if not template.strip():
            raise ValueError("the template is empty; write the teacher's prompt, such as `{prompt}` for the prompt of the student")
        for part in _PARTS.finditer(template):
            if part[0] in ("{", "}"):
                raise ValueError(f"the brace at character {part.start() + 1} has no partner; write `{part[0] * 2}` for a brace in the text")
            if part["column"] is not None and not part["column"].strip():
                raise ValueError("`{}` names no column; write for instance `{output}`, or `{{}}` for two braces in the text")
        return template

    @model_validator(mode="after")
    def _check(self):
        if self.template is None and self.system is None and self.chat is None:
            raise ValueError("the context changes nothing; set `template`, `system` or `chat`")
        if self.chat is False and self.system is not None:
            raise ValueError("`system` needs a chat template, but `chat` is false; remove one of the two keys")
        if self.chat is False and self.template is None:
            raise ValueError("with `chat: false`, `template` must contain the whole prompt of the teacher; set `template`")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The names between braces in `template`, each once."""
        found = (part["column"] for part in _PARTS.finditer(self.template or "") if part["column"] is not None)
        return tuple(dict.fromkeys(found))

    def filled(self, columns: Mapping[str, str]) -> str:
        """Return the template with texts in place of the names in braces. `columns` maps names to texts. Braces in these texts are kept."""
        assert self.template is not None
        return _PARTS.sub(lambda part: part[0][0] if part["column"] is None else columns[part["column"]], self.template)


if TYPE_CHECKING:
    SelectMetric = str
else:
    SelectMetric = Literal[SELECTABLE]  # type checkers want the names written out


class Select(Strict):
    """The choice of the checkpoint that a training keeps."""

    metric: SelectMetric = "loss"
    """The metric on the dev set that chooses the checkpoint. With `last`, the final weights are kept."""
    every: int = Field(default=100, ge=1, le=MOST)
    """Number of updates between two evaluations on the dev set. The last evaluation is always at the end of training."""
    patience: int | None = Field(default=None, ge=1, le=MOST)
    """Stop the training if this many evaluations on the dev set, one after the other, give no better value. By default, training never
    stops early."""

    @property
    def chooses(self) -> bool:
        """True if a metric chooses the checkpoint. Otherwise nothing is measured on the dev set."""
        return self.metric != LAST

    def evaluations(self, updates: int) -> int:
        """Return the number of evaluations on the dev set in a training: one after every `every` updates, and one at its end."""
        return -(-updates // self.every) if self.chooses else 0

    def check(self) -> None:
        """Raise a ConfigError if `patience` is set but no metric is measured on the dev set."""
        if self.patience is not None and not self.chooses:
            raise ConfigError(
                f"select.patience is {self.patience}, but with select.metric `last` nothing is measured on the dev set; set "
                "`select.metric` to `loss` or `rouge_l`, or remove `select.patience`"
            )


Ema = Annotated[float, Field(ge=0, lt=1)]
"""Decay of an exponential moving average of weights: the factor of the teacher's old weights in each update of the teacher."""


class Dense(Strict):
    """Dense guidance (Son et al. 2021, DGKD): all models before a student in its path teach the student together. The target is the mean of
    their distributions."""

    kind: Literal["geometric", "arithmetic"] = "geometric"
    """The kind of mean. `geometric` fits the objective `reverse_kl`, and `arithmetic` fits `forward_kl`. For both pairs, the gradient
    equals the gradient of the mean of the KLs between the student and each teacher."""
    weights: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = ()
    """One weight per teacher, in the order of the path. By default, all weights are equal."""
    drop: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a teacher is left out of an update. At least one teacher always stays."""

    @model_validator(mode="after")
    def _check(self):
        if self.weights and not sum(self.weights) > 0:
            raise ValueError(f"dense.weights are {list(self.weights)}; set at least one weight above 0")
        return self
