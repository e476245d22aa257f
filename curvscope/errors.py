"""The errors meant for users: what is wrong, where, and what to do next."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FINDINGS = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_ANALYSIS = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is half written is cleaned up."""


def ending(stop: KeyboardInterrupt) -> tuple[str, int]:
    """What stopped a command, in a word, and its exit code."""
    return ("Terminated.", EXIT_TERMINATED) if isinstance(stop, Terminated) else ("Interrupted.", EXIT_INTERRUPTED)


class CurvscopeError(Exception):
    """Base of every error that curvscope raises on purpose.

    Args:
        what: one sentence saying what is wrong, with expected and got where there are such.
        where: the file, key, layer or argument it concerns.
        remedy: what the user can do next.

    `str(error)` joins the three parts, one a line.
    """

    exit_code = EXIT_ANALYSIS

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__("\n".join(part for part in (what, where, remedy) if part))


class UsageError(CurvscopeError):
    """Options that contradict each other or name nothing that exists."""

    exit_code = EXIT_USAGE


class BadInputError(CurvscopeError):
    """A file, model, batch or loss that can't be analyzed."""

    exit_code = EXIT_BAD_INPUT


class CheckpointError(BadInputError):
    """A checkpoint that can't be read, is not trusted, or does not fit its model."""


class BatchError(BadInputError):
    """A batch that can't be read, is empty, or that the model refuses."""


class LossError(BadInputError):
    """A loss that is not a scalar, not a sum over examples, or not convex in the outputs."""


class ModelError(BadInputError):
    """A model without anything to analyze, or whose numbers are not finite."""


class OutputError(BadInputError):
    """A result file that can't be written, exists already, or can't be read back."""


class DeviceError(BadInputError):
    """A device that was asked for and is not there."""


class LayoutError(BadInputError):
    """A layer whose rows can't be assigned to examples."""


class AnalysisError(CurvscopeError):
    """The analysis itself failed on input that looked sound."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on the device or on the CPU; needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = str(error)
    told = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(each in words for each in told)
