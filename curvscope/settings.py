"""Every default of an analysis, in one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from curvscope.errors import UsageError

APPROXIMATIONS = ("kfac_expand", "kfac_reduce", "ekfac_expand", "ekfac_reduce", "kron_best", "diag")
FISHERS = ("auto", "exact", "probe", "mc", "empirical")
MEASURES = ("spectral", "kron_best", "split", "damping", "steps", "stability")
DUMPS = ("factors", "spectra", "columns", "blocks")
DTYPES = ("float32", "float64")
DEVICES = ("auto", "cpu", "cuda")
# Dampings whose squares, and products with sums of squares, float64 holds.
LEAST_DAMPING, MOST_DAMPING = 1e-100, 1e100
SQUARED = f"from {LEAST_DAMPING:g} to {MOST_DAMPING:g}, where float64 holds its square"


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
            K-FAC's error comes from, likewise), "damping" (steps and conditions of layers even where they take long),
            "steps" (of the whole network even where they take long), "stability" (sharpness by layer and on halves even
            without an optimizer).
        device: auto, cpu or cuda.
        dtype: float32 or float64, the arithmetic of the network's own passes.
        memory_bytes: bound on the tool's own peak (None: half of what is free).
        time_seconds: what `fisher="auto"` may spend on exact columns.
        seed: seeds every random draw; the global random state is neither read nor changed.
        dump: optional parts of the file: factors (always), spectra (eigenvectors), columns, blocks.
        max_columns: `auto` is exact for a layer only where min(P, N K) is at most this.
        example_axes: example axis of an input by name or position, where it is not axis 0.
        dataset_size: examples of the whole training set, for the evidence.
        example_index: the input, by name or position, that holds the graph of every node.
        damping: the optimizer's own damping, in the loss's scale (None: the checkpoint's, if it has one).
        batches: how many of several batches are taken, from the first on (None: all).
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
    dataset_size: int | None = None
    example_index: str | None = None
    damping: float | None = None
    batches: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, as /config stores them."""
        return asdict(self)


def checked_settings(**given: Any) -> Settings:
    """The settings, each checked against what exists.

    Raises:
        UsageError: a value that is not among the choices.
    """
    given["dtype"] = str(given["dtype"]).removeprefix("torch.")  # torch.float64 itself is as good
    for key, choices in (("fisher", FISHERS), ("dtype", DTYPES), ("device", DEVICES)):
        if given[key] not in choices:
            raise UsageError(
                f"{given[key]!r} is no choice for {key}.",
                where=f"--{key}",
                remedy=f"Choose one of {', '.join(choices)}.",
            )
    for key, several in (("measure", MEASURES), ("dump", DUMPS)):
        for value in given[key]:
            if value not in several:
                raise UsageError(
                    f"{value!r} is no choice for {key}.",
                    where=f"--{key}",
                    remedy=f"Choose from {', '.join(several)}.",
                )
    if not isinstance(given["seed"], int) or not 0 <= given["seed"] < 2**63:
        raise UsageError("seed must be a whole number from 0 to 2^63 - 1.", where="--seed", remedy="Choose another.")
    if given["samples"] is not None and given["samples"] < 1:
        raise UsageError("samples must be at least 1.", where="--samples", remedy="Leave it out for the default.")
    damping = given.get("damping")
    if damping is not None and not 0 < damping < math.inf:
        raise UsageError(
            "damping must be positive and finite.", where="--damping", remedy="Leave it out if the optimizer has none."
        )
    if damping is not None and not LEAST_DAMPING <= damping <= MOST_DAMPING:
        raise UsageError(
            f"damping must be {SQUARED}; got {damping:g}.", where="--damping", remedy="Give the optimizer's own."
        )
    if given.get("dataset_size") is not None and given["dataset_size"] < 1:
        raise UsageError(
            f"The training set has at least one example; got {given['dataset_size']}.",
            where="--dataset-size",
            remedy="Give the number of examples in the whole training set, or leave it out.",
        )
    if given.get("batches") is not None and given["batches"] < 1:
        raise UsageError("batches must be at least 1.", where="--batches", remedy="Leave it out to take all.")
    if given["memory_bytes"] is not None and given["memory_bytes"] <= 0:
        raise UsageError("memory must be positive.", where="--memory", remedy="Write bytes, or words such as 8GiB.")
    return Settings(**given)
