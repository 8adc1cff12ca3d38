"""Conversion of a GGUF file to an ordinary Hugging Face directory. `sources.fetch` calls it once per file and caches the result.

transformers reads GGUF files slowly and keeps a `quantization_config` on the model, which then cannot be saved. The converted directory
holds the dequantised float32 weights (4 bytes per parameter) and loads like any other model.
"""

import contextlib
import copy
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tadistill.errors import ModelError
from tadistill.models.loading import quiet


def convert(file: Path, directory: Path) -> None:
    """Write the model and the tokenizer of `file` to `directory`; logits stay identical to those of the GGUF file.

    Special tokens and the chat template are those of the GGUF file; nothing is added.

    Raises:
        ModelError: the `gguf` package is missing, the architecture is not supported, or the file is damaged.
    """
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # tqdm draws the bar of the dequantisation, whatever transformers' settings; errors come as exceptions
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        except ImportError as error:
            raise ModelError(f"GGUF file `{file.name}` needs the package gguf; install it with `pip install gguf`") from error
        except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"GGUF file `{file.name}` cannot be read: {reason}; use another file or the model's hub id") from error
        plain = _without_quantization(loaded)
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _without_quantization(loaded: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights into a model without quantisation settings."""
    config = copy.deepcopy(loaded.config)
    delattr(config, "quantization_config")  # only quantised models have this field
    with torch.random.fork_rng(devices=[]):  # the random weights made here are replaced at once
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain
