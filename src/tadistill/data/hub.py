"""Find or download the Hub repository (or single file) of a split, and describe errors of the Hub in one sentence.

cached("tatsu-lab/alpaca", "main")                     -> the snapshot's folder, or None if it is not on this disk
download("MiniLLM/dolly", "main", file="raw.jsonl")    -> that file, from the cache or the network
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tadistill.errors import DataError, TadistillError

_NOT_DATA = (".md", ".gitattributes", ".gitignore", ".yaml")


def cached(repository: str, revision: str, file: str | None = None) -> Path | None:
    """Find the file, or the folder of the whole snapshot, without network; None if it is missing or the snapshot contains no data.

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


def download(repository: str, revision: str, file: str | None = None, *, workers: int = 8) -> Path:
    """Update the file, or the whole snapshot, and return its path; with HF_HUB_OFFLINE=1 use only the cache.

    Raises:
        DataError: the file cannot be downloaded; the message gives the cause and the solution.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    if constants.HF_HUB_OFFLINE:
        if (found := cached(repository, revision, file)) is None:
            raise offline(DataError, "data set", f"{repository}/{file}" if file else repository, revision)
        return found
    with explained(DataError, "data set", repository, revision, file):
        if file is not None:
            return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, max_workers=workers))


def offline(error: type[TadistillError], kind: str, name: str, revision: str) -> TadistillError:
    """Return the error for a repository that is not in the cache while the network is forbidden."""
    return error(
        f"{kind} `{name}` at revision `{revision}` is not in the local Hugging Face cache, and HF_HUB_OFFLINE=1 forbids downloads; "
        "run `tadistill fetch RECIPE` on a machine with network access"
    )


def invalid(error: type[TadistillError], repository: str, cause: Exception) -> TadistillError:
    """Return the error for a name that the Hub does not allow."""
    return error(f"`{repository}` is not a valid hub id ({str(cause).rstrip('.')}); write ORG/NAME")


@contextmanager
def explained(error: type[TadistillError], kind: str, repository: str, revision: str, file: str | None = None) -> Iterator[None]:
    """Raise `error` with one clear sentence if a download inside the block fails.

    Args:
        kind: `model` or `data set`.
        file: the wanted file of the repository; None for the whole repository.
    """
    from huggingface_hub import errors

    where = f"{kind} `{repository}/{file}`" if file else f"{kind} `{repository}`"
    try:
        yield
    except errors.HFValidationError as cause:
        raise invalid(error, repository, cause) from cause
    except errors.GatedRepoError as cause:
        raise error(
            f"{where} at revision `{revision}` is gated; accept its terms on its page on the hub, then log in with `hf auth login`"
        ) from cause
    except errors.RevisionNotFoundError as cause:
        raise error(f"{kind} `{repository}` has no revision `{revision}`; correct `revision`") from cause
    except errors.RepositoryNotFoundError as cause:
        raise error(
            f"the hub has no {kind} `{repository}` that you can read; correct the id, or log in with `hf auth login` if it is private"
        ) from cause
    except errors.RemoteEntryNotFoundError as cause:
        raise error(f"{kind} `{repository}` has no file `{file}` at revision `{revision}`; correct `revision`") from cause
    except (errors.HfHubHTTPError, OSError) as cause:
        raise error(f"{where} at revision `{revision}` cannot be downloaded ({type(cause).__name__}); check the network") from cause
