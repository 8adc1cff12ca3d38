"""Data sets of the hub: the repository or the one file of it that a split is read from, in the local cache or downloaded. Imports no torch.

cached("tatsu-lab/alpaca", "main")                     -> the snapshot's folder, or None where it is not on this disk
download("MiniLLM/dolly", "main", file="raw.jsonl")    -> that file, from the cache or the network
"""

from pathlib import Path

from tadistill.errors import DataError

OFFLINE = (
    "is not in the local Hugging Face cache and HF_HUB_OFFLINE=1 forbids the network; run `tadistill fetch RECIPE` where there is network"
)
_NOT_DATA = (".md", ".gitattributes", ".gitignore", ".yaml")


def cached(repository: str, revision: str, file: str | None = None) -> Path | None:
    """The file, or the folder of the whole snapshot, without network; None where it is missing or a snapshot holds no data.

    Raises:
        DataError: the hub would take no such name.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache  # here: most commands read no data set of the hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            path = try_to_load_from_cache(repository, file, repo_type="dataset", revision=revision)
            return Path(path) if isinstance(path, str) and Path(path).is_file() else None
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise DataError(f"`{repository}` is not a valid hub id ({str(error).rstrip('.')}); write ORG/NAME") from error
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    whole = all(path.is_file() for path in files)  # a link may have lost what it points to
    return folder if whole and any(not path.name.endswith(_NOT_DATA) for path in files) else None


def download(repository: str, revision: str, file: str | None = None, *, workers: int = 8) -> Path:
    """The file, or the whole snapshot, brought up to date; with HF_HUB_OFFLINE=1 from the cache only.

    Raises:
        DataError: it cannot be had; says why, and what to do.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repository}/{file}" if file else repository
    where = f"data set `{what}` at revision `{revision}`"
    if constants.HF_HUB_OFFLINE:
        if (found := cached(repository, revision, file)) is None:
            raise DataError(f"{where} {OFFLINE}")
        return found
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, max_workers=workers))
    except GatedRepoError as error:
        raise DataError(f"{where} is gated; accept its terms on its page on the hub, then log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise DataError(f"data set `{repository}` has no revision `{revision}`; correct `revision`") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"the hub shows no data set `{repository}`; correct the id, or, if it is private, log in with `hf auth login`"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise DataError(f"data set `{repository}` has no file `{file}` at revision `{revision}`; correct `revision`") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"{where} cannot be downloaded ({type(error).__name__}); check the connection") from error
