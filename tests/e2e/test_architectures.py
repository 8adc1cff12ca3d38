"""Every causal language model of transformers samples and trains right, or is refused by name."""

import pytest
import torch
from tests.conftest import naming
from tests.families import VOCAB, assert_agrees, deeper, tiny, tiny_config
from tests.unit.models.conftest import word_tokenizer
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tadistill.errors import ConfigError, ModelError
from tadistill.models import forward
from tadistill.models.architectures import build_on_meta, check_architecture, read_config
from tadistill.models.forward import check_reading
from tadistill.models.loading import load_model, save_model
from tadistill.models.pruning import _pruned, _stack, check_depth
from tadistill.models.shapes import ENCODERS, REFUSED

torch.set_num_threads(1)
ENCODER_DECODERS = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper"),
)
AS_DECODERS = {*ENCODERS, *ENCODER_DECODERS, "xlm"}
"""Types that are refused as they usually are, and agree when their config.json says that they are decoders."""
NEEDS_PACKAGES = ("gemma3n",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_agrees_or_is_refused_by_name(kind, monkeypatch, tmp_path):
    if kind in {*REFUSED, *AS_DECODERS}:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}', encoding="utf-8")
        with pytest.raises(ModelError, match=f"`my {kind}`"):
            read_config(tmp_path, f"my {kind}")
    elif kind in NEEDS_PACKAGES:
        with pytest.raises(ImportError):
            build_on_meta(AutoConfig.for_model(kind))
    if kind not in REFUSED and kind not in NEEDS_PACKAGES:
        model = tiny(kind)
        tiny_config(kind).save_pretrained(tmp_path)
        read_config(tmp_path, kind)
        check_architecture(model.config, kind)  # what training saves can be loaded
        check_reading(model)
        assert_agrees(model)
        monkeypatch.setattr(forward, "_UNMASKED", {"cpu"})  # as on a GPU
        check_reading(model)


PRUNED = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in {*REFUSED, *NEEDS_PACKAGES}]
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
READS_EARLIER_LAYERS = ("openai-gpt", "zaya")
"""Types whose layers get more from the layer before than a hidden state, or return something else: `skipped` cannot leave layers out."""
NO_STACK = (
    *(*ENCODER_DECODERS, "fuyu", "gemma3", "gemma4", "gemma4_unified", "got_ocr2", "hrm_text", "longcat_flash"),
    *("moss_transcribe_diarize", "xlm"),
)
"""Types without a single stack of layers that their configuration counts."""


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits[..., 1:]  # without the padding token, whose embedding Youtu clears when it is loaded


def skipped(model, keep):
    """The logits of a model that leaves out all layers but `keep`, each layer in its old place."""
    layers = model.get_submodule(_stack(model, model.config.num_hidden_layers))
    outputs = {}
    hooks = [layer.register_forward_hook(lambda _, __, out, i=i: outputs.update({i: out})) for i, layer in enumerate(layers)]
    logits(model)
    for hook in hooks:
        hook.remove()
    left = [i for i in range(len(layers)) if i not in keep]
    for i in left:
        rest = outputs[i][1:] if isinstance(outputs[i], tuple) else None
        layers[i].forward = lambda x, *_, rest=rest, **__: x if rest is None else (x, *rest)
    found = logits(model)
    for i in left:
        del layers[i].forward
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PRUNED)
def test_a_pruned_model_is_that_of_its_layers_or_is_refused_before_work(kind, tmp_path):
    model = tiny(kind, **deeper(kind))
    logits(model)  # what a forward pass changes in a model is not pruned
    total, built = getattr(model.config, "num_hidden_layers", None), 0
    total = total if isinstance(total, int) else 1
    tokenizer = word_tokenizer(VOCAB - 3)
    for keep in dict.fromkeys(((0, total - 1), tuple(range(1, total, 2)), tuple(range(total)))):
        with naming(keep):
            if built and len(keep) == total:  # the whole model is pruned only where no other list is accepted
                break
            try:
                check_depth(model.config, keep)
            except (ConfigError, ModelError):
                continue
            pruned = _pruned(model, keep)  # what `prune_depth` does after `check_depth`
            assert_same_weights(model, pruned, keep)
            expected = logits(pruned)
            if kind not in READS_EARLIER_LAYERS:
                torch.testing.assert_close(expected, skipped(model, keep), atol=1e-4, rtol=1e-4)
            if not built:
                save_model(pruned, tokenizer, tmp_path)
                torch.testing.assert_close(logits(load_model(tmp_path)), expected, atol=1e-5, rtol=1e-5)
                if layers_differ(model):
                    assert_agrees(pruned, leaves=False)
            built += 1
    assert bool(built) != (kind in NO_STACK)


def layers_differ(model):
    """Whether the layers are of several kinds. If not, a pruned model samples as the whole one does in the test above."""
    layers = model.get_submodule(_stack(model, model.config.num_hidden_layers))
    return len({str(layer) for layer in layers}) > 1 or len({*(getattr(model.config, "layer_types", None) or ())}) > 1


def assert_same_weights(model, pruned, keep):
    before, stack = model.state_dict(), _stack(model, model.config.num_hidden_layers)
    for name, weight in pruned.state_dict().items():
        inside = name.removeprefix(f"{stack}.")
        number, _, rest = inside.partition(".")
        assert torch.equal(weight, before[f"{stack}.{keep[int(number)]}.{rest}" if inside != name else name]), name
