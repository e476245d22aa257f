"""The page of one code, and the list of all."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

from curvscope.diagnose.catalog import Entry
from curvscope.present.terminal.page import Page

FAMILIES = {
    "CS1": "how well a Kronecker product describes a layer",
    "CS2": "signals, units and examples",
    "CS3": "what the report does not cover",
    "CS4": "damping",
    "CS5": "stability of the optimizer",
}
PARTS = (
    ("what it is", "what"),
    ("why it matters", "why"),
    ("severity", "severity"),
    ("threshold", "threshold"),
    ("how to fix", "fix"),
    ("example", "example"),
    ("source", "source"),
)


def print_page(console: Console, entry: Entry) -> None:
    """One code: a part a paragraph."""
    page = Page(console, None)
    title = page.text(f"{entry.code}  {entry.title}", "bold")
    grid = Table.grid(padding=(0, 2, 1, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, name in PARTS:
        grid.add_row(label, page.text(getattr(entry, name), "green" if name == "fix" else ""))
    console.print(Panel(grid, title=title, title_align="left", border_style="cyan", padding=(1, 1, 0, 1)))


def list_codes(console: Console, catalog: Mapping[str, Entry]) -> None:
    """Every code with its title, a family at a time."""
    page = Page(console, None)
    for prefix, words in FAMILIES.items():
        entries = [entry for code, entry in sorted(catalog.items()) if code.startswith(prefix)]
        if not entries:
            continue
        page.heading(words)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for entry in entries:
            grid.add_row(entry.code, page.text(entry.title))
        console.print(Padding(grid, (0, 0, 0, 1)))
    console.print()
    page.command("curvscope", "explain", next(iter(catalog)))
