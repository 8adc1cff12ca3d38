"""What mkdocs does for this site beside its plugins: it generates reference pages, and removes the marks that tests read.

`mkdocs.yml` names this file. The page of commands comes from the command line itself.
"""

import re
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tadistill import cli

MARK = re.compile(r"^(```\w+)(.*?) test=[\w-]+", re.MULTILINE)
"""The info string of a block that a test runs in another way: `test_how_to.py` reads it, pymdownx does not know it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the marks of tests from a page."""
    return MARK.sub(r"\1\2", markdown)


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
    """Turn the pages that a text names into links."""
    return re.sub(r"docs/([\w/-]+\.md)", lambda found: f"[{Path(found[1]).stem}](../{found[1]})", text)
