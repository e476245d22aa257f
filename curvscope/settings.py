"""Every default of an analysis, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

APPROXIMATIONS = ("kfac_expand", "kfac_reduce", "ekfac_expand", "ekfac_reduce", "kron_best", "diag")
FISHERS = ("auto", "exact", "probe", "mc", "empirical")
MEASURES = ("errors", "spectra", "spectral", "kron_best", "stability", "split")
DUMPS = ("factors", "spectra", "columns", "blocks")


@dataclass(frozen=True)
class Settings:
    """How an analysis is run; what `analyze` and the command line take beside model, batch and loss.

    Attributes:
        fisher: how the loss Hessian's root is taken: exact, probe, mc, empirical, or auto.
        samples: draws of `probe` and `mc` (None: 8; error bars take 4, EKFAC's 6).
        layers: glob patterns of layer names to keep; empty keeps all.
        skip: glob patterns of layer names to leave out.
        measure: extra measures beside the default ones: "spectral" (relative spectral error of every
            approximation, not only of the two K-FACs), "kron_best" (compute it even where it dominates), "split" (what
            K-FAC's error comes from, likewise), "stability" (sharpness by layer and on halves even without an optimizer).
        device: auto, cpu or cuda.
        dtype: float32 or float64, the arithmetic of the network's own passes.
        memory_bytes: bound on the tool's own peak (None: half of what is free).
        time_seconds: what `fisher="auto"` may spend on exact columns.
        seed: seeds every random draw; the global random state is neither read nor changed.
        dump: optional parts of the file: factors (always), spectra (eigenvectors), columns, blocks.
        max_columns: `auto` is exact for a layer only where min(P, N K) is at most this.
        example_axes: example axis of an input by name or position, where it is not axis 0.
    """

    fisher: str = "auto"
    samples: int | None = None
    layers: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    measure: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "float32"
    memory_bytes: int | None = None
    time_seconds: float = 60.0
    seed: int = 0
    dump: tuple[str, ...] = ()
    max_columns: int = 8192
    example_axes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, as /config stores them."""
        return asdict(self)
