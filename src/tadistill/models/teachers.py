"""Teachers: frozen models whose outputs (hidden states or top-k log-probabilities) are the targets of a student's loss.

    teacher = teacher_of(model)                     # a model in this process: whole, sharded or offloaded
    teacher.target(batch)                           # its outputs at the N tokens of the loss, for `objectives.fused_loss`
    teacher.scored(batch, vocab)                    # these outputs, and the log-probability of the token after each of the N tokens

All other code treats all teachers in the same way, also those that run on servers of vLLM (`ServedHidden`, `ServedTopK`). A server runs the
model on the tokens of a batch, and this process computes the loss. For every token, a server sends one of two things. `POST /pooling`
returns the last hidden states after the final norm, as bytes. `POST /v1/completions` with `prompt_logprobs` returns the K most probable
tokens and the text's own token, each with its log-probability. `models.served_model` makes these teachers.

Axes: N tokens, T tokens of a sequence, H hidden, K tokens that a server sends at each position.

A teacher can also follow its student, as the moving average of the student's weights (`MovingAverage`).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedConfig, PreTrainedModel

from tadistill.config.sampling import TopKSignal
from tadistill.constants import LOG_ZERO
from tadistill.data.batch import Batch
from tadistill.models.forward import Reader
from tadistill.models.parameter_counts import Work
from tadistill.models.served_model_requests import Answer, Broken, Servers, read_json
from tadistill.models.shapes import positions_of
from tadistill.models.sharding import load_weights, reshard, weights
from tadistill.objectives import Head, Hidden, TopK
from tadistill.objectives.fused_loss import fused_log_probs
from tadistill.objectives.sparse import remaining


def nothing(work: Work) -> None:
    """Ignore the amount of work of a forward pass. This is the default of `Teacher.passed`."""


class Teacher:
    """Base class of all teachers, in this process or on a server."""

    device: torch.device
    """The device of the teacher's outputs."""
    width: int
    """Number of logits of the teacher's output head."""
    longest: int | None = None  # largest number of tokens of a text that the teacher can read; None if it is not known
    model: PreTrainedModel | None = None
    """The model itself, or None if it runs outside of this process. Samplers that need the teacher's logits for each new token need a model
    in this process."""
    config: Mapping[str, Any] = {}
    """The model's text configuration, if the model runs outside of this process."""
    passed: Callable[[Work], None] = staticmethod(nothing)
    """Function that gets the amount of work of every forward pass outside of this process. `train.monitoring` sets it, to count FLOPs."""

    def compare(self, vocab: int) -> None:
        """Prepare for a comparison of the first `vocab` tokens, which a student has too. By default, the caller cuts the logits."""

    def target(self, batch: Batch) -> Hidden | TopK:
        """Return the outputs at the N positions where the batch's mask is True, in row-major order. No gradient flows to them."""
        raise NotImplementedError

    def scored(self, batch: Batch, vocab: int) -> tuple[Hidden | TopK, Tensor]:
        """Return the outputs of `target`, and the log-probability (N,) of the token that follows each position.

        `vocab` is the number of tokens over which the probabilities are normalised.
        """
        raise NotImplementedError


class HiddenTeacher(Teacher):
    """Base class of the teachers whose outputs are their last hidden states. This process applies the output head to these states."""

    head: Head
    """The output head."""

    def hidden(self, batch: Batch) -> Tensor:
        """Return the inputs of the output head, of shape (N, H)."""
        raise NotImplementedError

    def target(self, batch: Batch) -> Hidden:
        with torch.no_grad():
            return Hidden(self.hidden(batch), self.head)

    def scored(self, batch: Batch, vocab: int) -> tuple[Hidden, Tensor]:
        target, tokens = self.target(batch), batch.counted(batch.targets_BT)
        return target, fused_log_probs(target.states, target.head, tokens, vocab=vocab).float()


class InProcess(HiddenTeacher):
    """A model in this process, which `models.sharding` may have sharded or offloaded."""

    def __init__(self, model: PreTrainedModel):
        self.model, self._model = model, model
        self.reader = Reader(model)
        self.width = self.head.weight.shape[0]
        self.longest = positions_of(model.config.get_text_config().to_dict())

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._model.device

    @property
    def head(self) -> Head:  # type: ignore[override]
        return self.reader.head

    def hidden(self, batch: Batch) -> Tensor:
        return self.reader.hidden(self._model, batch)


def teacher_of(model: PreTrainedModel | Teacher) -> Teacher:
    """Return a teacher unchanged. Wrap a transformers model in a teacher that runs in this process."""
    return model if isinstance(model, Teacher) else InProcess(model)


# --- teachers on servers ------------------------------------------------------------------------------------------------

POOLING, COMPLETIONS = "/pooling", "/v1/completions"


def _longest(servers: Servers, config: Mapping[str, Any]) -> int | None:
    # not what a server takes: results must not depend on how it was started
    return (positions := positions_of(config)) and positions - servers.serve.tokens_for(0)


class ServedHidden(HiddenTeacher):
    """A teacher whose servers send the last hidden states. Its output head is in this process."""

    def __init__(self, servers: Servers, name: str, config: PreTrainedConfig, head: Head):
        self._servers, self._name, self.head, self.config = servers, name, head, config.get_text_config(decoder=True).to_dict()
        self.device, self.width, self.longest = head.weight.device, head.weight.shape[0], _longest(servers, self.config)

    def hidden(self, batch: Batch) -> Tensor:
        rows, weight = sequences(batch, ahead=0), self.head.weight

        def read(number: int, answer: Answer) -> Tensor:
            return hidden_states(answer, len(rows.tokens[number]), weight.shape[1], weight.dtype)

        bodies = [hidden_request(self._name, ids, weight.dtype) for ids in rows.tokens]
        found = self._servers.post(POOLING, bodies, read)
        self.passed(replace(rows.work, heads=0))  # the head runs in this process, which counts it
        parts = [states[places] for states, places in zip(found, rows.places, strict=True)]
        return torch.cat(parts).to(self.device) if parts else weight.new_zeros(0, weight.shape[1])


class ServedTopK(Teacher):
    """A teacher whose servers send the K most probable tokens, and the log-probabilities of the text's own tokens."""

    def __init__(self, servers: Servers, name: str, config: PreTrainedConfig, device: torch.device, vocab: int):
        """`vocab` is the number of tokens of the tokenizer. The model may have more logits."""
        self._servers, self._name, self.device, self._vocab = servers, name, device, vocab
        self.config, self.width = config.get_text_config(decoder=True).to_dict(), vocab
        self.longest = _longest(servers, self.config)

    def compare(self, vocab: int) -> None:
        self._vocab = min(self._vocab, vocab)

    def target(self, batch: Batch) -> TopK:
        return self._read(batch)[0]

    def scored(self, batch: Batch, vocab: int) -> tuple[TopK, Tensor]:
        return self._read(batch)

    def _read(self, batch: Batch) -> tuple[TopK, Tensor]:
        signal, rows = self._servers.serve.signal, sequences(batch, ahead=1)
        assert signal is not None
        bodies = [top_k_request(self._name, ids, signal.k) for ids in rows.tokens]
        found = self._servers.post(COMPLETIONS, bodies, lambda i, answer: prompt_scores(answer, rows.tokens[i], signal.k))
        self.passed(rows.work)
        # the scores of the token at place t + 1 belong to the position t that predicts it
        chosen = [_Scores(*(part[places] for part in scores)) for scores, places in zip(found, rows.places, strict=True)]
        empty = _Scores(np.zeros((0, signal.k), np.int64), np.zeros((0, signal.k)), np.zeros(0))
        joined = _Scores(*(np.concatenate(parts) for parts in zip(*(chosen or [empty]), strict=True)))
        target = top_k_target(joined, signal, self._vocab)
        return target.to(self.device), torch.from_numpy(joined.own).float().to(self.device)


# --- what is sent to a server ----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The sequences of a batch as token ids (`tokens`), and the positions in each of them whose outputs the loss needs (`places`)."""

    tokens: list[list[int]]
    places: list[np.ndarray]
    work: Work
    """The work of a forward pass over these sequences."""


def sequences(batch: Batch, *, ahead: int) -> Rows:
    """Return the sequences of a batch without padding. Each sequence is cut `ahead` tokens after the last position that the loss needs. A
    sequence without such a position is left out."""
    tokens, places = [], []
    for ids, mask in zip(batch.ids_BT.cpu().numpy(), batch.mask_BT.cpu().numpy(), strict=True):
        if len(found := np.flatnonzero(mask)):
            tokens.append(ids[: found[-1] + 1 + ahead].tolist())
            places.append(found)
    return Rows(tokens, places, Work(sum(map(len, tokens)), sum(len(ids) ** 2 for ids in tokens), sum(map(len, places))))


def hidden_request(name: str, ids: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Return the body of a request for the last hidden states of every token."""
    how = {"encoding_format": "bytes", "embed_dtype": str(dtype).removeprefix("torch."), "endianness": "little"}
    return {"model": name, "task": "token_embed", "input": [ids], "use_activation": False, **how}


def top_k_request(name: str, ids: list[int], k: int) -> dict[str, Any]:
    """Return the body of a request for the log-probabilities of every token of a text."""
    return {"model": name, "prompt": [ids], "max_tokens": 1, "temperature": 0, "prompt_logprobs": k, "add_special_tokens": False}


# --- what a server sends back -------------------------------------------------------------------------------------------------------


def hidden_states(answer: Answer, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the hidden states, of shape (T, H), in an answer of `POST /pooling`.

    Raises:
        Broken: the answer is not complete, belongs to another request, or has another shape than (length, width).
    """
    facts = read_json(answer.headers.get("metadata", ""))
    try:
        ((place,), id) = facts["data"], str(facts["id"])
        shape, start, end, form = tuple(place["shape"]), place["start"], place["end"], place["embed_dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise Broken(f"the server's answer does not describe the shape and the dtype of its states ({facts!s:.100})") from error
    if answer.request not in id:
        raise Broken(f"the server's answer belongs to another request ({id:.80})")
    if shape != (length, width):
        raise Broken(
            f"the server's answer has states of shape {list(shape)}, but the shape must be {[length, width]}, because the text has "
            f"{length} tokens and the model has the width {width}"
        )
    if f"torch.{form}" != str(dtype) or end - start != length * width * dtype.itemsize or len(answer.content) < end:
        raise Broken(
            f"the server's answer has {len(answer.content)} bytes of {form}, but {length} tokens need "
            f"{length * width * dtype.itemsize} bytes of {dtype}"
        )
    states = torch.frombuffer(bytearray(answer.content[start:end]), dtype=dtype).reshape(length, width)
    if not bool(states.isfinite().all()):
        raise Broken("the server's answer has states that are not finite numbers")
    return states


class _Scores(NamedTuple):
    """Scores with one row per predicted token: the K most probable tokens (`ids`), their log-probabilities (`log_probs`), and the
    log-probability of the text's own token (`own`)."""

    ids: np.ndarray
    log_probs: np.ndarray
    own: np.ndarray


def prompt_scores(answer: Answer, tokens: list[int], k: int) -> _Scores:
    """Return the scores in an answer of `POST /v1/completions`, one row for every token after the first.

    Raises:
        Broken: the answer is not complete, or belongs to another text.
    """
    content = answer.json()
    try:
        ((choice,), given) = content["choices"], content["choices"][0]["prompt_logprobs"]
        rows = [[(int(id), float(entry["logprob"])) for id, entry in row.items()] for row in given[1:]]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Broken("the server's answer has no `prompt_logprobs`") from error
    if len(rows) != len(tokens) - 1 or any(token not in dict(row) for token, row in zip(tokens[1:], rows, strict=True)):
        raise Broken(f"the server's answer is about another text (it has {len(rows) + 1} tokens, and the request has {len(tokens)})")
    if choice.get("prompt_token_ids") not in (None, tokens):
        raise Broken("the server's answer is about another text: its tokens are not those of the request")
    own = np.array([dict(row)[token] for token, row in zip(tokens[1:], rows, strict=True)])
    # a row begins with the text's own token, and has k + 1 tokens, or k if this token is among the k most probable tokens
    top = [row if len(row) == k else row[1:] for row in rows]
    if any(len(row) != k for row in top):
        raise Broken(
            f"the server's answer has {len(min(top, key=len))} tokens at a position, but the request asks for the {k} most probable tokens"
        )
    ids, log_probs = (np.array([[entry[i] for entry in row] for row in top]).reshape(-1, k) for i in (0, 1))
    if not (np.isfinite(own).all() and np.isfinite(log_probs).all()):
        raise Broken("the server's answer has log-probabilities that are not finite numbers")
    return _Scores(ids, log_probs, own)


def top_k_target(scores: _Scores, signal: TopKSignal, vocab: int) -> TopK:
    """Return the scores as a target of a loss, from the most to the least probable token.

    `vocab` is the number of tokens that are compared. Some models have logits for ids that are not tokens of the tokenizer, or have more
    tokens than the student. If a server sends such an id, another token with the probability 0 takes its place. The probability of the id
    then belongs to the tail (all tokens that the target does not list). A target lists at most `vocab` tokens.
    """
    ids, log_probs = scores.ids.astype(np.int64), scores.log_probs.astype(np.float64)
    if ids.shape[1] > vocab:
        known = np.argsort(ids >= vocab, axis=1, kind="stable")[:, :vocab]
        ids, log_probs = (np.take_along_axis(values, known, 1) for values in (ids, log_probs))
    for row, place in np.argwhere(ids >= vocab):
        ids[row, place] = next(id for id in range(vocab) if id not in ids[row])
        log_probs[row, place] = LOG_ZERO
    order = np.argsort(-log_probs, axis=1, kind="stable")  # a server sends the text's own token first
    ids, log_p = (torch.from_numpy(np.take_along_axis(values, order, 1)) for values in (ids, log_probs))
    return TopK(ids, log_p.float(), remaining(log_p) if signal.tail == "lump" else None)


# --- a teacher that follows its student -------------------------------------------------------------------------------


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of a model, in eval mode. Weights that are frozen in the model are not copied: both models share their memory.

    The model must not be sharded.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


class MovingAverage:
    """A teacher that follows its student: the exponential moving average (EMA) of the student's weights.

        average = MovingAverage(student, frozen_copy(student), 0.99)
        average.update()                            # after each update of the student

    An update moves the teacher's weights towards those of its student: teacher = decay x teacher + (1 - decay) x student. The models have
    the same parameters. Either both are sharded, or none is. The teacher begins with the weights of the student. With adapters (LoRA), the
    teacher shares the frozen weights and has its own adapters. Then the matrices A and B of an adapter are averaged, as in TRL, and not
    their product. Self-distillation uses such a teacher: SDFT (Shenfeld et al. 2026, arXiv 2601.19897), and before it the mean teacher
    (Tarvainen and Valpola 2017, arXiv 1703.01780).
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, decay: float):
        self.student, self.model, self._average = student, teacher, get_ema_multi_avg_fn(decay)
        self.teacher = teacher_of(teacher)

    def update(self) -> None:
        """Move the teacher's weights by one step. Call it after an update of the student."""
        reshard(self.model)  # frees gathered weights, which the update of the shards would not change
        pairs = zip(self.model.parameters(), self.student.parameters(), strict=True)
        old, new = zip(*((own, other) for own, other in pairs if other.requires_grad), strict=True)
        self._average(list(old), list(new), None)

    def state(self) -> dict[str, Tensor]:
        """Return the teacher's weights for a checkpoint. All processes must call this function."""
        return weights(self.model)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved `state`."""
        reshard(self.model)
        load_weights(self.model, state)
