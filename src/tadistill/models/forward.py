"""The forward pass of training and scoring. A `Reader` has the LM head of a model, and returns its last hidden states at the positions of
the loss.

    reader = Reader(model)
    hidden = reader.hidden(model, batch)            # (N, H), then tadistill.objectives.fused_head(hidden, reader.head, …)

This module computes no logits: the loss itself applies the head, to some positions at a time.

After `pack_rows(model)`, a `Reader` runs the model on packed rows, without padding: the rows (sequences) of a batch are concatenated.
Attention runs on one row at a time, with its causal flag and without a mask. So no product is computed between two rows, and flash kernels
and grouped-query attention are possible. All other layers get one long row, in which the positions of each row start at 0.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tadistill.data.batch import Batch
from tadistill.errors import ModelError
from tadistill.models.architectures import first_line, is_full
from tadistill.objectives import Head

# In a causal model, no token attends to the padding on its right. So models on these devices get no attention mask, and can use flash
# attention. Models on a CPU get a mask: without it, grouped-query attention adds up its gradients in another order.
_UNMASKED = {"cuda"}
_EACH_ROW = ("qwen4_exp", "qwen4_exp_text", "xlm")
"""Types of models that need the positions of every row, also if they are the same in all rows."""


class Reader:
    """A causal language model, split into its body and its LM head. The constructor checks that body and head together give the logits of
    the whole model."""

    def __init__(self, model: PreTrainedModel):
        # raises a ModelError if the logits of the model are not those that its head computes from the last hidden states
        self._module = output_head(model)
        self._takes = inspect.signature(model.forward).parameters
        self._model = model
        self._scale, self._softcap = logit_changes(model.config)
        self._check(model)

    @property
    def head(self) -> Head:
        bias = self._module._parameters.get("bias")
        weight = self._module._parameters["weight"]
        assert weight is not None
        return Head(weight, bias, self._scale, self._softcap)

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the last hidden states, of shape (N, H), at the N positions where the mask is True, in row-major order.

        `model` is the model of this `Reader`, or a wrapper around it for training in several processes.
        """
        if is_packed(self._model):
            return self._of_rows(model, batch)
        places, end, width = batch.places, batch.places.end, batch.ids_BT.shape[1]
        inputs = _reading(self._model, batch.attention_BT, batch.positions_BT, end) | {"logits_to_keep": places.columns}
        with tapped(self._module, skip=True) as seen:
            model(input_ids=batch.ids_BT[:, :end], use_cache=False, **taken(self._takes, inputs))
        row, column = places.loss // width, places.loss % width
        if seen[0].shape[1] == len(places.columns):  # the model has obeyed `logits_to_keep`, or all columns are kept
            column = torch.searchsorted(places.columns, column)
        return seen[0].flatten(0, 1).index_select(0, row * seen[0].shape[1] + column)

    def _of_rows(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, lengths = batch.places.tokens, batch.places.lengths
        ids, positions = (values.flatten().index_select(0, tokens).unsqueeze(0) for values in (batch.ids_BT, batch.positions_BT))
        of_loss = torch.searchsorted(tokens, batch.places.loss)
        inputs = {"position_ids": positions, "logits_to_keep": of_loss, **rows(lengths, ids.device)}
        with tapped(self._module, skip=True) as seen:
            model(input_ids=ids, use_cache=False, **taken(self._takes, inputs))
        return seen[0][0] if seen[0].shape[1] == len(of_loss) else seen[0][0].index_select(0, of_loss)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(2, device=model.device).unsqueeze(0)
        with tapped(self._module) as seen, rounded(model) as rounding:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().nan_to_num()
        if logits.shape[1] != ids.shape[1]:
            raise ModelError(
                f"{type(model).__name__} returns logits of {logits.shape[1]} positions for {ids.shape[1]} tokens, as with the virtual "
                "tokens of prompt tuning, but each token needs one position; use another kind of adapter, such as LoRA"
            )
        # NaN becomes 0 on both sides: this check accepts broken weights, because the training loop reports them
        expected = self.head.logits(seen[0].to(self.head.weight.dtype)).float().nan_to_num()
        tolerance = 1e-3 if rounding.precise and model.device.type == "cpu" else 0.02
        near = expected.shape == logits.shape and torch.allclose(
            expected, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max())
        )
        if not near:
            raise ModelError(
                f"models of type {model.config.model_type} change their logits after the head in a way that the loss does not support (it "
                "supports only a scale, a soft cap and a bias); choose another model"
            )


def output_head(model: PreTrainedModel) -> nn.Module:
    """Return the module that computes the logits from the last hidden states. Raises a ModelError if it is not a linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelError(f"a {model.config.model_type} model has no linear output head, but the loss needs one; choose another model")
    return head


@torch.no_grad()
def check_reading(model: PreTrainedModel) -> None:
    """Check three things on four tokens: padding does not change logits, positions start at 0, and no token depends on later tokens.

    Raises:
        ModelError: one of these three things is not so, or the forward pass fails.
    """
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    ids = (words // 2 + torch.arange(4, device=model.device)) % words
    rows, attention = ids.repeat(2, 1), torch.ones(2, 4, dtype=torch.long, device=model.device)
    rows[1, 2:], attention[1, 2:] = 0, 0
    inputs = _reading(model, attention, (attention.cumsum(1) - 1).clamp(min=0), 4)
    with evaluating(model), trying(model), rounded(model) as rounding:
        alone = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
        padded = model(input_ids=rows, use_cache=False, **taken(inspect.signature(model.forward).parameters, inputs)).logits.float()
    # in half precision, rounding may choose another expert at some positions
    decisive = max if rounding.precise else min
    for got, what in ((padded[0], "do not count positions from 0"), (padded[1, :2], "read later tokens")):
        if decisive(apart(z, expected) for z, expected in zip(got, alone, strict=False)) > rounding.largest:
            raise ModelError(f"models of type {model.config.model_type} {what}, so they cannot be distilled; choose another model")


def _reading(model: PreTrainedModel, attention_BT: Tensor, positions_BT: Tensor, end: int) -> dict[str, Tensor]:
    if attention_BT.device.type in _UNMASKED:
        rows = len(attention_BT) if model.config.model_type in _EACH_ROW else 1
        return {"position_ids": torch.arange(end, device=attention_BT.device).unsqueeze(0).expand(rows, -1)}
    return {"attention_mask": attention_BT[:, :end], "position_ids": positions_BT[:, :end]}


# --- around forward passes -------------------------------------------------------------------------------------------------


@contextmanager
def attention_for_any_shape() -> Iterator[None]:
    """Switch off cuDNN's attention in this process while a `with` block runs.

    In half precision on Hopper and Blackwell server GPUs, torch prefers cuDNN's attention. cuDNN builds a plan for every new shape of a
    batch, which takes much longer than the attention itself (pytorch/pytorch#155958). Nearly every batch of texts has a new shape, so the
    other attention kernels of torch are faster here.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode while a `with` block runs. After the block, each of its modules has its old mode again, and modules that
    were added in the block have the old mode of the model."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = before.get(module, before[model])


@contextmanager
def trying(model: PreTrainedModel) -> Iterator[None]:
    """Turn an error of the model's first forward passes, which run in the `with` block, into a ModelError with type and number format."""
    try:
        yield
    except Exception as error:  # the code of a model family can raise any error
        if is_full(error):
            raise
        raise ModelError(
            f"models of type {model.config.model_type} cannot process text in {str(model.dtype).removeprefix('torch.')} "
            f"({first_line(error)}); choose another `precision` or another model"
        ) from error


@dataclass
class Rounding:
    """The size of the rounding errors in a model's logits."""

    eps: float
    """The relative rounding error of one number."""
    tf32: bool
    """True if float32 products may be rounded to TF32."""

    @property
    def precise(self) -> bool:
        """True if logits are computed in float32 or float64."""
        return self.eps < 1e-5

    @property
    def largest(self) -> float:
        """The largest difference between two logit vectors (see `apart`) that rounding can explain: 7e-5 in float32 on a CPU, 0.03 in
        float16 and 0.09 in bfloat16."""
        eps = max(self.eps, 2**-10) if self.tf32 else self.eps
        return eps ** (0.6 if eps < 1e-5 else 0.5)


@contextmanager
def rounded(model: PreTrainedModel) -> Iterator[Rounding]:
    """Yield the size of the rounding errors of the forward passes in a `with` block. It depends on the dtypes of weights and logits."""
    found = Rounding(torch.finfo(model.dtype).eps, model.device.type == "cuda")

    def look(_: nn.Module, __: tuple[Tensor, ...], product: Tensor) -> None:
        found.eps = max(found.eps, torch.finfo(product.dtype).eps)

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(look) if isinstance(head, nn.Module) else None
    try:
        yield found
    finally:
        if handle:
            handle.remove()


def apart(got_V: Tensor, expected_V: Tensor) -> float:
    """Return the relative distance of two logit vectors: the norm of their difference, divided by the norm of `expected_V`.

    Each vector is first shifted to mean 0. A vector that contains NaN counts as a vector of zeros.
    """
    got, expected = ((z - z.mean()).nan_to_num() for z in (got_V, expected_V))
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def taken(takes: Mapping[str, inspect.Parameter], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `inputs` that a forward function with the parameters `takes` accepts. A function with `**kwargs` accepts all inputs."""
    return {name: value for name, value in inputs.items() if "kwargs" in takes or name in takes}


@contextmanager
def tapped(head: nn.Module, *, skip: bool = False, at_M: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Yield a list, to which each forward pass in the `with` block appends the input of the output head. With `skip`, the head computes no
    logits. With `at_M`, the head computes the logits of these columns only, and the list has only their inputs."""
    seen: list[Tensor] = []

    def tap(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0] if at_M is None else inputs[0][:, at_M])
        return (seen[-1][:, :0] if skip else seen[-1], *inputs[1:])

    handle = head.register_forward_pre_hook(tap)
    try:
        yield seen
    finally:
        handle.remove()


def logit_changes(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Return the scale and the soft cap that models with this configuration apply to logits. The soft cap is None if they have none."""
    settings = config.get_text_config(decoder=True).to_dict()

    def number(*names: str) -> float | None:
        return next((float(settings[name]) for name in names if isinstance(settings.get(name), (int, float)) and settings[name]), None)

    scale = (number("logit_scale", "lm_head_multiplier") or 1.0) / (number("logits_scaling") or 1.0)
    return scale, number("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


# --- packed rows ----------------------------------------------------------------------------------------------------------

ROWS = "tadistill_rows"
"""The name under which transformers knows the attention for packed rows. If a forward pass gets no `rows`, it uses transformers' `sdpa`."""
PACKABLE = frozenset(
    ("gemma", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3")
)
"""Types of models that can train on packed rows. Models of other types may carry a state from one row to the next, or build other masks."""
# Add a type only if tests/unit/models/test_packing.py covers it.


def check_packing(kind: Any, model: str) -> None:
    """Raise a ModelError if models of type `kind` cannot train on packed rows. The message names the model."""
    if kind not in PACKABLE:
        raise ModelError(
            f"model `{model}` is of type {kind}, which cannot train on packed rows; remove `optim.packed`, or use a model of type "
            f"{', '.join(sorted(PACKABLE))}"
        )


@torch.no_grad()
def pack_rows(model: PreTrainedModel) -> None:
    """Prepare a model for packed rows (see the docstring of this module). Every `Reader` of the model then runs it without padding.

    All other forward passes do not change.

    Raises:
        ModelError: models of this type cannot run on packed rows, or packing changes the logits of this model.
    """
    kind, attention = model.config.get_text_config().model_type, model.config._attn_implementation
    check_packing(kind, getattr(model, "name_or_path", "") or kind)
    if attention not in ("sdpa", ROWS):
        raise ModelError(
            f"a {kind} model uses the attention implementation `{attention}`, but packed rows need `sdpa`; remove `optim.packed`"
        )
    model.config._attn_implementation = ROWS
    words, lengths = model.get_input_embeddings().weight.shape[0], (3, 1, 3)  # type: ignore[union-attr]
    ids = (words // 2 + torch.arange(sum(lengths), device=model.device)) % words
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths]).unsqueeze(0)
    with evaluating(model), rounded(model) as rounding:
        packed = model(input_ids=ids.unsqueeze(0), position_ids=positions, use_cache=False, **rows(lengths, model.device)).logits[0]
        alone = torch.cat([model(input_ids=row.unsqueeze(0), use_cache=False).logits[0] for row in ids.split(lengths)])
    if not max(apart(z, expected) for z, expected in zip(packed.float(), alone.float(), strict=True)) <= rounding.largest:  # or NaN
        raise ModelError(f"packed rows change each other's logits in a {kind} model; remove `optim.packed`, or choose another model")


def is_packed(model: PreTrainedModel) -> bool:
    """Return True if `pack_rows` has prepared the model for packed rows."""
    return model.config._attn_implementation == ROWS


def rows(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return arguments for a forward pass on packed rows. `lengths` are the numbers of tokens of the rows."""
    # transformers does not change a mask with four axes, and models pass unknown arguments on to the attention
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "rows": lengths}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: tuple[int, ...] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    window = settings.get("sliding_window")
    parts = zip(query.split(rows, 2), key.split(rows, 2), value.split(rows, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, _near(q, window), **settings)[0] for q, k, v in parts], 1), None


def _near(query: Tensor, window: int | None) -> Tensor | None:
    length = query.shape[2]
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]


AttentionInterface.register(ROWS, _attention)
AttentionMaskInterface.register(ROWS, sdpa_mask)
