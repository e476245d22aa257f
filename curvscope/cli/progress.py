"""Progress bars with layer names, on stderr and only on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


class ProgressBars:
    """One bar a stage; call it as `(stage, item, done, total)`. Silent where the console is no terminal.

    Used as a context manager; the bars vanish at the end, whatever the end is.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.fields[stage]:<16}", markup=True),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[item]}", markup=False),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, item: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done in this stage, and which item is at work."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task("", total=max(total, 1), stage=stage, item="")
        finished = done >= total
        width = max(10, self._progress.console.width - 66)
        name = Text(item)
        name.truncate(width, overflow="ellipsis")
        self._progress.update(
            self._tasks[stage], completed=done, total=max(total, 1), item="" if finished else name.plain
        )
