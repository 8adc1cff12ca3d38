"""Find, download or upload files on the Hugging Face Hub. An error of the Hub is turned into one clear sentence.

cached("tatsu-lab/alpaca", "main")                     # folder of the downloaded repository, or None if it is not on this disk
download("MiniLLM/dolly", "main", file="raw.jsonl")    # path of this file, from the cache or the network
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tadistill.errors import DataError, ModelError, TadistillError, no_file

_TEST_ONLY: dict[str, tuple[str, int | None, int | None]] = {"test": ("valid.jsonl", None, None)}


@dataclass(frozen=True)
class Named:
    """A data set that a recipe can name without the id of its repository."""

    folder: str
    """The folder in `data.root` that is read in place of the Hub, if it is there."""
    hub: str
    files: dict[str, tuple[str, int | None, int | None]]
    """Maps a split to a triple: the file on the Hub, the first row, and the row after the last one. None means no limit."""


def _bucket(name: str, lengths: str, last: int | None = None) -> Named:
    # MiniLLM splits these sets by the number of tokens of the first reference; its tables use the part with the longest ones
    return Named(f"minillm_{name}_{lengths.rstrip('_')}", f"MiniLLM/{name}", {"test": (f"{lengths}/valid.jsonl", None, last)})


NAMED = {
    # MiniLLM calls its test rows "valid"; its dev rows are the first 1,000 of the raw training file
    "dolly": Named("minillm_dolly", "MiniLLM/dolly", {"train": ("raw.jsonl", 1000, None), "dev": ("raw.jsonl", None, 1000)} | _TEST_ONLY),
    "self_inst": Named("minillm_self_inst", "MiniLLM/self-inst", _TEST_ONLY),
    "vicuna": Named("minillm_vicuna", "MiniLLM/Vicuna", _TEST_ONLY),
}
for _name, _last in (("sinst", None), ("uinst", 10_000)):
    NAMED |= {_name: _bucket(_name, "11_", _last)} | {f"{_name}/{part}": _bucket(_name, part) for part in ("0_2", "3_5", "6_10")}

_PATIENCE = 5.0  # seconds
_NOT_DATA = (".md", ".gitattributes", ".gitignore", ".yaml")


def cached(repository: str, revision: str, file: str | None = None) -> Path | None:
    """Return the local path of a downloaded file, or of the whole repository if `file` is None. The network is not used.

    The result is None if the file is not on this disk, or if the folder of the repository has no data files.

    Raises:
        DataError: `repository` is not a valid hub id.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache  # here: most commands read no data set of the Hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            path = try_to_load_from_cache(repository, file, repo_type="dataset", revision=revision)
            return Path(path) if isinstance(path, str) and Path(path).is_file() else None
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise invalid(DataError, repository, error) from error
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    whole = all(path.is_file() for path in files)  # a link may have lost its target
    return folder if whole and any(not path.name.endswith(_NOT_DATA) for path in files) else None


def has_data(folder: Path) -> bool:
    """Return True if a folder contains a file that can be data. The files that describe a repository cannot."""
    return any(path.is_file() and not path.name.endswith(_NOT_DATA) for path in folder.rglob("*"))


def download(repository: str, revision: str, file: str | None = None, *, workers: int = 8) -> Path:
    """Download a file, or the whole repository if `file` is None, and return its local path.

    Only changed files are downloaded. With HF_HUB_OFFLINE=1, nothing is downloaded, and the local cache must contain the files.

    Raises:
        DataError: the download fails, or the cache does not contain the file.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    if constants.HF_HUB_OFFLINE and (found := cached(repository, revision, file)) is not None:
        return found
    with explained(DataError, "data set", repository, revision, file):
        if file is not None:
            return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, max_workers=workers))


@functools.cache
def reachable() -> bool:
    """Return True if the Hub answers within a few seconds. Return False if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # the classes of errors differ between versions of the client
        return False
    return True


def invalid(error: type[TadistillError], repository: str, cause: Exception) -> TadistillError:
    """Return the error for a repository name that the Hub does not allow."""
    return error(f"`{repository}` is not a valid hub id ({str(cause).rstrip('.')}); write ORG/NAME")


@contextmanager
def without_retries_shown() -> Iterator[None]:
    """If the Hub does not answer, hide the lines that its client prints at each retry while a `with` block runs.

    All other lines of the client are shown. If the user wants to see more than warnings (HF_HUB_VERBOSITY), all lines are shown.
    """
    logger = logging.getLogger("huggingface_hub.utils._http")  # of the client's module that sends requests
    level = logger.level
    if logger.getEffectiveLevel() >= logging.WARNING and not reachable():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def explained(error: type[TadistillError], kind: str, repository: str, revision: str, file: str | None = None) -> Iterator[None]:
    """While a `with` block runs, turn download errors into an exception of the class `error` with one clear sentence. If HF_HUB_OFFLINE=1
    forbids downloads, raise it before the block.

    Args:
        kind: `model` or `data set`, for the sentence.
        file: the file in the repository that is downloaded. None means the whole repository.
    """
    from huggingface_hub import constants, errors

    where = f"{kind} `{repository}/{file}`" if file else f"{kind} `{repository}`"
    if constants.HF_HUB_OFFLINE:
        raise error(
            f"{where} at revision `{revision}` is not in the local Hugging Face cache, and HF_HUB_OFFLINE=1 forbids downloads; run "
            f"`tadistill fetch RECIPE` on a machine with network access{as_path(repository)}"
        )
    try:
        with without_retries_shown():
            yield
    except errors.HFValidationError as cause:
        raise invalid(error, repository, cause) from cause
    except errors.GatedRepoError as cause:
        raise error(
            f"{where} at revision `{revision}` is gated; accept the terms on its page on the Hub, and then log in with `hf auth login`"
        ) from cause
    except errors.RevisionNotFoundError as cause:
        raise error(f"{kind} `{repository}` has no revision `{revision}`; correct `revision`") from cause
    except errors.RepositoryNotFoundError as cause:
        raise error(
            f"the Hub has no {kind} `{repository}` that you can read; correct the id; if the repository is private, log in with "
            f"`hf auth login`{as_path(repository)}"
        ) from cause
    except errors.RemoteEntryNotFoundError as cause:
        raise error(f"{kind} `{repository}` has no file `{file}` at revision `{revision}`; correct `revision`") from cause
    except (errors.HfHubHTTPError, OSError) as cause:
        why = "the Hub does not answer" if isinstance(cause, errors.LocalEntryNotFoundError) else type(cause).__name__
        raise error(
            f"{where} at revision `{revision}` cannot be downloaded ({why}); check its name and the network{as_path(repository)}"
        ) from cause


def as_path(repository: str) -> str:
    """Return the end of a message: what is wrong with a hub id if it is meant as a path. Empty if nothing here is similar to this path."""
    folder = Path(repository).parent
    wrong = no_file(Path(repository), [folder])
    meant = folder.is_dir() if folder.name else wrong.endswith("?")  # every name can be a path in the working directory
    return f". As a path, {wrong}" if meant else ""


def has_none(error: TadistillError) -> bool:
    """Return True if an error of `explained` says that the Hub has no such repository."""
    from huggingface_hub import errors

    return isinstance(error.__cause__, errors.RepositoryNotFoundError) and not isinstance(error.__cause__, errors.GatedRepoError)


def rows(repository: str, split: str, revision: str, *, stream: bool) -> Iterator[dict[str, Any]]:
    """Return the rows of a split of a data set. With `stream`, rows are downloaded when they are used.

    Raises:
        DataError: the data set cannot be loaded.
    """
    from datasets import load_dataset  # here: slow to import, and only needed for data sets on the Hub
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants, errors

    # offline, `datasets` would use any revision that it once prepared, and it would read a folder of this name in the working directory, so
    # the snapshot of this revision is read instead
    kept = constants.HF_HUB_OFFLINE or Path(repository).exists()
    path, at = (str(download(repository, revision)), None) if kept else (repository, revision)
    try:
        with without_retries_shown():
            return (dict(row) for row in load_dataset(path, split=split, revision=at, streaming=stream))
    except (DatasetsError, errors.HfHubHTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: it needs a script
        reason = str(error).strip().splitlines()
        raise DataError(
            f"data set `{repository}` (split {split}, revision {revision}) cannot be loaded: {reason[0] if reason else error!r}; "
            "check the name and the split, or give a local .jsonl file"
        ) from error


# --- sending a model ----------------------------------------------------------------------------------------------------


def full_name(repository: str) -> str:
    """Return the id of a model repository on the Hub, in the form USER/NAME. If only NAME is given, USER is the owner of this machine's
    token.

    Raises:
        ModelError: the name is not valid, there is no token, the Hub does not accept the token, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _sending(repository):
        validate_repo_id(repository)
        user = HfApi().whoami()["name"]
    return repository if "/" in repository else f"{user}/{repository}"


def push(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a directory to a model repository of the Hub in one commit. Return the address of the repository's page.

    A missing repository is created. `private` has no effect on an existing repository. Other files in the repository are not deleted.

    Raises:
        ModelError: the token has no permission, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _sending(repository):
        page = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(page)


@contextmanager
def _sending(repository: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            "the environment variable HF_HUB_OFFLINE=1 forbids uploads to the Hub; remove the variable, or export without --push"
        )
    try:
        yield
    except errors.HFValidationError as cause:
        raise ModelError(
            f"`{repository}` is not a valid name of a repository ({str(cause).rstrip('.')}); write NAME or ORG/NAME"
        ) from cause
    except errors.LocalTokenNotFoundError as cause:
        raise ModelError("this machine has no token for the Hugging Face Hub; log in with `hf auth login`, or set HF_TOKEN") from cause
    except (errors.HTTPError, OSError) as cause:  # type: ignore[reportPrivateImportUsage]
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            raise ModelError(
                "the Hub does not accept this machine's token; log in with `hf auth login` and a token that has write permission"
            ) from cause
        if status in (403, 404):
            raise ModelError(
                f"the token has no permission to write to `{repository}`; use a token with this permission, or another repository"
            ) from cause
        why = f"it answered {status}" if status else type(cause).__name__
        raise ModelError(
            f"`{repository}` could not be uploaded to the Hub at {constants.ENDPOINT} ({why}); check the network, and try again"
        ) from cause
