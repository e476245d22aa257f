"""`curvscope export`: a saved run for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvscope.cli import options
from curvscope.cli.guard import Output, guarded
from curvscope.cli.quantities import one_of
from curvscope.present.export import FORMATS


def export(
    run_file: options.RunFile,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            parser=one_of(FORMATS),
            metavar="|".join(FORMATS),
            help="npz, safetensors: the arrays. csv: a folder with one file a table. json: everything but the arrays.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write (default: the run's name, here).", show_default=False),
    ] = None,
    force: options.Force = False,
    debug: options.Debug = False,
) -> None:
    """Write a saved run in another format.

    For example

        curvscope export digits_vit.curvscope.h5 --to npz

        curvscope export digits_vit.curvscope.h5 --to csv -o tables
    """
    with guarded(debug):
        from curvscope.present.export import check_export, default_path
        from curvscope.present.export import export as write
        from curvscope.present.kept import check_kept
        from curvscope.run import open_run

        target = output or default_path(run_file, to)
        check_kept(target, (run_file,))
        run = open_run(run_file)
        check_export(target, to, force=force)
        written = write(run, target, to, force=force)
        Output().print(f"wrote {written}", soft_wrap=True, markup=False, highlight=False)
