"""Load metrics and objectives from the user's own code. A recipe names such a function as MODULE:FUNCTION.

function = load_function("mymodule:score", "/home/me/study")
function.check("a metric is called with", "prediction", "references")

MODULE is a file in the given folder (`mymodule.py`; `package.module` is `package/module.py`), or an installed module. A stage's key depends
on a hash of the file, so the stage runs again if the file has changed. Commands that only read results never import the code.

Studies of one process can have files of the same name, because the next study takes the folder of the last one off Python's path and
forgets its modules. What the user has imported, or has put on the path (the folder of a script, for example), stays and comes first: a
study is refused if its function, or an import in the function's file, would get such a file in place of its own.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tadistill.errors import ConfigError, did_you_mean
from tadistill.text import listed

_DIGEST = "__tadistill_source__"  # attribute of an imported module: the digest of its source file at the time of the import
_ADDED: dict[str, set[str]] = {}  # the folder that `_enter` has added to sys.path, and the names of the modules that were imported before
_LOCK = threading.RLock()  # of sys.path, because threads may plan studies
_RENAME = "rename the file; if the other one belongs to another study, you can also run this study in a Python process of its own"


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
        given = signature.parameters.values()
        filled = _filled(signature, positions)
        names = [each.name for each in given if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in filled]
        unknown = next((name for name in settings if name not in names), None)
        if unknown and not any(each.kind is each.VAR_KEYWORD for each in given):
            takes = f"it takes {listed(names)}" if names else "it takes no settings"
            hint = did_you_mean(unknown, names, f"{takes}; remove the setting, or change the function")
            raise ConfigError(f"`settings` has `{unknown}`, which `{self.name}` in {self.file} does not take; {hint}")
        try:
            signature.bind(*positions, **settings)
        except TypeError as error:
            wanted = ", ".join([*positions, *(f"{name}=…" for name in settings)])
            raise ConfigError(
                f"`{self.name}` in {self.file} takes {signature}, but {how} ({wanted}): {error}; change the function"
            ) from error


def _filled(signature: inspect.Signature, positions: tuple[str, ...]) -> set[str]:
    # the parameters that get the positional arguments
    try:
        return {*signature.bind_partial(*positions).arguments}
    except TypeError:  # there are too many, which the call itself says
        return set()


def load_function(name: str, folder: str | Path | None) -> OwnFunction:
    """Import a metric or objective of the user. If the function itself imports modules, call it before you load one of another study.

    Args:
        name: MODULE:FUNCTION.
        folder: the folder where MODULE is looked for first. None means the current directory.

    Raises:
        ConfigError: there is no such module or function, or the import fails.
    """
    where, (module_name, _, attribute) = Path(folder or ".").resolve(), name.partition(":")
    with _LOCK:
        _enter(where)
        file = _file(name, module_name, where)
        source = file.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        if file in _places(module_name, where):
            _check_imports(name, file, source, where)
        module = _imported(name, module_name, file, digest)
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        missing = f"does not exist; {did_you_mean(attribute, functions, 'correct the name')}"
        what = missing if found is None else "is not a function; name a function"
        raise ConfigError(f"`{name}`: {attribute} in {file} {what}")
    return OwnFunction(name, file, digest, found)


def path_without_studies() -> list[str]:
    """Return Python's path as the user has it, without the folder that `load_function` has added."""
    with _LOCK:
        return [path for path in sys.path if path not in _ADDED]


def _enter(folder: Path) -> None:
    # imports look into the folder of this study, but no more into that of another study, and forget its modules
    for other in [path for path in _ADDED if path != str(folder)]:
        sys.path[:] = path_without_studies()
        before = _ADDED.pop(other)
        for name, module in [*sys.modules.items()]:
            if name not in before and _is_in(Path(other), name, module):
                del sys.modules[name]
    if str(folder) not in sys.path:
        _ADDED.setdefault(str(folder), {*sys.modules})
        sys.path.append(str(folder))  # at the end, so that no file here replaces an installed module
    importlib.invalidate_caches()  # files can be new


def _is_in(folder: Path, name: str, module: ModuleType) -> bool:
    found = module.__dict__ if isinstance(module, ModuleType) else {}
    if file := found.get("__file__"):
        return Path(file) in _places(name, folder)
    return str(folder.joinpath(*name.split("."))) in [*found.get("__path__", ())]  # a package without __init__.py


def _places(module: str, folder: Path) -> tuple[Path, Path]:
    beside = folder.joinpath(*module.split("."))
    return beside.with_suffix(".py"), beside / "__init__.py"


def _beside(module: str, folder: Path) -> Path | None:
    return next((path for path in _places(module, folder) if path.is_file()), None)


def _file(name: str, module: str, folder: Path) -> Path:
    if beside := _beside(module, folder):
        return beside
    if (spec := _spec(module)) is None:
        files = (path.stem for path in folder.glob("*.py"))
        hint = did_you_mean(module, files, "write the function into this file, or install its package")
        file, _ = _places(module, folder)
        raise ConfigError(f"`{name}` was not found: there is no file {file}, and no module {module} is installed; {hint}")
    if not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError(f"`{name}` is in module {module}, which has no Python source; name a function of a .py file")
    return Path(spec.origin)


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None


def _imported(name: str, module: str, file: Path, digest: str) -> ModuleType:
    if getattr(sys.modules.get(module), _DIGEST, digest) != digest:
        # a reload would keep functions that are no longer in the file; modules inside a package are bound to it as they are imported
        for old in [old for old in [*sys.modules] if f"{old}.".startswith(f"{module}.")]:
            del sys.modules[old]
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python takes it for that of a new file of equal size and second
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ConfigError(
            f"`{name}` cannot be imported: {_place(error, file)}: {type(error).__name__}: {error}; correct the file"
        ) from error
    finally:
        sys.dont_write_bytecode = before
    if (own := getattr(loaded, "__file__", None)) is None or Path(own).resolve() != file.resolve():
        raise ConfigError(
            f"`{name}` cannot be imported: {file} has the same name as {own or f'the module {module} of Python'}, which this process "
            f"imports in its place; {_RENAME}"
        )
    setattr(loaded, _DIGEST, digest)
    return loaded


def _check_imports(name: str, file: Path, source: bytes, folder: Path) -> None:
    # a file of another folder must not run in place of one beside `file`; installed modules come first, as everywhere in Python
    try:
        nodes = [*ast.walk(ast.parse(source))]
    except (SyntaxError, ValueError):  # the import says where it is
        return
    used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    for module in sorted({each.partition(".")[0] for each in used} - sys.stdlib_module_names):
        beside, spec = _beside(module, folder), _spec(module)
        found = Path(spec.origin) if spec and spec.has_location and spec.origin else None
        if beside and found and found.resolve() != beside.resolve() and not {"site-packages", "dist-packages"} & {*found.parts}:
            raise ConfigError(
                f"`{name}`: {file} imports {module}, but {beside} has the same name as {found}, which this process imports in its place; "
                f"{_RENAME}"
            )


def _place(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{file}, line {lines[-1]}" if lines else str(file)
