"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvscope.cli.quantities import one_of

OUTPUT = "Output"
FORMATS = ("table", "json")

RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.h5", help="A file that curvscope analyze wrote.", show_default=False)
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace an earlier result, and nothing else.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        parser=one_of(FORMATS),
        metavar="|".join(FORMATS),
        help="A report to read, or one JSON document on stdout.",
        rich_help_panel=OUTPUT,
    ),
]
