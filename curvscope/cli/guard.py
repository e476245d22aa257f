"""How a command ends: exit codes, errors in three parts on stderr, a traceback only with --debug."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from curvscope.errors import EXIT_ANALYSIS, CurvscopeError, OutputError, ending


class Output(Console):
    """A console on a stream that may close early (`| head`) or lack characters."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
        super().__init__(file=stream)
        self._for_messages = stderr

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's own.

        Raises:
            OutputError: the stream refuses, as a full disk does.
        """
        with self._told():
            super().print(*objects, **options)

    def out(self, *objects: Any, **options: Any) -> None:
        """As rich's own.

        Raises:
            OutputError: as `print`.
        """
        with self._told():
            super().out(*objects, **options)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell in words why the report can't be written; where messages can't be, there is nobody to tell."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._for_messages:
                drop_output()
                raise unprintable(error) from error

    def on_broken_pipe(self) -> None:
        """Leave it to `guarded`: rich's own exit code, 1, means findings here."""
        raise BrokenPipeError


def unprintable(error: OSError) -> OutputError:
    """The error for output that nothing takes."""
    return OutputError(
        f"The output could not be written: {error.strerror or error}.",
        where="standard output",
        remedy="Free some space, or send it somewhere else.",
    )


def drop_output() -> None:
    """Let Python's last flush go nowhere; else it complains once more at exit, with a code of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn what a command raises into its exit code and, for an error, three parts on stderr.

    Raises:
        typer.Exit: with the exit code of `curvscope.errors`.
    """
    try:
        yield
    except CurvscopeError as error:
        if debug:
            _traceback()
        report(error.what, error.where, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        if debug:
            _traceback()
        what, code = ending(stop)
        report(what, "", "No half-written file was left.")
        raise typer.Exit(code) from None
    except BrokenPipeError:
        # The reader has seen enough.
        drop_output()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except MemoryError:
        if debug:
            _traceback()
        report(
            "There is not enough memory.",
            "",
            "Give less with --memory 2GiB, analyze fewer layers with --layers, or make the batch smaller.",
        )
        raise typer.Exit(EXIT_ANALYSIS) from None
    except Exception as error:
        if debug:
            _traceback()
        words = " ".join(str(error).split())
        report(
            f"Something unexpected went wrong: {type(error).__name__}: {words[:500]}",
            "a fault of curvscope, most likely, and not of yours",
            ("Report the traceback above" if debug else "Run it again with --debug and report the traceback")
            + ", with the model's class, its torch version and the command.",
        )
        raise typer.Exit(EXIT_ANALYSIS) from None


def report(what: str, where: str, remedy: str) -> None:
    """An error in three parts on stderr, each on lines of its own that are not broken."""
    console = Output(stderr=True)
    for label, words, style in (
        ("error", what, "bold red"),
        ("where", where, "bold"),
        ("next", remedy, "bold green"),
    ):
        if words:
            line = Text(f"{label}: ", style=style)
            indented = words.rstrip().replace("\n", "\n" + " " * (len(label) + 2))
            line.append(indented, style="not bold default")
            console.print(line, soft_wrap=True, highlight=False)


def _traceback() -> None:
    import traceback

    traceback.print_exc()
