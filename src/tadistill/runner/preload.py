"""The slow imports that every stage needs. A server process imports this module once, and is then forked for each stage.

This module must not compute anything, because computations start threads. Neither threads nor CUDA survive a fork.
"""
# ruff: noqa: E402

import atexit
import gc

gc.disable()  # imports leave much memory and little garbage; the collector, which looks through all of it, would take a fifth of their time

import torch.profiler  # noqa: F401
from nltk.stem import porter  # noqa: F401 (imports scipy)
from rouge_score import scoring, tokenize  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

from tadistill.data import tinyworld
from tadistill.plan.kinds import KINDS
from tadistill.stages.execute import versions, work_of

for spec in KINDS.values():
    work_of(spec)  # imports it
tinyworld.world_rows("tinyworld", "train")  # makes and keeps the default world, which most small studies read
versions()
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns at the first call

gc.freeze()  # without it, a process's collector would write to all pages that it shares with the server, and so copy them
atexit.register(gc.unfreeze)  # what is never freed, some libraries report as leaked when the server ends (triton 3.9: 25 lines)
gc.enable()
