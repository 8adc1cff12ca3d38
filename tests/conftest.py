"""Shared fixtures: tiny random models and a browser. Torch is imported in functions: the process that starts the workers needs none."""

import tests.environment  # noqa: F401  first: torch and the Hugging Face libraries read their variables when they are imported

# isort: split
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.versions import NEWER, too_old

LONGEST = [
    "e2e/test_gpu_kit",
    *("slurm/test_slurm", "e2e/test_recipes", "e2e/test_study", "e2e/test_interrupted", "e2e/test_one_store", "e2e/test_architectures"),
    *("e2e/test_layouts", "unit/models/test_sources", "unit/report/test_browser", "e2e/test_example", "e2e/test_on_policy"),
    *("unit/plan/test_costs", "e2e/test_lora", "e2e/test_advise", "e2e/test_edges", "e2e/test_judge", "e2e/test_signals", "e2e/test_ranks"),
    *("architecture/test_add_one", "unit/search/test_command", "e2e/test_how_to", "unit/test_fuzz", "unit/test_statistics_coverage"),
    *("unit/report/test_outputs", "unit/rollout/test_generate", "unit/plan/test_keys", "unit/objectives/test_fused_loss"),
    *("unit/judge/test_judge", "unit/cluster/test_fetch"),
]
"""Files that start first, so that no long one runs alone at the end."""
CHROMIUM = Path("/usr/bin/chromium")
ARGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync"]  # fmt: skip


def pytest_xdist_auto_num_workers(config) -> int:
    """Return the number of cores, at most four, and one more with `-n auto`: tests that submit to Slurm or start programs often wait."""
    return min(4, os.cpu_count() or 1) + (config.option.numprocesses == "auto")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Collect garbage neither while modules are imported nor, later, among what they have made: that takes seconds in every worker."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(20_000, 50)  # with Python's 700 and 10, collections take seconds of the unit tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Sort the longest files first, mark the tests that need a browser, and skip those that need a newer transformers."""
    folder, reason = Path(__file__).parent, too_old()

    def place(item) -> int:
        name = str(item.path.relative_to(folder).with_suffix(""))
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")
        if reason and (item.name.startswith(NEWER) or "gguf_file" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason))
    items.sort(key=place)


@pytest.fixture(autouse=True, scope="module")
def own_garbage():
    """Collect the garbage of a file, and let later collections pass over what is left: each stage ends with one."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def own_precision():
    """Forget the precision that accelerate keeps for a whole process: the trainers of peers choose bf16."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True, scope="module")
def own_signals():
    """Restore the handlers and the mask of signals: a command that is interrupted ignores further signals, because its process ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before, mask = {number: signal.getsignal(number) for number in numbers}, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def naming(*what: object) -> Iterator[None]:
    """Name a case in the traceback if it fails. Many tiny cases are one test, because pytest needs 3 ms for each test."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {', '.join(map(str, what))}")
        raise


def response_logits(model, batch, vocab):
    """Return the (N, vocab) logits at the N positions that the mask counts."""
    from tadistill.models.forward import Reader

    reader = Reader(model)
    return reader.head.logits(reader.hidden(model, batch))[:, :vocab].float()


def tiny_model(kind: str, *, vocab: int = 31, seed: int = 0, layers: int = 2, **settings):
    """Build a random model of a few thousand parameters, in eval mode, with logits far from uniform."""
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    common = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=layers, n_head=2, **{"n_positions": 128} | common | settings))
    elif kind == "opt":
        sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
        model = hf.OPTForCausalLM(hf.OPTConfig(max_position_embeddings=128, **sizes, **common, **settings))
    else:
        config, model_class = {
            "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
            "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
            "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
            "gemma3_text": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM),
        }[kind]
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        model = model_class(config(max_position_embeddings=128, **common, **(sizes | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


@cache
def shared_model(kind: str, **settings):
    """Return a `tiny_model` that tests of a process share, and must not change. The ways to sample from it are tried only once."""
    return tiny_model(kind, **settings)


@pytest.fixture(params=["gpt2", "llama"])
def kind(request) -> str:
    """Run a test with learned absolute and with rotary positions."""
    return request.param


@pytest.fixture(scope="module")
def browser():
    """Start Debian's Chromium under playwright for the tests of a file. They skip with a message where either is absent."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield chromium
        chromium.close()
