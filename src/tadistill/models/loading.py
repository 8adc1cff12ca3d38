"""Load, save and compare models and tokenizers. A model can come from any source of `models.sources`, also with random weights.

    tokenizer = load_tokenizer("gpt2")
    model = load_model("gpt2", dtype=torch.float32)
    save_model(model, tokenizer, folder)

If weights are missing in the files of a model, this module raises an error. transformers would initialise these weights at random.
"""

import contextlib
import copy
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tadistill.data import tinyworld
from tadistill.disk import ordinary_permissions, writing
from tadistill.errors import ConfigError, ModelError
from tadistill.models import sources, tokens
from tadistill.models.architectures import quiet
from tadistill.models.pretrained import first_line, read_model, read_tokenizer
from tadistill.models.scratch import scratch_config, scratch_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(load: str | Path, *, revision: str = "main", world: Mapping[str, int] | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model source.

    If a tokenizer has no pad token, EOS becomes its pad token. This does not change results, because padding is always masked.
    For the sources `tinyworld` and `tinyworld-bpe`, `world` has the seed and the number of people of this synthetic data set.

    Raises:
        ModelError: the source has no tokenizer, or the tokenizer has no EOS token.
    """
    load = str(load)
    if load in tinyworld.TOKENIZERS:
        return tinyworld.tokenizer(load, **(world or {}))
    directory = sources.fetch(load, revision, weights=False)
    if directory is None:
        raise ModelError(f"model `{load}` has no tokenizer of its own; set `tokenizer:` to a directory, a hub id or tinyworld")
    tokenizer = read_tokenizer(directory, load)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of `{load}` has no EOS token, but every answer must end with one; set eos_token in its tokenizer_config.json"
        )
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
    """Load a causal language model to the CPU, in eval mode.

    `config`, `seed` and `tokenizer` are used only if `load` is `scratch:TYPE` (random weights). Such a model needs the tokenizer.

    Raises:
        ModelError: the model cannot be found or read, weights are missing in its files, or its architecture cannot be distilled.
        ConfigError: the dtype, or the configuration of a `scratch:` model, is not valid.
    """
    load, dtype = str(load), _dtype(dtype)
    source = sources.parse_source(load)
    if source.kind == "scratch":
        if tokenizer is None:
            raise ConfigError(f"model `{load}` needs a tokenizer; set `tokenizer:` to a directory, a hub id or tinyworld")
        return scratch_model(scratch_config(source.name, config or {}, tokenizer), seed=seed, dtype=dtype).eval()
    directory = sources.fetch(load, revision)
    assert directory is not None
    return read_model(directory, load, dtype)


def check_model(load: str, revision: str = "main") -> PreTrainedModel:
    """Read only the headers of the weight files, and return the model without weights. Raises a ModelError in the same cases as
    `load_model`."""
    directory = sources.fetch(load, revision)
    assert directory is not None
    return read_model(directory, load, torch.float32, device="meta")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    ends: tuple[int, ...] = (),
) -> None:
    """Write an ordinary Hugging Face directory: weights as safetensors, configuration and tokenizer.

    Only the token ids of the generation configuration are saved. Its sampling settings (temperature, penalties) were made for the original
    model, and transformers refuses to save settings that contradict each other.

    Args:
        weights: the full state dict. It is needed if `model` has only one shard of the weights.
        ends: ids of the tokens that end an answer, to save in the configurations. Without them, the end tokens of the model are saved.
    """
    before, config = model.generation_config, model.config
    ids = {name: getattr(before, name) for name in ("bos_token_id", "pad_token_id")} if before else {}
    if ids.get("pad_token_id") is None:
        ids["pad_token_id"] = tokenizer.pad_token_id
    ends = ends or end_tokens(model, tokenizer)
    model.generation_config = GenerationConfig(**ids, eos_token_id=ends[0] if len(ends) == 1 else list(ends))
    model.config = _ending(config, ends)
    try:
        with quiet(), writing(Path(directory)):
            model.save_pretrained(directory, state_dict=weights and dict(weights))  # a copy, because saving empties it
            tokenizer.save_pretrained(directory)
            ordinary_permissions(Path(directory))
    finally:
        model.generation_config, model.config = before, config


def _ending(config: PreTrainedConfig, ends: tuple[int, ...]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    try:
        config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    except (StrictDataclassError, TypeError, ValueError):
        config.eos_token_id = ends[0]
    return config


def convert_gguf(file: Path, directory: Path) -> None:
    """Convert a GGUF file to a Hugging Face directory with model and tokenizer. `sources.fetch` calls this function once per file.

    The weights are dequantised to float32 (4 bytes per parameter). The logits are identical to those of the GGUF file. transformers can
    also load the GGUF file directly. But this is slow, and transformers cannot save the loaded model, because its configuration has the
    field `quantization_config`.

    Raises:
        ModelError: the `gguf` package is missing, the architecture is not supported, or the file is damaged.
    """
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # stderr is hidden, because tqdm shows a progress bar whatever transformers' settings are; errors are raised as exceptions
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
        except ImportError as error:
            raise ModelError(f"reading GGUF file `{file.name}` needs the package gguf; install it with `pip install gguf`") from error
        except Exception as error:  # a damaged file can make transformers raise any error
            raise ModelError(
                f"GGUF file `{file.name}` cannot be read: {first_line(error)}; use another file or the model's hub id"
            ) from error
        _check_attention(loaded.config, file)
        plain = _without_quantization(loaded)
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        ordinary_permissions(directory)


def _check_attention(config: PreTrainedConfig, file: Path) -> None:
    # a GGUF file does not contain this number, and transformers uses the number of the small Gemma models
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != config.head_dim:
        raise ModelError(
            f"GGUF file `{file.name}` has a {config.model_type} model with head_dim {config.head_dim}, but does not contain the scale of "
            "its attention (query_pre_attn_scalar); use the model's hub id"
        )


def _without_quantization(loaded: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(loaded.config)
    delattr(config, "quantization_config")  # only quantised models have this field
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced below
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain


def column_major(model: PreTrainedModel) -> PreTrainedModel:
    """Store the weight matrices of a frozen float32 model column by column, in place. A model on a GPU or of another dtype is not changed.

    The values stay the same. Matrix products with few rows, as in decoding, take 10 to 20 % less time.
    """
    if model.device.type == "cpu" and model.dtype == torch.float32:
        rows = model.get_input_embeddings().weight  # a lookup needs whole rows, so a head tied to the embeddings stays
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not rows:
                module.weight.data = module.weight.data.t().contiguous().t()
    return model


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of all tokens that end an answer of this model. EOS of the tokenizer comes first."""
    return tokens.ends(tokens.of(model, tokenizer))


def check_same_tokenizer(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Check that all tokenizers have the same tokens, and the same EOS. `tokenizers` maps the name of a model to its tokenizer.

    A tokenizer may have additional added tokens, if their ids are higher than those of the other tokens (`Vocabulary.extra`).

    Raises:
        ModelError: two tokenizers differ. The message names both models, the vocabulary sizes and the first id that differs.
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
                f"{_fix(first, other, names[0], name)}"
            )


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> tokens.Vocabulary:
    """Return the tokens of a loaded tokenizer."""
    fast: Any = tokenizer  # the base class does not declare get_added_vocab
    return tokens.Vocabulary(fast.get_vocab(), fast.get_added_vocab())


def _difference(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    if vocabulary(first).extra(vocabulary(other)) is None:
        mine, theirs = first.get_vocab(), other.get_vocab()
        by_id, by_other_id = {i: t for t, i in mine.items()}, {i: t for t, i in theirs.items()}
        i = min(i for i in by_id.keys() | by_other_id.keys() if by_id.get(i) != by_other_id.get(i))
        return f"token {i} is {_token(by_id.get(i))} in the first and {_token(by_other_id.get(i))} in the second"
    if first.eos_token_id != other.eos_token_id:
        return (
            f"EOS is {first.eos_token!r} ({first.eos_token_id}) in the first and {other.eos_token!r} ({other.eos_token_id}) in the second"
        )
    return None


def _fix(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, other_name: str) -> str:
    if first.get_vocab() == other.get_vocab():
        return f"set `tokenizer:` of `{other_name}` to that of `{name}`, whose vocabulary is the same"
    return (
        "the plan could not find this difference, because a tokenizer.json is missing; save both tokenizers with save_pretrained, "
        "or choose models with the same tokenizer"
    )


def _token(token: str | None) -> str:
    return "absent" if token is None else repr(token)


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel, widths: Iterable[int] = ()) -> int:
    """Return the number of tokens that the tokenizer and the output heads of all models have. `widths` are the sizes of further heads.

    In some families (Qwen2.5), models have more logits than tokens, and models of different sizes have different numbers of logits. Callers
    must therefore cut the logits to this number (`logits[..., :n]`), and renormalise.
    """
    heads: list[Any] = [model.get_output_embeddings() for model in models]
    return min([len(tokenizer), *(head.weight.shape[0] for head in heads), *widths])


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is `{dtype}`; use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
