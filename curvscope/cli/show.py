"""`curvscope show`: the report of a saved run, without torch."""

from __future__ import annotations

from typing import Annotated

import typer

from curvscope.cli import options
from curvscope.cli.guard import Output, guarded


def show(
    run_file: options.RunFile,
    layer: Annotated[
        str | None,
        typer.Argument(
            metavar="LAYER",
            help="One layer in full: its name, or a part that no other has.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        bool, typer.Option("--steps", help="The damped steps of the whole network and the evidence in full.")
    ] = False,
    format: options.Format = "table",
    debug: options.Debug = False,
) -> None:
    """Show a saved run, or one of its layers in full.

    For example

        curvscope show digits_vit.curvscope.h5

        curvscope show digits_vit.curvscope.h5 blocks.0.attn.q_proj
    """
    with guarded(debug):
        from curvscope.run import open_run

        run = open_run(run_file)
        console = Output()
        if format == "json":
            from curvscope.present import json

            print_document(console, json.dumps(run))
        else:
            from curvscope.present.terminal import render

            render(run, console, layer, path=run_file, steps=steps)


def print_document(console: Output, document: str) -> None:
    """Text for other programs: not wrapped, not coloured."""
    console.out(document, style=None, highlight=False)
