"""The settings of AdamW, of the learning rate, and of the size of forward passes: the key `optim`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Precision, Strict

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
    """Learning rate at the last update with the schedule `cosine` or `linear`."""
    weight_decay: float = Field(default=0.01, ge=0, le=100)
    """AdamW's weight decay, for weight matrices only. The default is torch's."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment. The defaults are torch's."""
    eps: float = Field(default=1e-8, ge=1e-30, le=1)
    """AdamW's epsilon. The default is torch's."""
    clip: float = Field(default=1.0, gt=0, le=1e9)
    """Largest gradient norm. A larger gradient is scaled down to this norm."""
    precision: Precision = "fp32"
    """Number format of training. With `bf16` (mixed precision), weights are stored in float32, and matrix products and the teacher use
    bfloat16."""
    gradient_checkpointing: bool = False
    """Store only the input of each layer, and compute the layer again in the backward pass. This saves memory, but costs a third more
    compute."""

    @property
    def smaller(self) -> str:
        """A setting that makes forward passes smaller, such as `optim.micro_batch: 4`. Empty if no such setting exists."""
        if self.tokens:
            return f"optim.tokens: {self.tokens // 2}" if self.tokens > 1 else ""
        sizes = [n for n in range(1, (self.micro_batch or self.batch) // 2 + 1) if self.batch % n == 0]
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
                "remove `micro_batch` or `tokens`"
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
