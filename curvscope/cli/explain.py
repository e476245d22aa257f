"""`curvscope explain`: what a finding's code stands for."""

from __future__ import annotations

from typing import Annotated

import typer

from curvscope.cli import options
from curvscope.cli.guard import Output, guarded


def explain(
    code: Annotated[
        str | None,
        typer.Argument(metavar="CODE", help="A finding's code; without one all are listed.", show_default=False),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Explain a finding's code: what it is, why it matters, its threshold, how to fix it.

    For example

        curvscope explain CS501

        curvscope explain
    """
    with guarded(debug):
        from curvscope.diagnose.catalog import CATALOG, entry
        from curvscope.present.terminal.explain import list_codes, print_page

        if code is None:
            list_codes(Output(), CATALOG)
        else:
            print_page(Output(), entry(code))
