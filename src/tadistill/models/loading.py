"""Load, save and compare models and tokenizers. Called by stages; every source of `sources` works here.

    tokenizer = load_tokenizer("gpt2")
    model = load_model("gpt2", dtype=torch.float32)
    save_model(model, tokenizer, folder)

Weights that a model's files lack are an error here; transformers would draw them at random.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tadistill.disk import writing
from tadistill.errors import ConfigError, ModelError
from tadistill.models import sources
from tadistill.models.noise import quiet
from tadistill.models.scratch import scratch_config, scratch_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(load: str | Path, *, revision: str = "main", world: Mapping[str, int] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, or the embedded world's for `tinyworld` (`world` = its seed and people).

    A tokenizer without a pad token gets EOS for it; padding is told by lengths everywhere, so no meaning changes.

    Raises:
        ModelError: the source has no tokenizer, or the tokenizer has no EOS token.
    """
    load = str(load)
    if load == "tinyworld":
        from tadistill.data import tinyworld

        return tinyworld.tokenizer(**(world or {}))
    directory = sources.fetch(load, revision, weights=False)
    if directory is None:
        raise ModelError(f"`{load}` brings no tokenizer; set `tokenizer:` to a directory, a hub id or tinyworld")
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"model `{load}` has no readable tokenizer ({_first_line(error)}); set `tokenizer:`") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of `{load}` has no EOS token, so no answer could end; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    load: str | Path,
    *,
    revision: str = "main",
    config: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """A causal language model on the CPU, in eval mode.

    `config`, `seed` and `tokenizer` matter to `scratch:TYPE` only, which needs the tokenizer.

    Raises:
        ModelError: the model cannot be had or read, or its files leave some weights out.
        ConfigError: a bad dtype, or a bad scratch configuration.
    """
    load, dtype = str(load), _dtype(dtype)
    source = sources.parse(load)
    if source.kind == "scratch":
        if tokenizer is None:
            raise ConfigError(f"`{load}` needs a tokenizer; set `tokenizer:` to a directory, a hub id or tinyworld")
        return scratch_model(scratch_config(source.name, config or {}, tokenizer), seed=seed, dtype=dtype).eval()
    directory = sources.fetch(load, revision)
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
            raise ModelError(f"model `{load}` cannot be loaded as a causal language model: {_first_line(error)}") from error
    model, info = loaded
    # transformers fills missing weights with random numbers and a warning; that would train noise.
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:3])
        raise ModelError(f"the files of `{load}` lack {len(missing)} weights of this architecture ({some}); download or save it again")
    return model.eval()


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write an ordinary Hugging Face directory (safetensors, configuration, tokenizer).

    Of the generation configuration only token ids stay: a parent's sampling defaults (temperature, penalties) would
    silently change what the new model says in other people's `generate`, and inconsistent ones cannot be saved.

    Args:
        weights: the model's whole state dict, where it holds only a part itself.
    """
    before = model.generation_config
    ids = {name: getattr(before, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} if before else {}
    if ids.get("eos_token_id") is None:
        ids["eos_token_id"] = tokenizer.eos_token_id
    if ids.get("pad_token_id") is None:
        ids["pad_token_id"] = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(**ids)
    try:
        with quiet(), writing(Path(directory)):
            model.save_pretrained(directory, state_dict=weights and dict(weights))  # which it empties
            tokenizer.save_pretrained(directory)
    finally:
        model.generation_config = before


def column_major(model: PreTrainedModel) -> PreTrainedModel:
    """Lay out the matrices of a frozen float32 model on a CPU column by column, in place: the same numbers, and products with few rows,
    as in decoding, take a tenth to a fifth less time. Any other model is returned as it is."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        rows = model.get_input_embeddings().weight  # is read row by row, so a head tied to it stays
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not rows:
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's EOS, which training teaches, then others that the model's generation config names."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    others = configured if isinstance(configured, list) else [] if configured is None else [configured]
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return tuple(dict.fromkeys([eos, *others]))


def check_same_tokenizer(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Raise unless all models (by name) share one vocabulary, token by id, and one EOS.

    Raises:
        ModelError: names two models, their sizes and the first id at which they differ.
    """
    names = list(tokenizers)
    for name in names[1:]:
        first, other = tokenizers[names[0]], tokenizers[name]
        if first is other:
            continue
        difference = _difference(first, other)
        if difference:
            raise ModelError(
                f"models `{names[0]}` and `{name}` have different tokenizers ({len(first)} and {len(other)} tokens): {difference}; "
                "distillation across tokenizers is not supported, so choose models of one family"
            )


def _difference(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    mine, theirs = first.get_vocab(), other.get_vocab()
    if mine != theirs:
        by_id, by_other_id = {i: t for t, i in mine.items()}, {i: t for t, i in theirs.items()}
        i = min(i for i in by_id.keys() | by_other_id.keys() if by_id.get(i) != by_other_id.get(i))
        return f"token {i} is {_token(by_id.get(i))} in the one and {_token(by_other_id.get(i))} in the other"
    if first.eos_token_id != other.eos_token_id:
        return f"EOS is {first.eos_token!r} ({first.eos_token_id}) in the one and {other.eos_token!r} ({other.eos_token_id}) in the other"
    return None


def _token(token: str | None) -> str:
    return "absent" if token is None else repr(token)


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel) -> int:
    """How many logits, from the first on, all models and the tokenizer share.

    Some families pad their logits beyond the tokenizer, by different amounts (Qwen2.5); callers cut to this width and
    renormalise.
    """
    heads: list[Any] = [model.get_output_embeddings() for model in models]
    return min([len(tokenizer), *(head.weight.shape[0] for head in heads)])


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a causal language model of any family from the contents of its config.json, without its weights."""
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).num_parameters()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is `{dtype}`; use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
