"""Usage errors in three parts, as all others: an option that does not exist, a value out of its range, no command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from curvscope.cli.guard import report
from curvscope.errors import EXIT_USAGE

# click's UsageError, which newer versions of typer carry in themselves
UsageProblem: type[Any] = typer.BadParameter.__bases__[0]


class Commands(TyperGroup):
    """The group of commands; what the command line gets wrong is told as every other error is."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """As typer's own, which reads the options that come before the command."""
        with _told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """As typer's own, which reads the command's options and runs it."""
        with _told():
            return super().invoke(ctx)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UsageProblem as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no error: typer prints the help
            raise
        command = error.ctx.command_path if error.ctx is not None else "curvscope"
        report(error.format_message(), command, f"{command} --help lists what there is and what it takes.")
        raise typer.Exit(EXIT_USAGE) from None
