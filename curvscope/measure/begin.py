"""The first half of the stage of whole-network steps: the dampings to try, decided before the layers are measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch

from curvscope.errors import out_of_memory
from curvscope.measure.network import Network
from curvscope.measure.parts import Keeper
from curvscope.measure.series import DECADES, EXTRA_DECADES
from curvscope.measure.steps import Objective
from curvscope.measure.whole import WholeNetwork
from curvscope.records import NAN

# Random signs for the mean eigenvalue.
PROBES = 4


def begin(
    network: Network,
    rates: Mapping[str, float],
    current: float | None,
    *,
    fisher: str,
    seed: int,
    why_no_steps: str = "",
) -> WholeNetwork:
    """Decide the dampings and get ready to keep the layers' shares.

    Args:
        network: the loss around its parameters; the chosen layers of its graph will be measured.
        rates: the optimizer's L2 decay by parameter.
        current: the optimizer's own damping, where it has one.
        fisher: how the loss Hessian's root is taken.
        seed: of the probes for the mean eigenvalue.
        why_no_steps: a reason to take none, for instance their cost.
    """
    objective = Objective(network, rates)
    current = current if current is not None and current > 0 else None
    mean = stderr = 0.0
    if not why_no_steps and not objective.flat:
        try:
            mean, stderr = mean_eigenvalue(objective, seed)
        except (RuntimeError, NotImplementedError) as error:
            # an operation without a second derivative
            if out_of_memory(error):
                raise
            why_no_steps = f"products with the network's GGN fail: {str(error).splitlines()[0]}"
        objective.forget()
    unit = 10.0 ** round(math.log10(mean)) if mean > 0 and math.isfinite(mean) else 1.0
    grid = tuple(unit * 10.0**decade for decade in DECADES)
    # one decade more than the search may reach
    first, last = DECADES[0] - EXTRA_DECADES - 1, DECADES[-1] + EXTRA_DECADES + 1
    nodes = {unit * 10.0 ** (half / 2) for half in range(2 * first + 1, 2 * last, 2)}
    nodes |= {unit * 10.0**decade for decade in range(first, last + 1)}
    dtype = next(iter(network.parameters.values())).dtype
    keeper = Keeper(
        objective.gradient,
        network.parameters,
        objective.rates,
        () if why_no_steps else tuple(sorted(nodes | ({current} if current else set()))),
        eps=torch.finfo(dtype).eps,
    )
    return WholeNetwork(objective, (mean, stderr), grid, current, keeper, fisher, why_no_steps)


def mean_eigenvalue(objective: Objective, seed: int) -> tuple[float, float]:
    """Tr G / P over all trained parameters that the loss reaches, with its standard error.

    The mean over `PROBES` probes z with random signs of z^T G z / P.
    """
    parameters = objective.network.parameters
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device=device).manual_seed(seed)
    found = []
    for _ in range(PROBES):
        signs = {
            name: torch.randint(0, 2, p.shape, generator=generator, device=device).to(p.dtype).mul(2).sub(1)
            for name, p in parameters.items()
        }
        found.append(objective.form(signs) / sum(p.numel() for p in parameters.values()))
    if not all(math.isfinite(value) for value in found):
        return NAN, NAN
    return statistics.fmean(found), statistics.stdev(found) / PROBES**0.5
