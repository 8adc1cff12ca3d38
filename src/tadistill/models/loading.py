"""Load and save models and tokenizers. A model can come from any source of `models.sources`, also with random weights.

    tokenizer = load_tokenizer("gpt2")
    model = load_model("gpt2", dtype=torch.float32)
    save_model(model, tokenizer, folder)
    read_model(directory, "ORG/NAME", torch.float32, device="meta")     # headers only: takes milliseconds, finds all errors except NaN

Files are read with transformers, but safely: no code from a directory runs. Missing weights and additional layers are errors. transformers
would initialise missing weights at random.
"""

import contextlib
import copy
import io
import re
from collections.abc import Collection, Mapping
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
    PreTrainedTokenizerFast,
)

from tadistill.data import tinyworld
from tadistill.disk import ordinary_permissions, writing
from tadistill.errors import ConfigError, ModelError
from tadistill.models import sources
from tadistill.models.architectures import (
    build_unset,
    check_config,
    first_line,
    is_full,
    parse_config,
    quiet,
    read_config,
    refuse_code,
    scratch_config,
    scratch_model,
)
from tadistill.models.model_files import check_files, read_or_empty
from tadistill.models.tokens import check_ends, end_tokens
from tadistill.text import counted, form


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
    tokenizer = read_tokenizer(sources.fetch(load, revision, weights=False), load)
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
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Load a causal language model to the CPU, in eval mode.

    `config`, `seed` and `tokenizer` are used only if `load` is `scratch:TYPE` (random weights). Such a model needs the tokenizer.

    Raises:
        ModelError: the model cannot be found or read, weights are missing in its files, or its architecture cannot be distilled.
        ConfigError: the configuration of a `scratch:` model is not valid.
    """
    load = str(load)
    source = sources.parse_source(load)
    if source.kind == "scratch":
        if tokenizer is None:
            raise ConfigError(f"model `{load}` needs a tokenizer; set `tokenizer:` to a directory, a hub id or tinyworld")
        model = scratch_model(scratch_config(source.name, config or {}, tokenizer), seed=seed, dtype=dtype).eval()
    else:
        model = read_model(sources.fetch(load, revision), load, dtype)
    if hasattr(model.config, "rescale_every"):  # RWKV would halve the weights of later layers in place, whenever it is in eval mode
        model.config.rescale_every = 0
    return model


def check_model(load: str, revision: str = "main") -> PreTrainedModel:
    """Read only the headers of the weight files, and return the model without weights. Raises a ModelError in the same cases as
    `load_model`."""
    return read_model(sources.fetch(load, revision), load, torch.float32, device="meta")


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
    written = ends[0] if len(ends) == 1 else list(ends)
    model.generation_config, model.config = GenerationConfig(**ids, eos_token_id=written), copy.deepcopy(config)
    try:
        try:
            model.config.eos_token_id = written
        except (StrictDataclassError, TypeError, ValueError):  # configurations of this type allow only one id
            model.config.eos_token_id = ends[0]
        with quiet(), writing(Path(directory)):
            model.save_pretrained(directory, state_dict=weights and dict(weights))  # a copy, because saving empties it
            tokenizer.save_pretrained(directory)
            ordinary_permissions(Path(directory))
    finally:
        model.generation_config, model.config = before, config


_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")
_SHOWN = 3
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_tokenizer(directory: Path, load: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a directory. `load` is the name of the model in error messages.

    Raises:
        ModelError: there is no tokenizer, it cannot be read, or it needs code of its own.
    """
    check_files(directory, load)
    with quiet():
        try:
            tokenizer = _tokenizer_of(directory)
        except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
            refuse_code(directory, load, error)
            if (directory / "config.json").is_file():
                parse_config(directory, load)
            if not any((directory / name).is_file() for name in _VOCABULARIES):
                raise ModelError(
                    f"model `{load}` has no tokenizer (tokenizer.json); save its tokenizer into the same directory, or set `tokenizer:`"
                ) from error
            raise ModelError(
                f"the tokenizer of model `{load}` cannot be read ({first_line(error)}); download it again, or set `tokenizer:`"
            ) from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"model_max_length in tokenizer_config.json of model `{load}` is {tokenizer.model_max_length!r}; write a number, or remove "
            "the field"
        )
    return tokenizer


def _tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    # For some types of models, such as qwen2, AutoTokenizer ignores the class that the file names, and uses the class of the type. That
    # class splits text in another way, so a saved tokenizer of the general class would be loaded as a different tokenizer.
    described = read_or_empty(directory / "tokenizer_config.json")
    if described.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in described:
        return PreTrainedTokenizerFast.from_pretrained(directory, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def read_model(directory: Path, load: str, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    """Read the causal language model of a directory, in eval mode. `load` is the name of the model in error messages.

    On the device `meta`, only the headers of the files are read.

    Raises:
        ModelError: the files cannot be read, need code of their own, do not fit the configuration, or have an architecture that cannot be
            distilled.
    """
    check_files(directory, load)
    read_config(directory, load)
    options: Any = {"dtype": dtype, "device_map": device} if device else {"dtype": dtype}
    with quiet():
        try:
            # returns weights of a wrong size in a list. By default, transformers only logs them, and `quiet` hides this log
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(directory), trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:  # a damaged file can make transformers raise any error
            if is_full(error):
                raise
            check_config(directory, load)
            raise ModelError(
                f"model `{load}` cannot be loaded as a causal language model ({first_line(error)}); download it again"
            ) from error
    model, info = loaded
    check_ends(directory, load)
    _check_weights(load, info)
    if device != "meta":
        _check_finite(model, load)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised and not getattr(model, "is_quantized", False):  # transformers ignores methods that it does not know
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(f"model `{load}` is quantised as {method}, which transformers cannot read; use the model's full weights")
    return model.eval()


def _check_weights(load: str, info: dict[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:_SHOWN])
        raise ModelError(
            f"{counted(len(missing), 'weight of this architecture is', 'weights of this architecture are')} missing in the files of "
            f"`{load}` ({some}); download or save the model again"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"{counted(len(mismatched), 'weight')} of `{load}` {form(len(mismatched), 'has', 'have')} another shape than in config.json: "
            f"{name} has the shape {list(stored)}, but needs {list(wanted)}; correct config.json (vocab_size or another size), or download "
            "the model again"
        )
    if layers := _layers(info["unexpected_keys"]):
        raise ModelError(
            f"the files of `{load}` have more layers than num_hidden_layers in config.json (weights {', '.join(layers[:_SHOWN])}); "
            "set num_hidden_layers to the number of layers in the files, and use `init: {from: …, layers: …}` if you want fewer layers"
        )


def _check_finite(model: PreTrainedModel, load: str) -> None:
    for name, weight in model.named_parameters():
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():  # a sum needs no second tensor
            raise ModelError(
                f"model `{load}`: the weight {name} contains NaN or infinite values; download the model again, or save it again"
            )


def _layers(unexpected: Collection[str]) -> list[str]:
    return sorted(key for key in unexpected if (found := _LAYER.fullmatch(key)) and re.search(r"(layers|h|blocks?)\.$", found[1]))


# --- GGUF ---------------------------------------------------------------------------------------------------------------


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
        with writing(directory):
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
    plain = build_unset(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain
