"""Tiny models, tokenizers and sources; everything a test reads stands in its own temporary cache."""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

SHAPES = {
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32},
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "ffn_dim": 24,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 8,
    },
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""Small configurations, one per family."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder for converted models."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TADISTILL_CACHE", str(folder))
    return folder


def word_tokenizer(words: int = 29, **special) -> PreTrainedTokenizerFast:
    """A tokenizer of `words` words and three special tokens."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(words))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special)


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def random_model(kind: str, **changes):
    """A model whose every weight is random, norms and biases too, so that no mix-up of weights stays unseen."""
    special = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return with_random_weights(model_type=kind, **{**special, **SHAPES[kind], **changes})


def with_random_weights(**fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.fixture
def model_directory(tmp_path, tokenizer):
    """An ordinary model directory."""
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(path: Path, *, seed: int = 0) -> Path:
    """A tiny llama with a byte-pair tokenizer and a chat template, as a GGUF file in float32."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    width, inner, layers, heads, kv_heads, words = 16, 24, 2, 4, 2, ["<pad>", "<eos>", *bytes_to_unicode().values(), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    keys, draw = width * kv_heads // heads, np.random.default_rng(seed)
    shapes = {"token_embd": (len(words), width), "output_norm": (width,)}
    for i in range(layers):
        block = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)}
        block |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder that pip takes its wheels from, and nowhere else."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A minimal wheel `tiny_models 1.0` that holds `files`."""
    info = "tiny_models-1.0.dist-info"
    content = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-models\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"])
    path = folder / "tiny_models-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (content | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return path


def cached_repository(hub: Path, directory: Path, commit: str = "c" * 40, *, name: str = "org/name", branch: str = "main") -> Path:
    """Lay a model out as the hub's cache does: refs, blobs, and a snapshot of links."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit, encoding="utf-8")
    for file in directory.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot
