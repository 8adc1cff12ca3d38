"""What mkdocs does for this site beside its plugins: generated reference pages, blocks without the marks of tests, order of a search.

`mkdocs.yml` names this file. The page of commands comes from the command line itself, the page of keys from the classes of the
configuration.
"""

import ast
import functools
import re
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tadistill import cli
from tadistill.config.reference import WORDS, Key, Part, reference
from tadistill.glossary import GLOSSARY

MARK = re.compile(r"^(```\w+)(.*?) test=[\w-]+", re.MULTILINE)
"""The info string of a block that a test runs in another way: `test_how_to.py` reads it, pymdownx does not know it."""

_HEAD = re.compile(r"^# (.+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, write in {"commands": commands, "keys": keys, "code": code, "glossary": glossary}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=write()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the marks of tests from a page. How-to pages come first in a search."""
    if page.file.src_uri.startswith("how-to/"):
        page.meta["search"] = {"boost": 3}
    return MARK.sub(r"\1\2", markdown)


def keys() -> str:
    """Return the page of all keys of a recipe, in the order of a recipe."""
    head = """# Keys of a recipe

This page is generated from the classes that read a recipe. `tadistill explain KEY` prints the same about one key.
A heading is the place of the keys below it: `method.optim` means `method: {optim: {…}}`, and NAME stands for a name of your choice.
[The recipe](recipe.md) explains the larger parts."""
    top = ["", *(key.name for key in reference()[0].keys)]
    return "\n\n".join([head, *map(_part, sorted(reference(), key=lambda part: top.index(part.places[0].split(".")[0])))])


def _part(part: Part) -> str:
    place = part.places[0] or ("The short form" if part.name == "Short form" else "Top level")
    title = f"`{place}: {{type: {part.type}}}`" if part.type else f"`{place}`" if part.places[0] else place
    anchor = "-".join(filter(None, (place.replace(".", "-").replace(" ", "-").lower(), part.type)))
    whole = [f"`{other}`" for other in part.places[1:] if ".phases." not in other]
    phases = ["in `phases`"] if len(whole) < len(part.places[1:]) else []
    also = f"\n\nAlso at {', and '.join(filter(None, (', '.join(whole), *phases)))}." if whole or phases else ""
    rows = [_key(key) for key in part.keys if not (part.type and key.name == "type")]
    table = ["| key | meaning | value | default |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {title} {{ #{anchor} }}", "", f"{part.meaning}{also} More: [{_title(part.page)}](../{part.page}).", "", *table])


def _key(key: Key) -> str:
    value = ", ".join(filter(None, (key.type, key.allowed)))
    default = key.default if key.default in (*WORDS, "") else f"`{key.default}`"
    return "| " + " | ".join(part.replace("|", "\\|") for part in (f"`{key.name}`", key.meaning, value, default)) + " |"


def _title(page: str) -> str:
    return Path(page.split("#")[0]).stem


def glossary() -> str:
    """Return the page of all words that reports explain."""
    head = "# Glossary\n\nThese are the words of reports. In a report, hold the mouse over a word to read its sentence."
    return "\n".join([head, "", "| word | meaning |", "|---|---|", *(f"| {word} | {text} |" for word, text in GLOSSARY.items())])


def code() -> str:
    """Return the page of all files of the package, with the first sentence of each."""
    head = """# The code

This page is generated from the first sentences of the files in `src/tadistill`.
[Contributing](contributing.md) has the layers, the conventions, and the steps to add something."""
    package = Path(cli.__file__).parents[1]
    folders = dict.fromkeys(path.parent for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent != package, path)))
    return "\n\n".join([head, *(_folder(folder, package) for folder in folders)])


def _folder(folder: Path, package: Path) -> str:
    told = {path.name: _sentence(path) for path in sorted(folder.glob("*.py"))}
    title, about = folder.relative_to(package.parent), told.pop("__init__.py", "")
    rows = [f"| `{name}` | {text} |" for name, text in told.items() if text]
    return "\n".join([f"## `{title}/`", "", about, "", *(["| file | |", "|---|---|", *rows] if rows else [])])


def _sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0].replace("|", "\\|")


def commands() -> str:
    """Return the page of all commands, in the order of `tadistill -h`."""
    group = typer.main.get_command(cli.app)
    context = click.Context(group, info_name="tadistill")
    head = "# Commands\n\nThis page is generated from the command line; `tadistill COMMAND -h` prints the same.\n"
    return "\n".join([head, *(_command(name, group.get_command(context, name), context) for name in group.list_commands(context))])


def _command(name: str, command: Any, parent: click.Context) -> str:
    context = click.Context(command, info_name=name, parent=parent)
    parameters = [each for each in command.get_params(context) if "--help" not in each.opts]
    arguments = [_argument(each) for each in parameters if each.param_type_name == "argument"]
    lines = [
        f"## `{name}`",
        "",
        _linked(command.help or ""),
        "",
        "```text",
        " ".join(["tadistill", name, *arguments, "[OPTIONS]"]),
        "```",
        "",
    ]
    table = ["| argument or option | meaning | default |", "|---|---|---|", *map(_row, parameters), ""] if parameters else []
    return "\n".join([*lines, *table])


def _argument(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _row(parameter: Any) -> str:
    name = _argument(parameter) if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
    default = "" if parameter.default in (None, False, (), "") else f"`{parameter.default}`"
    return f"| `{name}` | {_linked(getattr(parameter, 'help', None) or '')} | {'required' if parameter.required else default} |"


def _linked(text: str) -> str:
    """Turn the pages that a text names by their titles into links."""
    return re.sub(r'the page "([^"]+)" of the documentation', lambda found: f"[{found[1]}](../{_pages()[found[1]]})", text)


@functools.cache
def _pages() -> dict[str, str]:
    """Return title -> path of every page."""
    folder = Path(__file__).parent
    heads = {path.relative_to(folder).as_posix(): _HEAD.search(path.read_text(encoding="utf-8")) for path in folder.rglob("*.md")}
    written = {head[1]: path for path, head in heads.items() if head}
    return written | {"Glossary": "reference/glossary.md", "Keys of a recipe": "reference/keys.md", "Commands": "reference/commands.md"}
