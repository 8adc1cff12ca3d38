"""Model directories as strangers make them: each is refused in one sentence or loaded whole; nothing of theirs runs, and nothing asks."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tests.unit.models.conftest import cached_repository, random_model, word_tokenizer

import tadistill
from tadistill.errors import ModelError
from tadistill.models import sources
from tadistill.models.loading import check_model, load_model, load_tokenizer
from tadistill.models.parameter_counts import read_config

EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('ran')\nclass X: pass\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    random_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def changed(name: str, **fields):
    """Set fields of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        content = {k: v for k, v in {**content, **fields}.items() if v is not None}
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def config(**fields):
    return changed("config.json", **fields)


def generation(**fields):
    return changed("generation_config.json", **fields)


def code(name: str, **fields):
    def change(folder: Path) -> None:
        (folder / "evil.py").write_text(EVIL, encoding="utf-8")
        changed(name, **fields)(folder)

    return change


def written(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def weights(change):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def index(named: object):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(named), encoding="utf-8")

    return change


def pickled(content: object):
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(state if content is None else content, folder / "pytorch_model.bin")

    return change


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


def adapter_beside(folder: Path) -> None:
    changed("adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder))(folder)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


AUTO = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X", "AutoTokenizer": ["evil.X", None]}
DEEP = "[" * 100_000 + "]" * 100_000
KINDS = {
    # name: (change, words of the sentence, or None where the model loads)
    "code of the model": (code("config.json", auto_map=AUTO, model_type="evil"), r"Python code of its own \(evil.X\).*never run"),
    "code of a known type": (code("config.json", auto_map=AUTO), None),
    "code of the tokenizer": (code("tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil"), r"Python code of its own \(evil.X\)"),
    "code in another repository": (code("config.json", auto_map={"AutoConfig": "a/b--evil.X"}, model_type="evil"), "a/b--evil.X"),
    "damaged auto_map": (config(auto_map=[1]), None),
    "custom_pipelines": (code("config.json", custom_pipelines={"x": {"impl": "evil.X"}}), None),
    "kernel of the hub": (config(attn_implementation="someone/kernel"), "cannot build model"),
    "unknown type": (config(model_type="nope"), "is of type nope, which is not a causal language model"),
    "no type": (config(model_type=None), "is of type None, which is not a causal language model"),
    "type is a list": (config(model_type=["llama"]), r"is of type \['llama'\], which is not a causal language model"),
    "an encoder-decoder": (config(model_type="t5", architectures=["T5Model"]), "cannot be loaded|not a causal language model"),
    "unknown activation": (config(hidden_act="relu9"), "hidden_act is `relu9`, .* did you mean `relu`. Known values are gelu.*silu"),
    "unknown rope": (config(rope_parameters={"rope_type": "yarm"}), r"rope_parameters.rope_type is `yarm`, .* did you mean `yarn`"),
    "no positions": (config(max_position_embeddings=0), "has 0 positions"),
    "negative positions": (config(max_position_embeddings=-2), "has -2 positions"),
    "end in text": (generation(eos_token_id="</s>"), 'eos_token_id in generation_config.json of model .* "</s>".*token .0 to 31'),
    "end among others in text": (generation(eos_token_id=[1, "x"]), "eos_token_id .* not a token of the model"),
    "end beyond the vocabulary": (generation(eos_token_id=32), "has 32, which is not a token of the model"),
    "negative end": (generation(eos_token_id=-1), "has -1, which is not a token of the model"),
    "last token ends": (generation(eos_token_id=31), None),
    "end in text in config.json": (config(eos_token_id="</s>"), "eos_token_id is '</s>', which is not a valid value of this field"),
    "sizes are words": (config(hidden_size="16"), "config.json of model .* cannot be read .*expected int, got str"),
    "sizes are negative": (config(head_dim=-1), "cannot build model .* from its config.json .*; correct the file"),
    "key-value heads are true": (config(num_key_value_heads=True), "num_key_value_heads is True, which is not a valid value of this field"),
    "a million layers": (config(num_hidden_layers=10**6), "has 1000000 layers"),
    "longest text is a word": (changed("tokenizer_config.json", model_max_length="x"), "model_max_length .* is 'x'; write a number"),
    "key-value heads are a list": (config(num_key_value_heads=[1]), r"heads is \[1\], which is not a valid value of this field"),
    "no layers": (config(num_hidden_layers=0), "more layers than num_hidden_layers in config.json"),
    "fewer layers": (config(num_hidden_layers=2), r"more layers than num_hidden_layers in config.json \(weights model.layers.2"),
    "more layers": (config(num_hidden_layers=5), "9 weights .* are missing"),
    "larger vocabulary": (config(vocab_size=99), r"another shape.*\[32, 16\], but needs \[99, 16\].*vocab_size"),
    "other width": (config(intermediate_size=8), "another shape"),
    "config is damaged": (written("config.json", "{"), "config.json of model .* is damaged"),
    "config is a list": (written("config.json", "[1]"), "config.json of model .* is not a JSON object"),
    "config is empty": (written("config.json", ""), "config.json of model .* is empty"),
    "config is deep": (written("config.json", DEEP), "config.json of model .* is damaged"),
    "config is not UTF-8": (written("config.json", b"\xff\xfe\x00"), "config.json of model .* is damaged"),
    "weights are an LFS pointer": (written("model.safetensors", POINTER), "model.safetensors .* pointer of Git LFS; run `git lfs pull`"),
    "chat template is an LFS pointer": (written("chat_template.jinja", POINTER), "chat_template.jinja .* pointer of Git LFS"),
    "no merges": (written("merges.txt", ""), None),
    "tokenizer is an LFS pointer": (written("tokenizer.json", POINTER), "tokenizer.json .* pointer of Git LFS"),
    "weights are empty": (written("model.safetensors", b""), "model.safetensors of model .* is empty"),
    "weights are cut": (cut("model.safetensors"), "cannot be loaded.*incomplete"),
    "weights are garbage": (written("model.safetensors", b"garbage" * 99), "cannot be loaded"),
    "weights promise 2 EB": (written("model.safetensors", b"\xff" * 64), "cannot be loaded"),
    "weights lack one": (weights(lambda s: {k: v for k, v in s.items() if "q_proj" not in k}), "4 weights .* are missing"),
    "weights have a prefix": (weights(lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}), ".* weights .* are missing"),
    "weights have an extra part": (weights(lambda s: {**s, "vision.encoder.weight": torch.zeros(1)}), None),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "has no tokenizer .tokenizer.json.; save its tokenizer into the same directory",
    ),
    "no weights": (removed("model.safetensors"), "not a complete Hugging Face model"),
    "index leaves its folder": (index({"weight_map": {"a": "../secret.safetensors"}}), "is outside the folder of the model"),
    "index is absolute": (index({"weight_map": {"a": "/etc/passwd"}}), "is outside the folder of the model"),
    "index is a list": (index([1]), "is not a JSON object"),
    "index names a file that cannot exist": (index({"weight_map": {"a": "x" * 300}}), "does not map weights to files"),
    "index maps nothing": (index({"weight_map": {"a": 1}}), "does not map weights to files"),
    "index without a file": (index({"weight_map": {"a": "model-2.safetensors"}}), "not a complete Hugging Face model"),
    "pickled weights": (pickled(None), None),
    "a pickle with code": (pickled(Evil()), "cannot be loaded"),
    "tokenizer is damaged": (written("tokenizer.json", "{"), "the tokenizer of model .* cannot be read"),
    "tokenizer is garbage": (written("tokenizer.json", '{"model": 1, "added_tokens": 5}'), "the tokenizer of model .* cannot be read"),
    "tokenizer has no EOS": (changed("tokenizer_config.json", eos_token=None), "no EOS token"),
    "generation config is damaged": (written("generation_config.json", "{"), None),
    "adapter beside the model": (adapter_beside, "contains both a whole model and an adapter"),
    "quantised by unknown": (config(quantization_config={"quant_method": "nope"}), "quantised as nope"),
    "quantised by GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}), "cannot be loaded"),
    "NUL in a name": (config(architectures=["a\x00b"]), None),
}


def test_enough_kinds():
    assert len(KINDS) >= 37


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_strangers_model_is_refused_or_loaded(kind, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change, words = KINDS[kind]
    change(folder)
    load = str(folder)
    if words is None:
        load_tokenizer(load)
        headers, model = check_model(load), load_model(load)
        assert {k: v.shape for k, v in headers.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert all(p.requires_grad for p in model.parameters())
    else:
        for read in (check_model, load_model):  # the headers tell what the whole files tell
            with pytest.raises(ModelError, match=words):
                (load_tokenizer(load), read(load))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, whole, tmp_path):
    """They would fail while a stage samples, in a sentence of torch."""
    shutil.copytree(whole, tmp_path / "model")
    weights(lambda state: {**state, "model.norm.weight": state["model.norm.weight"].index_fill(0, torch.tensor(3), value)})(
        tmp_path / "model"
    )
    with pytest.raises(ModelError, match=r"the weight model.norm.weight contains NaN or infinite values; download the model again"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_without_permission_is_not_called_damaged(name, whole, monkeypatch):
    original = Path.open

    def refuse(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    for read in (check_model, load_tokenizer):
        with pytest.raises(ModelError, match=rf"{name} of model `{whole}` cannot be read \(Permission denied\); check its permissions"):
            read(str(whole))


def test_every_call_of_transformers_forbids_code():
    """Each from_pretrained and from_config of the package says trust_remote_code=False."""
    found = 0
    texts = {path: path.read_text(encoding="utf-8") for path in Path(tadistill.__file__).parent.rglob("*.py")}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)) if "from_pretrained" in text or "from_config" in text else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("from_pretrained", "from_config"):
                given = {word.arg: word.value for word in node.keywords}
                value = given.get("trust_remote_code")
                assert isinstance(value, ast.Constant), f"{path}:{node.lineno}"
                assert value.value is False, f"{path}:{node.lineno}"
                found += 1
    assert found >= 7


# --- adapters -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(whole, tmp_path):
    """A LoRA adapter as peft saves it, and what its base with the adapter computes."""
    peft = pytest.importorskip("peft")
    model = load_model(str(whole))
    tuner = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(whole)))
    torch.manual_seed(0)
    for name, parameter in tuner.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    tuner.save_pretrained(tmp_path / "lora")
    changed("adapter_config.json", base_model_name_or_path=str(whole))(tmp_path / "lora")
    return tmp_path / "lora", tuner.eval()


def test_an_adapter_is_merged_with_its_base(adapter, whole):
    folder, tuner = adapter
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        want, base, got = (m(input_ids=ids).logits for m in (tuner, load_model(str(whole)), load_model(str(folder))))
    assert (want - base).abs().max() > 0.01
    assert torch.allclose(got, want, atol=1e-5)
    assert load_tokenizer(str(folder)).get_vocab() == word_tokenizer().get_vocab()
    assert all(p.requires_grad for p in load_model(str(folder)).parameters())


def test_an_adapter_of_the_hub(adapter, whole, tmp_path, monkeypatch):
    """Adapter and base lie in the hub's cache; the adapter is merged with its base, counted like it, and its base is known."""
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, tuner = adapter
    changed("adapter_config.json", base_model_name_or_path="org/base", revision="v1")(folder)
    for name in ("org/lora", "org/base"):
        assert sources.locate(name) is None
    with pytest.raises(ModelError, match="model `org/lora` at revision `main` is not in the local Hugging Face cache"):
        load_model("org/lora")
    cached_repository(tmp_path / "hub", folder, name="org/lora")
    assert sources.adapter_base("org/lora") == ("org/base", "v1")
    assert sources.description_file("org/lora") is None
    assert sources.locate("org/lora") is None
    with pytest.raises(ModelError, match="model `org/base` at revision `v1` is not in the local Hugging Face cache"):
        load_model("org/lora")
    cached_repository(tmp_path / "hub", whole, name="org/base", branch="v1")
    assert read_config("org/lora")["hidden_size"] == 16
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(load_model("org/lora")(input_ids=ids).logits, tuner(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert load_tokenizer("org/lora").get_vocab() == word_tokenizer().get_vocab()
    assert check_model("org/lora").config.hidden_size == 16
    assert sources.locate("org/lora") == sources.fetch("org/lora", weights=False)
    assert sources.fingerprint("org/lora") == "hub:org/lora@main"
    changed("adapter_config.json", base_model_name_or_path="org/lora", revision=None)(folder)
    cached_repository(tmp_path / "hub", folder, name="org/lora", branch="v2", commit="d" * 40)
    with pytest.raises(ModelError, match="adapter `org/lora` belongs to `org/lora`, which is an adapter too"):
        load_model("org/lora", revision="v2")
    changed("adapter_config.json", base_model_name_or_path="/home/them/base")(folder)
    cached_repository(tmp_path / "hub", folder, name="org/lora", branch="v3", commit="e" * 40)
    with pytest.raises(
        ModelError, match=r"`/home/them/base`, which is no directory here and no hub id; .*hf download org/lora --local-dir DIR"
    ):
        load_model("org/lora", revision="v3")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_model_name_or_path": None}, "does not name its base model; write the base's hub id"),
        ({"base_model_name_or_path": "/" + "x" * 300}, "not a valid path"),
        ({"base_model_name_or_path": "."}, "which is an adapter too"),
        ({"base_model_name_or_path": "/no/where/base"}, "belongs to the model `/no/where/base`, which is no directory here and no hub id"),
        ({"peft_type": "PREFIX_TUNING"}, "only LORA adapters"),
        ({"target_modules": ["nope"]}, "cannot be merged with its base"),
        ({"target_modules": ["v_proj"]}, "does not fit its base"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "has the setting megatron_config"),
    ],
)
def test_an_adapter_that_cannot_be_merged(adapter, fields, words):
    changed("adapter_config.json", **fields)(adapter[0])
    with pytest.raises(ModelError, match=words):
        load_model(str(adapter[0]))


def test_saved_models_can_be_read_by_others(whole, tmp_path):
    from tadistill.models.loading import save_model

    (whole / "x").write_text("x", encoding="utf-8")
    save_model(load_model(str(whole)), load_tokenizer(str(whole)), tmp_path / "out")
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {(whole / "x").stat().st_mode & 0o777}
