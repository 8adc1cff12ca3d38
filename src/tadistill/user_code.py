"""Load metrics and objectives from the user's own code. A recipe names such a function as MODULE:FUNCTION.

function = load_function("mymodule:score", "/home/me/study")
function.check("a metric is called with", "prediction", "references")

MODULE is a file in the given folder (`mymodule.py`; `package.module` is `package/module.py`), or an installed module. A stage's key depends
on a hash of the file, so the stage runs again if the file has changed. Commands that only read results never import the code.

Studies of one process can have files of the same name: a function is looked for in the folder of its own study, and in no other study's.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tadistill.errors import ConfigError, did_you_mean

_DIGEST = "__tadistill_source__"  # attribute of an imported module: the digest of its source file at the time of the import
_FOLDERS: list[str] = []  # the folder that `_enter` has added to sys.path: that of the last study


@dataclass(frozen=True)
class OwnFunction:
    """A metric or objective of the user, with its name, its file and a hash of the file."""

    name: str
    file: Path
    digest: str
    """SHA-256 of the whole file, in hexadecimal."""
    call: Callable[..., Any]

    def check(self, how: str, *positions: str, **settings: Any) -> None:
        """Raise a ConfigError if the function cannot be called with these arguments.

        Args:
            how: a part of the message, such as "a metric is called with".
            positions: names of the positional arguments.
            settings: the keyword arguments.
        """
        try:
            signature = inspect.signature(self.call)
        except ValueError:  # some functions written in C have no signature
            return
        try:
            signature.bind(*positions, **settings)
        except TypeError as error:
            wanted = ", ".join([*positions, *(f"{name}=…" for name in settings)])
            raise ConfigError(
                f"`{self.name}` in {self.file} takes {signature}, but {how} ({wanted}): {error}; change the function"
            ) from error


def load_function(name: str, folder: str | Path | None = None) -> OwnFunction:
    """Import a metric or objective of the user.

    Args:
        name: MODULE:FUNCTION.
        folder: the folder where MODULE is looked for first; the current directory by default.

    Raises:
        ConfigError: there is no such module or function, or the import fails.
    """
    where, (module_name, _, attribute) = Path(folder or ".").resolve(), name.partition(":")
    _enter(where)
    file = _file(name, module_name, where)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    module = _imported(name, module_name, file, digest)
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        missing = f"does not exist; {did_you_mean(attribute, functions, 'correct the name')}"
        what = missing if found is None else "is not a function; name a function"
        raise ConfigError(f"`{name}`: {attribute} in {file} {what}")
    return OwnFunction(name, file, digest, found)


def _enter(folder: Path) -> None:
    # imports look into the folder of this study, but no more into that of another study, and forget its modules
    for other in [path for path in _FOLDERS if path != str(folder)]:
        _FOLDERS.remove(other)
        sys.path[:] = [path for path in sys.path if path != other]
        for name, module in [*sys.modules.items()]:
            own = module.__dict__.get("__file__") if isinstance(module, ModuleType) else None
            if own is not None and Path(own) in _places(name, Path(other)):
                del sys.modules[name]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end, so that no file here replaces an installed module
        _FOLDERS.append(str(folder))


def _places(module: str, folder: Path) -> tuple[Path, Path]:
    beside = folder.joinpath(*module.split("."))
    return beside.with_suffix(".py"), beside / "__init__.py"


def _file(name: str, module: str, folder: Path) -> Path:
    places = _places(module, folder)
    for path in places:
        if path.is_file():
            return path
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        files = (path.stem for path in folder.glob("*.py"))
        hint = did_you_mean(module, files, "write the function into this file, or install its package")
        raise ConfigError(f"`{name}` was not found: there is no file {places[0]}, and no module {module} is installed; {hint}")
    if not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError(f"`{name}` is in module {module}, which has no Python source; name a function of a .py file")
    return Path(spec.origin)


def _imported(name: str, module: str, file: Path, digest: str) -> ModuleType:
    if getattr(sys.modules.get(module), _DIGEST, digest) != digest:
        del sys.modules[module]  # a reload would keep functions that are no longer in the file
    try:
        importlib.invalidate_caches()
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ConfigError(
            f"`{name}` cannot be imported: {_place(error, file)}: {type(error).__name__}: {error}; correct the file"
        ) from error
    if (own := getattr(loaded, "__file__", None)) is None or Path(own).resolve() != file.resolve():
        raise ConfigError(
            f"`{name}` cannot be imported: {file} has the same name as a module of Python or of a package ({own or module}); rename the "
            "file"
        )
    setattr(loaded, _DIGEST, digest)
    return loaded


def _place(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{file}, line {lines[-1]}" if lines else str(file)
