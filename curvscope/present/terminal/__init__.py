"""The report in a terminal: `render` a run, or one layer of it, to a rich console."""

from __future__ import annotations

import difflib
import os
from typing import TextIO

from rich.console import Console

from curvscope.errors import UsageError
from curvscope.present.terminal.layer_page import layer_page
from curvscope.present.terminal.overview import overview
from curvscope.present.terminal.page import Page
from curvscope.present.terminal.steps import steps_page
from curvscope.records import Run

__all__ = ["render", "show"]

# Columns that every page fits in.
LEAST_WIDTH = 40


def render(
    run: Run,
    console: Console,
    layer: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    steps: bool = False,
) -> None:
    """Print the report, one layer in full, or the steps of the whole network in full.

    In the width, colours and characters that `console` has.

    Args:
        run: the run, from an analysis or from a file.
        console: where to print.
        layer: a layer's name, or a part of it that no other name has.
        path: the file the run is in, for the commands the report suggests.
        steps: the steps of the whole network in full instead.

    Raises:
        UsageError: there is no layer of that name.
        OutputError: the run's file is damaged; nothing is printed then.
    """
    page = Page(console, None if path is None else os.fspath(path))
    if page.width < LEAST_WIDTH:
        page.lines([page.text(f"{page.width} columns: lines break below {LEAST_WIDTH}.", "yellow")])
    # a stored run reads what a page shows before any of it is printed
    if steps:
        steps_page(page, run)
    elif layer is None:
        for stored in run.layers.values():
            stored.spectrum.get("ggn")
        overview(page, run)
    else:
        chosen = run.layers[find_layer(run, layer)]
        for part in (chosen.spectrum, chosen.factors, chosen.attributes):
            _ = list(part.values())
        layer_page(page, run, chosen)


def show(
    run: Run,
    layer: str | None = None,
    *,
    file: TextIO | None = None,
    path: str | os.PathLike[str] | None = None,
) -> None:
    """`render` to a text stream, standard output by default."""
    render(run, Console(file=file), layer, path)


def find_layer(run: Run, wanted: str) -> str:
    """The exact name of the one layer that is called `wanted`, or whose name contains it.

    Raises:
        UsageError: no layer, or more than one, matches.
    """
    if wanted in run.layers:
        return wanted
    matches = [name for name in run.layers if wanted in name]
    if len(matches) == 1:
        return matches[0]
    near = matches or difflib.get_close_matches(wanted, run.layers, n=5, cutoff=0.4) or list(run.layers)[:10]
    raise UsageError(
        f"{len(matches)} layers have {wanted!r} in their names." if matches else f"There is no layer {wanted!r}.",
        where=f"the run's {len(run.layers)} layers",
        remedy="Name one of them: " + ", ".join(near[:10]) + (", ..." if len(near) > 10 else ""),
    )
