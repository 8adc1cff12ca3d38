"""Refuse architectures that cannot be distilled. All other causal language models of transformers can be distilled.

`tests/e2e/test_architectures.py` checks every architecture of transformers that is not refused here. It compares training and sampling with
a plain forward pass over the whole text: the logits and the sampled tokens must be equal.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tadistill.errors import ModelError

_POSITIONS = "counts positions from its padding token and not from 0"
_BOTH = "reads text in both directions"
_PART = "is part of a model of images and text, and transformers cannot load this part from files of its own"
_DRAFTS = "drafts tokens for another model and cannot run without it"
REFUSED = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _POSITIONS),
    **dict.fromkeys(("cpmant", "xlnet"), _BOTH),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "generates audio and no text"),
    **dict.fromkeys(("emu3", "mllama"), _PART),
    "blt": "reads patches of bytes, which a second model computes",
    "prophetnet": "predicts several tokens at once",
    "reformer": "draws random numbers in every forward pass, so its logits cannot be repeated",
}
"""Maps a type of model to the reason why it cannot be distilled. The reason continues the sentence "It is of type T, which …"."""
ENCODERS = frozenset(
    ("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roc_bert", "roformer", *REFUSED)
)
"""Types of models whose tokens attend to earlier and later tokens, unless their config.json has `"is_decoder": true`."""


_KNOWN = {r"(.*_)?act(ivation\w*)?|afn": list(ACT2FN), r"rope_\w+\.(rope_)?type": ["default", *ROPE_INIT_FUNCTIONS]}
"""Maps a regular expression for the names of configuration fields to the values that transformers knows for these fields."""
_MOST_LAYERS = 10_000
"""Largest number of layers. A model with more layers would take minutes to build, even without weights."""


def check_architecture(config: PreTrainedConfig, model: str) -> None:
    """Raise a ModelError if models with this configuration cannot be distilled. The message names the model and its type."""
    kind = config.model_type
    _check_type(kind, model)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(f"the configuration of model `{model}` has {layers} layers; write at most {_MOST_LAYERS}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < 1:
        raise ModelError(f"the configuration of model `{model}` has {positions} positions (max_position_embeddings); write at least 1")
    if config.is_encoder_decoder:
        raise _refusal(model, kind, "is an encoder-decoder model")
    if (kind in ENCODERS and not getattr(config, "is_decoder", True)) or not getattr(config, "causal", True):
        flag = "causal" if hasattr(config, "causal") else "is_decoder"
        raise _refusal(model, kind, f'{_BOTH} unless its config.json has "{flag}": true')


def check_config(config: Mapping[str, Any], model: str) -> None:
    """Check the content of a config.json as `check_architecture` does, and check that transformers can build a model from it.

    Raises:
        ModelError: the architecture cannot be distilled, the content is not valid, or a package that the model needs is missing.
    """
    if config.get("auto_map") and config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model `{model}` needs Python code of its own (auto_map in config.json), which tadistill never runs; use a model with an "
            "architecture of transformers"
        )
    _check_type(config.get("model_type"), model)
    with quiet():
        try:
            read = AutoConfig.for_model(**config)
            check_architecture(read, model)
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(read, trust_remote_code=False)
        except ModelError:
            raise
        except Exception as error:  # the code of a model family can raise any error
            if why := wrong_field(error, config):
                raise ModelError(f"config.json of model `{model}`: {why}") from error
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"transformers cannot build model `{model}` from its config.json ({reason or type(error).__name__}); correct config.json"
            ) from error


def wrong_field(error: Exception, config: Mapping[str, Any]) -> str | None:
    """Return a sentence about the configuration field that caused an error of transformers, with the fix. Return None if the field is not
    known."""
    if found := re.search(r"Field '(\w+)' with value (.{1,80}) doesn't match any type", str(error)):
        return f"{found[1]} is {found[2]}, which is not a valid value of this field; correct the field"
    for name, value in _fields(config):
        known = next((values for pattern, values in _KNOWN.items() if re.fullmatch(pattern, name)), None)
        if known and isinstance(error, KeyError) and error.args == (value,):
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean `{close[0]}`? Known" if close else "known"
            return f"{name} is `{value}`, which transformers does not know; {hint} values are {', '.join(known)}"
    return None


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", found) for inner, found in _fields(value))
        elif isinstance(value, str):
            yield name, value


def _check_type(kind: Any, model: str) -> None:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _refusal(model, kind, "is not a causal language model of this version of transformers")
    if kind in REFUSED:
        raise _refusal(model, kind, REFUSED[kind])


def _refusal(model: str, kind: Any, reason: str) -> ModelError:
    return ModelError(f"model `{model}` is of type {kind}, which {reason}; choose a decoder-only language model")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of transformers while a `with` block runs, because they would break the progress display of
    tadistill. Errors are still shown."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
