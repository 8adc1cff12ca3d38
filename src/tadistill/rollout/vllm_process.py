"""The program of the process in which vLLM samples text. `rollout.vllm` starts it with the Python of an environment that has vLLM.

That environment need not have tadistill, so this file imports only the standard library, vLLM and vLLM's torch. Each line of the standard
input is an order as JSON:

    {"engine": {...}, "weights": {...}}              the first line: arguments of `vllm.LLM`, and where the weights are (`_load`)
    {"order": "load"}                                load the weights that the training process has written into shared memory
    {"order": "respond", "prompts": [...], "settings": {...}, "seeds": [...]}
    {"order": "sleep"}                               give the GPU's memory back until the next `load`

An answer is one line of JSON on the standard output: the version of vLLM after the first order; {} after `load` and `sleep`; and one line
for each response to `respond`, as soon as the response has ended. What vLLM itself prints goes to the standard error.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Start vLLM, and execute the orders from the standard input until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own output goes to the standard error

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    vllm = importlib.import_module("vllm")  # the package vLLM, and not the file `vllm.py` in this directory
    engine, asleep = vllm.LLM(**first["engine"]), False
    say({"version": vllm.__version__})
    for line in sys.stdin:
        order = json.loads(line)
        match order["order"]:
            case "load":
                if asleep:
                    engine.wake_up(tags=["weights"])
                engine.collective_rpc(_load, kwargs=first["weights"])
                if asleep:
                    engine.wake_up(tags=["kv_cache"])
                asleep = False
                say({})
            case "respond":
                _respond(engine, order, say)
            case "sleep":
                engine.sleep(level=2)
                asleep = True
                say({})


def _load(worker: Any, path: str, size: int, entries: list[tuple[str, str, list[int], int, int]]) -> None:
    # runs in every worker of the engine; an entry is a weight's name, dtype, shape, and its first and last byte
    import torch

    memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    weights = ((name, memory[start:end].view(getattr(torch, dtype)).view(shape)) for name, dtype, shape, start, end in entries)
    worker.reload_weights(weights_iterator=weights)
    if worker.device.type == "cpu":
        # A CPU computes with packed copies of the weights. A head that shares the embeddings' weights is not loaded by its own name, and
        # vLLM 0.32 would leave its copy as it was.
        for layer in worker.get_model().modules():
            if hasattr(layer, "cpu_linear") and hasattr(layer, "tie_weights"):
                layer.quant_method.process_weights_after_loading(layer)


def _respond(engine: Any, order: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    params = importlib.import_module("vllm").SamplingParams
    settings = [params(seed=seed, **order["settings"]) for seed in order["seeds"]]
    prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
    names = engine.enqueue(prompts, settings, use_tqdm=False)  # ascending numbers, each with "-" and random letters
    first = int(names[0].partition("-")[0])
    while engine.llm_engine.has_unfinished_requests():
        for request in engine.llm_engine.step():
            if request.finished:
                (output,) = request.outputs
                tokens = list(output.token_ids)
                scores = output.logprobs and [found[token].logprob for token, found in zip(tokens, output.logprobs)]  # noqa: B905
                say({"place": int(request.request_id) - first, "tokens": tokens, "log_q": scores})


if __name__ == "__main__":
    main()
