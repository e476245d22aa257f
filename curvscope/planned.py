"""What `--dry-run` tells: the plan of an analysis as plain records, without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PlannedLayer:
    """One layer: how it will be treated, what its columns take, and the seconds that its measures will.

    `treatment` is exact, estimated, empirical or not_assessed (then `reason` says why); `form` how its columns are
    kept; `sweep` counts from 1 and is 0 where no columns are kept.
    """

    name: str
    kind: str
    parameters: int
    treatment: str
    form: str
    sweep: int
    kept_bytes: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class PlannedRun:
    """A whole analysis: its passes, bytes and seconds.

    Attributes:
        name, loss: model and loss in words.
        fisher, reason: what will be taken, and why it is not exact where `auto` decided so.
        examples, batches: N and how many batches these come in.
        piece_examples: how many examples one pass takes.
        columns: K, backward passes a sweep beside that of the gradient.
        sweeps: how often the data is gone through with backward passes.
        backward_passes: of all sweeps and pieces.
        budget_bytes: --memory, or half of what is free.
        peak_bytes: the estimated peak, beside model, data and libraries.
        kept_bytes: the columns of the largest sweep.
        seconds: "passes", "measure", and of the whole network "steps" and "stability".
        layers: in forward order.
        notes: sentences about the input.
    """

    name: str
    loss: str
    fisher: str
    reason: str
    device: str
    dtype: str
    examples: int
    batches: int
    piece_examples: int
    columns: int
    sweeps: int
    backward_passes: int
    budget_bytes: int
    peak_bytes: int
    kept_bytes: int
    seconds: dict[str, float]
    layers: list[PlannedLayer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        """Of all stages; loading and export are over when a plan is made."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --format json prints them."""
        return {**dataclasses.asdict(self), "total_seconds": self.total_seconds}
