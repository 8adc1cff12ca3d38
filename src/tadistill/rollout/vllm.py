"""Sampling with vLLM in a second process, which runs `vllm_process.py` with the Python of the environment that has vLLM.

vLLM has its own copy of the model, which starts without weights. Both processes map the same memory: the training process writes weights
there, and vLLM loads them. The weights never pass through a file on the disk, and the processes may have different versions of torch.
Adapters are merged into the weights that are written. The vocabulary of the copy is cut to the tokens that all models share, so that no
other token can be sampled.

Axes: B sequences, T tokens.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill.config.common import Decoding
from tadistill.config.machine import Vllm as Settings
from tadistill.config.machine import vllm_folder
from tadistill.errors import StageFailed
from tadistill.models.flops_and_memory import visible_gpus
from tadistill.models.forward import evaluating
from tadistill.models.modify import plain_weights
from tadistill.rollout import vllm_process
from tadistill.rollout.draw import Guide, Rollout
from tadistill.rollout.engine import Prompt, Tick
from tadistill.text import counted

_ALIGNED = 64  # each weight begins at a multiple of this number of bytes
_CHECKED = 16  # number of tokens that are sampled to compare vLLM's log-probabilities with those of transformers
_APART = {torch.float32: 0.01, torch.bfloat16: 0.1}
"""Largest accepted difference of log-probabilities between vLLM and transformers, as a share of their size. Rounding causes less."""
_LONGEST_SOCKET = 107  # largest number of bytes of a socket's path
_GOODBYE = 10.0  # seconds in which vLLM's process may end by itself
_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that vLLM's process does not get: they concern only this process, or vLLM's sleep mode does not work with them."""
_ERROR = re.compile(r"\w+(?:Error|Exception): .*")


@dataclass(frozen=True)
class Launch:
    """The settings with which vLLM's process is started."""

    settings: Settings
    device: torch.device
    """The device of this process. vLLM uses the same GPU, and the GPUs after it if it needs several."""
    dtype: torch.dtype
    """Number format of vLLM's weights and computations."""
    longest: int
    """Largest number of tokens of a prompt and its response together."""
    log: Path
    """The file to which vLLM's messages are appended."""
    changes: bool
    """True if the model's weights change between two calls of `respond`."""


class Vllm:
    """The engine that samples with vLLM. Its process starts at the first call of `respond`. Call `close` at the end.

    The seed of a response is made from its random numbers, so the same machine and vLLM version give the same tokens again. The tokens
    differ from those of `Native`.
    """

    def __init__(self, student: PreTrainedModel, decoding: Decoding, *, eos: tuple[int, ...], vocab: int, launch: Launch):
        self.student, self.decoding, self.eos, self.vocab, self.launch = student, decoding, eos, vocab, launch
        self.version: str | None = None
        """The version of vLLM. None before its process has started."""
        self._process: subprocess.Popen[str] | None = None
        self.close: Callable[[], object] = lambda: None
        """End the process."""

    def respond(
        self, prompts: Seq[Prompt], uniforms_BT: np.ndarray, guide: Guide | None = None, tick: Tick = lambda _: None
    ) -> list[Rollout]:
        """Return responses like `Engine.respond`. They have log-probabilities only if the decoding settings do not change the distribution.

        Raises:
            ConfigError: vLLM is not installed.
            StageFailed: vLLM cannot run the model, or its process has ended.
        """
        assert guide is None, "vLLM cannot sample with the help of a teacher; the check of the recipe should have refused this"
        if not prompts:
            return []
        if self._process is None:
            self._start()
        elif self.launch.changes:
            self._hand_over()
        seeds = [int(row[0] * 2**53) for row in uniforms_BT]
        found = self._sample(prompts, seeds, self.decoding, uniforms_BT.shape[1], tick)
        if self._sleeps:
            self._order({"order": "sleep"})
        return found

    def _sample(
        self, prompts: Seq[Prompt], seeds: Seq[int], decoding: Decoding, longest: int, tick: Tick = lambda _: None
    ) -> list[Rollout]:
        settings = {
            "temperature": decoding.temperature,
            "top_k": decoding.top_k or 0,
            "top_p": decoding.top_p,
            "min_p": decoding.min_p,
            "max_tokens": longest,
            "stop_token_ids": list(self.eos),
            "ignore_eos": True,  # only the tokens above end a response, whatever the model's own files say
            "detokenize": False,
            "logprobs": 0 if decoding.plain else None,  # of the sampled token only
        }
        self._say({"order": "respond", "prompts": [list(prompt) for prompt in prompts], "settings": settings, "seeds": seeds})
        found: dict[int, Rollout] = {}
        while len(found) < len(prompts):
            answer = self._hear()
            log_q = None if answer["log_q"] is None else np.array(answer["log_q"], np.float32)
            values = {} if log_q is None else {"behaviour": log_q, "student": log_q}
            found[answer["place"]] = Rollout(tuple(answer["tokens"]), values)
            tick(1)
        return [found[place] for place in range(len(prompts))]

    # --- weights --------------------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        self._memory.write(self._weights())
        self._make_room()
        self._order({"order": "load"})

    def _make_room(self) -> None:
        # vLLM takes its share of the GPU now, but this process's allocator still holds what the last update needed at its peak
        if self.launch.device.type == "cuda":
            torch.cuda.empty_cache()

    def _weights(self) -> dict[str, Tensor]:
        ends = [module for module in (self.student.get_input_embeddings(), self.student.get_output_embeddings()) if module is not None]
        rows = {parameter.data_ptr() for module in ends if isinstance(module, nn.Module) for parameter in module.parameters(recurse=False)}
        return {name: w[: self.vocab] if w.data_ptr() in rows else w for name, w in plain_weights(self.student).items()}

    def _check(self) -> None:
        # tokens that vLLM samples must have the log-probabilities that transformers gives them
        prompt, count = (self.vocab // 2,), min(_CHECKED, self.launch.longest - 1)
        (found,) = self._sample([prompt], [1], Decoding(), count)
        ids = torch.tensor([prompt + found.tokens], device=self.student.device)
        with evaluating(self.student), torch.inference_mode():
            logits = self.student(input_ids=ids, use_cache=False).logits[0, :-1, : self.vocab].float()
        log_q = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy()
        apart, size = np.abs(log_q - found.values["student"]).mean(), max(1.0, np.abs(log_q).mean())
        if not apart <= _APART[self.launch.dtype] * size:
            raise StageFailed(
                f"vLLM computes other probabilities than transformers for this {self.student.config.model_type} model (log-probabilities "
                f"differ by {apart:.3g} nats on average), so vLLM cannot sample from it; use `engine: native`"
            )

    # --- the process ----------------------------------------------------------------------------------------------------

    @property
    def _sleeps(self) -> bool:
        return self.launch.settings.sleep and self.launch.changes and self.launch.device.type == "cuda"

    def _start(self) -> None:
        weights, python = self._weights(), vllm_folder() / "python"
        self._memory = _SharedMemory(weights, self.launch.dtype)
        command, temporary = [str(python), "-I", str(vllm_process.__file__)], _temporary()
        unused = weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)  # if the process does not start
        with self.launch.log.open("a") as log, tempfile.TemporaryDirectory() as directory:
            self._describe().save_pretrained(directory)
            self._process = subprocess.Popen(
                command,
                env=_environment(self.launch) | {"TMPDIR": temporary},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C then reaches only the command, which decides which processes end
            )
            patience = _GOODBYE if self.launch.settings.tensor_parallel > 1 else 0.0
            self.close = weakref.finalize(self, _end, self._process, patience, temporary)
            unused.detach()
            self._make_room()
            self.version = self._order({"engine": self._arguments(directory), "weights": self._memory.layout})["version"]
        self._hand_over()
        self._check()

    def _describe(self) -> Any:
        config = copy.deepcopy(self.student.config)
        config.architectures = [type(self.student).__name__]
        text = config.get_text_config()
        text.vocab_size = self.vocab
        # vLLM does not need these ids for sampling, and refuses an id beyond the vocabulary
        text.bos_token_id = text.eos_token_id = text.pad_token_id = None
        return config

    def _arguments(self, directory: str) -> dict[str, Any]:
        settings, cuda = self.launch.settings, self.launch.device.type == "cuda"
        return {
            "model": directory,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": str(self.launch.dtype).removeprefix("torch."),
            "max_model_len": self.launch.longest,
            "gpu_memory_utilization": settings.memory,
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": not cuda if settings.eager is None else settings.eager,
            "enable_prefix_caching": False,  # it would serve keys and values of old weights
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        } | ({"enable_sleep_mode": True} if self._sleeps else {})

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        self._say(order)
        return self._hear()

    def _say(self, order: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _hear(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise self._ended()

    def _ended(self) -> StageFailed:
        self.close()
        said = _ERROR.findall(self.launch.log.read_text(errors="replace"))
        reason = said[-1] if said else "it printed no reason"
        return StageFailed(
            f"the process of vLLM has ended ({reason}); {self.launch.log} has all that it printed; mend the cause, or set `engine: "
            "native`, and run the same command again"
        )


class _SharedMemory:
    """Memory for a model's weights that another process of this machine can map too."""

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype):
        entries, end = list[tuple[str, str, list[int], int, int]](), 0
        for name, weight in weights.items():
            own = dtype if weight.is_floating_point() else weight.dtype
            start, end = end, end + weight.numel() * own.itemsize
            entries.append((name, str(own).removeprefix("torch."), list(weight.shape), start, end))
            end = -(-end // _ALIGNED) * _ALIGNED
        file = os.memfd_create("tadistill")  # memory without a name; it is freed when both processes have ended, however they end
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, end)
        self.layout = {"path": f"/proc/{os.getpid()}/fd/{file}", "size": end, "entries": entries}
        memory = torch.from_file(self.layout["path"], shared=True, size=end, dtype=torch.uint8)
        self._places = [memory[a:b].view(getattr(torch, own)).view(shape) for _, own, shape, a, b in entries]

    @torch.no_grad()
    def write(self, weights: dict[str, Tensor]) -> None:
        for place, weight in zip(self._places, weights.values(), strict=True):
            place.copy_(weight)


def _temporary() -> str:
    # a folder for all that vLLM leaves; its sockets are DIRECTORY/UUID, and a longer path than `_LONGEST_SOCKET` is refused by the system
    folder = tempfile.gettempdir()
    longest = len(os.fsencode(folder)) + len("/tv-12345678/") + len(str(uuid.UUID(int=0)))
    return tempfile.mkdtemp(prefix="tv-", dir="/tmp" if longest > _LONGEST_SOCKET else folder)


def _environment(launch: Launch) -> dict[str, str]:
    found = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"}  # kept for the next engine
    found |= {name: value for name, value in os.environ.items() if name not in _OURS}
    found |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in the process that we start, and in no third one
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are shared with training
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if launch.device.type == "cuda":
        count, first = launch.settings.tensor_parallel, launch.device.index or 0
        names = visible_gpus(torch.cuda.device_count())[first : first + count]
        if len(names) < count:
            raise StageFailed(
                f"`runtime.vllm.tensor_parallel` is {count}, but this stage has {counted(len(names), 'GPU')}; set it to at most "
                f"{len(names)}"
            )
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return found


def _end(process: "subprocess.Popen[str]", patience: float, temporary: str) -> None:
    # nothing in the process is needed, so it is killed after `patience` seconds, in which workers of several GPUs free their shared memory;
    # its sockets stay in its folder `temporary`
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):  # closing also sends what is still buffered, which fails if the process has ended
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    shutil.rmtree(temporary, ignore_errors=True)
