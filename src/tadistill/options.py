"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, for instance seeds=[10].", metavar="[KEY=VALUE]…")]
StudyName = Annotated[str, typer.Argument(help="A study's name, or its directory.", metavar="STUDY")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where studies and the store live (TADISTILL_RUNS; default ./runs).")]
