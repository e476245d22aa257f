"""What every page of the report shares: characters the console can show, tables that never wrap, findings."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from curvscope.present.names import spoken
from curvscope.present.numbers import number, with_stderr
from curvscope.records import FindingRow

GAP = 2
# Ratios of traces and cosines below this are rounding: of float64 sums over float32 factors.
ROUNDING = 1e-9
SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
STATUS_WORDS = {
    "not_assessed": "not assessed",
    "skipped": "skipped",
    "not_converged": "not converged",
    "estimated": "estimated",
    "ok": "note",
}
# Rich would put its ASCII box, with vertical lines, in place of this one.
ASCII_HEAD = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
TRANSLITERATED = str.maketrans(
    {
        "…": "...",
        "×": "x",
        "±": "+-",
        "–": "-",
        "—": "-",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "·": "-",
        "λ": "lambda",
    }
)


def titled(code: str, title: str) -> str:
    """A finding's code with its title, where it has one."""
    return f"{code} {title}".strip()


@dataclass(frozen=True)
class Column:
    """A table's column: its header (lines), its cells, and how dear it is (the smallest is dropped first)."""

    header: str
    cells: Sequence[tuple[str, str]]
    worth: int
    left: bool = False

    @property
    def width(self) -> int:
        """Characters that the widest cell or header line needs."""
        lines = [*self.header.split("\n"), *(text for text, _ in self.cells)]
        return max(len(line) for line in lines)


class Page:
    """A console with the characters it can show and the commands that lead on from here."""

    def __init__(self, console: Console, path: str | None) -> None:
        self.console = console
        self.path = path
        self.ascii_only = console.options.ascii_only
        self.width = console.width
        self.dash = "-" if self.ascii_only else "–"
        self.ellipsis = "..." if self.ascii_only else "…"
        self.times = "x" if self.ascii_only else "×"
        self.group_mark = "*" if self.ascii_only else "·"
        self.arrow = "->" if self.ascii_only else "→"

    def text(self, words: str, style: str = "") -> Text:
        """Words of any origin, safe to print here: no control characters, none that the encoding lacks."""
        return Text(self.safe(words), style=style)

    def safe(self, words: str) -> str:
        """The words without control characters, in ASCII where the console has nothing else."""
        words = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in words)
        if self.ascii_only:
            words = words.translate(TRANSLITERATED).encode("ascii", "backslashreplace").decode("ascii")
        return words

    def measured(self, value: float, stderr: float = math.nan, *, estimated: bool = False) -> str:
        """A number with its standard error, marked ~ where it is estimated without one; a dash where there is none."""
        if math.isnan(value):
            return self.dash
        if math.isnan(stderr):
            return f"~{number(value)}" if estimated else number(value)
        return with_stderr(value, stderr, "+-" if self.ascii_only else "±")

    def ratio(self, value: float, stderr: float = math.nan, *, estimated: bool = False) -> str:
        """The same for a ratio of two like quantities; one that is nothing but their rounding is about 0."""
        if abs(value) < ROUNDING:
            return "~0" if self.ascii_only else "≈0"
        return self.measured(value, stderr, estimated=estimated)

    def heading(self, words: str) -> None:
        """A heading with a line to the right edge."""
        self.console.print()
        rule = Rule(self.text(words, "bold"), align="left", style="dim", characters="-" if self.ascii_only else "─")
        self.console.print(rule)

    def lines(self, lines: Iterable[Text], indent: int = 1) -> None:
        """Text that wraps, each piece on a line of its own."""
        for line in lines:
            self.console.print(Padding(line, (0, 1, 0, indent)), highlight=False)

    def table(self, columns: Sequence[Column], row_styles: Sequence[str] | None = None) -> None:
        """A table in which no row wraps: where the width is too small, the least dear columns go, which is told."""
        kept = self.fitting(columns, self.width - 2)
        head = ASCII_HEAD if self.ascii_only else box.SIMPLE_HEAD
        table = Table(box=head, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="bold")
        for column in kept:
            table.add_column(
                column.header,
                justify="left" if column.left else "right",
                no_wrap=True,
                width=column.width,
                overflow="crop",
            )
        for index in range(len(kept[0].cells)):
            cells = [self.text(*column.cells[index]) for column in kept]
            table.add_row(*cells, style=row_styles[index] if row_styles else "")
        self.console.print(Padding(table, (0, 0, 0, 1)))
        if missing := self.left_out(columns, kept):
            self.no_room(missing)

    def no_room(self, missing: Sequence[str]) -> None:
        """Names the columns that a table leaves out."""
        words = f"No room here for {', '.join(missing)}: a wider terminal shows them, the file has them."
        self.lines([self.text(words, "dim")])

    @classmethod
    def fitting(cls, columns: Sequence[Column], room: int) -> list[Column]:
        """The columns that fit the room, without the least dear ones (all of the same worth together)."""
        kept = list(columns)
        while kept and cls.needed(kept) > room and len({column.worth for column in kept}) > 1:
            least = min(column.worth for column in kept)
            kept = [column for column in kept if column.worth > least]
        return kept

    @staticmethod
    def left_out(columns: Sequence[Column], shown: Sequence[Column]) -> list[str]:
        """The headers of the columns that are not shown, in one line each; those of like first lines together."""
        headers = [column.header.replace("-\n", "").split("\n") for column in columns if column not in shown]
        found: dict[str, list[str]] = {}
        for first, *rest in headers:
            found.setdefault(first.strip(), []).append(" ".join(rest).strip())
        return [f"{first} {' and '.join(filter(None, rest))}".strip() for first, rest in found.items()]

    @staticmethod
    def needed(columns: Sequence[Column]) -> int:
        """Characters that the columns and the gaps between them need."""
        return sum(column.width for column in columns) + GAP * (len(columns) - 1)

    def findings(self, rows: Sequence[FindingRow], *, name_layer: bool = True) -> None:
        """Each finding: severity, layer and code, then the evidence, then what to do."""
        for index, row in enumerate(rows):
            if index:
                self.console.print()
            title = self.text(row.severity.upper().ljust(8), SEVERITY_STYLES.get(row.severity, "bold"))
            if name_layer:
                title.append(self.safe(spoken(row.layer) or "the whole network"), style="bold")
                title.append("  ")
            title.append(self.safe(row.code), style="dim")
            if row.title:
                title.append(self.safe(f" {row.title}"), style="dim")
            if row.confidence < 1:
                title.append(f"  {row.confidence:.0%} sure", style="dim")
            self.lines([title])
            body = [self.text(row.evidence)]
            if row.caused_by:
                body.append(self.text(f"likely caused by {row.caused_by}", "dim"))
            if row.reason:
                body.append(self.text(f"{STATUS_WORDS.get(row.status, row.status)}: {row.reason}", "dim"))
            if row.remedy:
                body.append(self.text(f"{self.arrow} {row.remedy}", "green"))
            self.lines(body, indent=9)

    def command(self, *words: str, why: str = "") -> None:
        """A command on a line of its own, never broken, so that it can be copied."""
        line = self.text("  " + " ".join(shlex.quote(word) for word in words), "bold cyan")
        self.console.print(line, soft_wrap=True, highlight=False)
        if why:
            self.lines([self.text(why, "dim")], indent=4)
