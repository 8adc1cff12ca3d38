"""Imported once by the server that stages are forked from: everything that each of them needs and that takes time.

It makes imports and tables only: threads, which computations start, do not survive a fork, nor does CUDA.
"""

import gc

import torch.profiler  # noqa: F401
from rouge_score import rouge_scorer  # noqa: F401 (imports nltk and scipy)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

from tadistill.data import tinyworld
from tadistill.plan.specs import KINDS
from tadistill.stages.execute import work_of

for spec in KINDS.values():
    work_of(spec)  # imports it
tinyworld.rows("tinyworld", "train")  # makes and keeps the default world, which most small studies read
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns at the first call

gc.collect()
gc.freeze()  # the collector of a process would write to, and so copy, all pages that it shares with the server
