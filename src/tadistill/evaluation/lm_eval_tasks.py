"""Run tasks of EleutherAI's lm-eval: load them with their data, run them on a model in this process, and convert the results per item.

The data of a task is read from JSON Lines files in `ROOT/DATASET/CONFIG` or `ROOT/DATASET`, where ROOT is `data.root`. The files are named
after the splits. Without such files, lm-eval loads the data from the cache of the Hub or from the Hub.
"""

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch

from tadistill.config.evaluate import TASK_FILE
from tadistill.errors import ConfigError, DataError, StageFailed
from tadistill.evaluation.token_scores import Subject
from tadistill.models.architectures import is_full

Task = Any
"""A task of the class `lm_eval.api.task.Task`, which is not imported here, because lm-eval is optional."""
SCORE = "task_score"
_SEED = 1234  # the default of lm-eval's command line, for few-shot examples, numpy and torch


@dataclass(frozen=True)
class TaskResult:
    """The results of one task, in the same form as the results of a test set (`Evaluation`)."""

    scores: dict[str, list[list[float]]]
    """Maps a metric to its values, from 0 to 100: for each item, a list with one value. `task_score` is the task's first metric, and
    `task_score/NAME` another one."""
    rows: list[int]
    """The indices of the items in the task's data."""
    records: list[dict[str, Any]]
    """One record per item, with the same keys as in `Evaluation.records`."""
    left_out: tuple[str, ...]
    """Metrics of the task that have no value from 0 to 1 for each item."""


def load_tasks(names: Sequence[str], root: str | None) -> dict[str, Task]:
    """Load tasks with their data. A name is the name of a task, group or tag of lm-eval, or the path of a task's YAML file.

    Raises:
        ConfigError: lm-eval has no such task, or the task runs code that the model writes.
        DataError: a task's data is neither on this disk nor on the Hub.
    """
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=not all(name.endswith(TASK_FILE) for name in names))  # the index of all tasks takes seconds
    found: dict[str, Task] = {}
    for name in names:
        asked: list[str] = []
        try:
            with _local_files_first(root or os.environ.get("TADISTILL_DATA"), asked):
                found |= manager.load([str(Path(name).expanduser()) if name.endswith(TASK_FILE) else name])["tasks"]
        except Exception as error:  # any error of the Hub's libraries, or of a task's own code
            if isinstance(error, KeyError) and not asked:
                raise ConfigError(f"lm-eval has no task `{name}`; `lm-eval ls tasks` lists all tasks") from error
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            where = f"its data set `{asked[-1]}`" if asked else "its files"
            raise DataError(
                f"task `{name}` of lm-eval cannot be loaded, because of {where}: {reason}; connect to the Hub once, or write the splits as "
                f"JSON Lines files, such as {asked[-1] if asked else 'DATASET'}/test.jsonl in `data.root`"
            ) from error
    if unsafe := [name for name, task in found.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise ConfigError(f"task `{unsafe[0]}` of lm-eval runs code that the model writes, which is not safe here; remove the task")
    return found


@contextlib.contextmanager
def _local_files_first(root: str | None, asked: list[str]) -> Iterator[None]:
    """Inside the `with` block, `datasets.load_dataset` looks for data sets in the folder `root` first. Each requested name is added to
    `asked`."""
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **settings: Any) -> Any:
        asked.append(path)
        base = Path(root).expanduser() / path if root else None
        for folder in (base / (name or ""), base) if base else ():
            if files := {file.stem: str(file) for file in sorted(folder.glob("*.jsonl"))}:
                return original("json", data_files=files)
        return original(path, name, **settings)

    with mock.patch.object(datasets, "load_dataset", load):  # lm-eval has no setting for local files of its own tasks
        yield


def run_task(
    name: str, task: Task, subject: Subject, *, fewshot: int | None, limit: int | None, batch: int, chat: bool
) -> list[dict[str, Any]]:
    """Run a task on a model, and return lm-eval's log of every item.

    Args:
        fewshot: number of examples in a prompt. None means the task's own number.
        limit: number of items from the start. None means all items.
        chat: True if the model's chat template is used.

    Raises:
        StageFailed: lm-eval fails.
    """
    from lm_eval import evaluate  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    own = task.get_config("num_fewshot")
    task.set_config("num_fewshot", own or 0 if fewshot is None or own == 0 else fewshot)  # a task that sets 0 keeps 0, as in lm-eval
    task.set_fewshot_seed(_SEED)
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
            model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch)  # type: ignore[arg-type]
            found = evaluate(model, {"tasks": {name: task}}, limit=limit, apply_chat_template=chat, bootstrap_iters=0)  # type: ignore[arg-type]
    except Exception as error:  # any error of lm-eval, or of a task's own code
        if is_full(error):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise StageFailed(f"task `{name}` of lm-eval failed with {type(error).__name__}: {reason}; correct or remove the task") from error
    assert found is not None  # lm-eval returns None only in other processes than the first
    return found["samples"][name]  # type: ignore[return-value]


def read_samples(name: str, samples: Sequence[dict[str, Any]], seed: int) -> TaskResult:
    """Return the results of a task from lm-eval's log. The log has one entry for each item and each filter (a way to extract the answer).

    Raises:
        StageFailed: no metric of the task has a value from 0 to 1 for each item.
    """
    columns: dict[str, dict[int, Any]] = {}
    first: dict[int, dict[str, Any]] = {}
    for sample in samples:
        first.setdefault(sample["doc_id"], sample)
        for metric in sample["metrics"]:
            column = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            columns.setdefault(column, {})[sample["doc_id"]] = sample[metric]
    rows = sorted(first)
    good = [column for column, values in columns.items() if all(_is_share(values.get(row)) for row in rows)]
    left_out = tuple(column for column in columns if column not in good)
    if not good:
        raise StageFailed(
            f"task `{name}` of lm-eval has no metric with a value from 0 to 1 for each item (it has {', '.join(left_out)}); remove the task"
        )
    names = {column: SCORE if i == 0 else f"{SCORE}/{column}" for i, column in enumerate(good)}
    scores = {names[column]: [[100 * float(columns[column][row])] for row in rows] for column in good}
    records = [_record(name, first[row], seed) | {m: values[i][0] for m, values in scores.items()} for i, row in enumerate(rows)]
    return TaskResult(scores, rows, records, left_out)


def _is_share(value: Any) -> bool:
    try:
        return not isinstance(value, str) and 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return False


def _record(name: str, sample: dict[str, Any], seed: int) -> dict[str, Any]:
    requests, replies, target = sample["arguments"], sample["resps"], sample["target"]
    if isinstance(replies[0][0], str):
        answer, right = replies[0][0], target
    else:  # log-probabilities of the choices
        options = [str(request[1]).strip() for request in requests]
        answer = options[max(range(len(options)), key=lambda i: replies[i][0][0])]
        right = options[target] if isinstance(target, int) and target < len(options) else target
    references = [str(part) for part in right] if isinstance(right, list) and right else [str(right)]
    about = {"set": name, "index": sample["doc_id"], "seed": seed, "prompt": str(requests[0][0])}
    return about | {"instruction": str(requests[0][0]), "input": "", "prediction": answer, "references": references}
