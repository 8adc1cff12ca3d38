"""Every causal language model of transformers samples and trains right, or is refused by name."""

import pytest
import torch
from tests.families import assert_agrees, tiny, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tadistill.errors import ModelError
from tadistill.models.architectures import check_architecture, check_config
from tadistill.models.forward import check_reading
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
def test_agrees_or_is_refused_by_name(kind):
    if kind in {*REFUSED, *AS_DECODERS, *NEEDS_PACKAGES}:
        with pytest.raises(ModelError, match=f"`my {kind}`"):
            check_config({"model_type": kind}, f"my {kind}")
    if kind not in REFUSED and kind not in NEEDS_PACKAGES:
        model = tiny(kind)
        check_config(tiny_config(kind).to_dict(), kind)
        check_architecture(model.config, kind)  # what training saves can be loaded
        check_reading(model)
        assert_agrees(model)
