"""The `curvscope` command: its options, and `main`, which `curvscope.__main__` calls."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from curvscope._version import __version__
from curvscope.cli.analyze import analyze
from curvscope.cli.explain import explain
from curvscope.cli.export import export
from curvscope.cli.guard import drop_output, report, unprintable
from curvscope.cli.show import show
from curvscope.cli.usage import Commands
from curvscope.errors import EXIT_OK

app = typer.Typer(
    name="curvscope",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(no_args_is_help=True)(analyze)
app.command(no_args_is_help=True)(show)
app.command(no_args_is_help=True)(export)
app.command()(explain)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"curvscope {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Try: [bold cyan]curvscope analyze sample_models/digits_vit.pt[/]    "
    "Exit codes: 0 done, 1 findings at or above --fail-on, 2 usage, 3 bad input, 4 the analysis failed, "
    "130 interrupted, 143 terminated."
)
def curvscope(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """A debugger for curvature: how well K-FAC approximates the exact GGN, layer by layer."""


def main() -> None:
    """Run the command line; exits with the codes of `curvscope.errors`.

    Raises:
        KeyboardInterrupt: where no command had begun.
    """
    try:
        app()
    except SystemExit as end:
        # help and versions are printed by typer, which takes a reader that stops early for a failure
        cause = end.__context__
        if isinstance(cause, OSError) and cause.errno == errno.EPIPE:
            drop_output()
            sys.exit(EXIT_OK)
        raise
    except OSError as error:
        drop_output()
        told = unprintable(error)
        report(told.what, told.where, told.remedy)
        sys.exit(told.exit_code)
