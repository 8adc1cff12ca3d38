"""Tests that compare with a newer transformers than the package needs. With an older one they are skipped.

With transformers 5.8.0 (torch 2.13), 54 of 6,042 unit tests failed, and none of them showed an error of the package.
"""

import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

_EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
_WANTED = next(r.specifier for r in map(Requirement, _EXTRAS["dev"]) if r.name == "transformers")
NEWER = (
    # transformers itself writes the text of a chat template
    "test_the_text_is_that_of_transformers",
    "test_templates_reach_as_little_of_python_as_in_transformers",
    # GGUF files need the newer version
    *("test_a_gguf_file", "test_gguf_", "test_wheels_that_pip_does_not_find", "test_files_that_a_wheel_has_not", "test_the_real_wheel"),
    "test_read_config",
    # types of models that the older version lacks, or computes or refuses in another way
    *(f"test_refused_types_are_named_with_the_reason[{name}" for name in ("gemma4_unified_assistant]", "musicgen")),
    "test_layers_that_share_a_weight_get_no_adapters",
    "test_flops_equal_those_that_torch_counts",
    "test_a_strangers_model_is_refused_or_loaded[kernel of the hub]",
    "test_tokens_and_logits_are_those_of_whole_forward_passes[deepseek_v4]",
    "test_equals_the_loop_over_positions[gpt2-0.05]",
    "test_positions_have_other_names_and_limits_in_other_families",
)
"""Beginnings of the names of tests."""


def too_old() -> str:
    """Return why these tests cannot run with the installed transformers. Empty if they can."""
    has = version("transformers")
    return "" if _WANTED.contains(has, prereleases=True) else f"compares with transformers {_WANTED}, but {has} is installed"
