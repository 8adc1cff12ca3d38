"""Copy a trained model to a new folder, as an ordinary Hugging Face directory with a model card. The folder is whole or empty."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tadistill.disk import delete_leftovers, filled, ordinary_permissions, publishing, writing
from tadistill.errors import ConfigError, StoreError
from tadistill.models import tokens
from tadistill.report.model_card import model_card
from tadistill.results.collect import Results
from tadistill.results.study import trained_model
from tadistill.store import INCOMPLETE

_ANOTHER = "give the name of a new directory"
_NEW = ".tadistill.new"  # the files of an existing folder that a process fills


def export(results: Results, arm: str, seed: int | None, target: Path, *, name: str = "") -> Path:
    """Copy an arm's trained model to ``target``, write a model card as README.md, and return ``target``.

    Args:
        seed: a training seed. None selects the recipe's first finished seed.
        name: the Hub id from which the example program in the card loads the model. By default, it loads `target`.

    Raises:
        ConfigError: the arm or the seed does not exist, the arm trains no model, or the target is not an empty directory.
        StoreError: the training is not finished, or a file cannot be copied.
    """
    source, chosen = trained_model(results.plan, results.store, arm, seed)
    try:
        with filling(target) as folder:
            card = model_card(results, arm, chosen, source, name or str(target))
            # earlier versions kept such files in finished stages
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(INCOMPLETE))
            tokens.name_ends(folder)
            ordinary_permissions(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except StoreError:
        raise
    except OSError as error:
        why = error.args[0][0][2].partition(": '")[0] if isinstance(error, shutil.Error) else error  # it lists every file
        raise StoreError(f"{source} cannot be copied to {target} ({why}); check its permissions and free space") from error
    return target


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. `folder`, which is new or empty, has its files when the block ends without an error, and else none.

    Of several processes, the first one that ends fills the folder. What a killed process has left is deleted, or completed if the process
    had written all files. Raises ConfigError if `folder` is not empty, and StoreError if another process fills it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; {_ANOTHER}")
    if not folder.exists():
        with publishing(folder.resolve(), alone=folder) as temporary:
            yield temporary
        return
    # the folder itself stays: it may be a mount point or the working directory, which cannot be replaced
    new = folder / _NEW
    with writing(new):
        delete_leftovers(new)
    if _move_up(new):  # those of a process that was killed while it did so
        there = "an earlier process had written all its files, and the last of them are in place now"
        raise ConfigError(f"{folder} is complete: {there}; for another export, {_ANOTHER}")
    if first := _content(folder):
        raise ConfigError(f"{folder} is not an empty directory (it has {first}); {_ANOTHER}")
    # before this process has a folder there: else two that begin at the same moment would both give up
    if other := min((path.name for path in folder.iterdir()), default=None):
        raise filled(folder, f", or a process killed on another machine has left {other} in it")
    with publishing(new, alone=folder) as temporary:
        yield temporary
        if _content(folder):
            raise filled(folder)
    if _content(folder, _NEW):  # another process was faster since the line above
        shutil.rmtree(new, ignore_errors=True)
        raise filled(folder)
    _move_up(new)


def _content(folder: Path, *own: str) -> str | None:
    # the name of a file or folder that is neither this process's own nor a temporary folder of `filling`
    return next((path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(f".{_NEW}.")), None)


def _move_up(files: Path) -> bool:
    """Move the files of a folder to its parent, and delete the folder. Returns whether it was there."""
    with writing(files.parent), suppress(FileNotFoundError):
        for path in sorted(files.iterdir()):
            with suppress(FileNotFoundError):  # another process, which took this one for killed, moves them too
                path.rename(files.parent / path.name)
        with suppress(OSError):  # another process, which was slower, puts its own files there for a moment
            files.rmdir()
        return True
    return False
