"""What the stages over the whole network will take in seconds, from passes that are timed on it.

The same numbers decide before a run and in a dry run. Counted are the seconds that the process worked, of the fastest
of a few passes, so that a busy machine decides like an idle one (`curvscope.extract.clock`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvscope.errors import out_of_memory
from curvscope.extract.clock import now, seconds_of
from curvscope.extract.cost import ASSUMED, Rates
from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.measure.network import Network
from curvscope.measure.series import SERIES, inputs_of
from curvscope.settings import Settings

# What steps may take of --time by default.
SHARE_OF_TIME = 0.2
# What the stability measures may take of it.
STABILITY_SHARE = 0.25
# Of one series as a rule: forward passes, and products with J on a graph that is kept where there is one piece.
FORWARDS_A_SERIES = 46
FORMS_A_SERIES = 20
# Seconds of the small operations that make a layer's part of one step.
STEP_SECONDS = 1.5e-4
# Products with H and with G that the ends of the spectrum take as a rule: without an optimizer; with one also on both
# halves, preconditioned, and by layer.
PLAIN_PRODUCTS = 36
JUDGED_PRODUCTS = 80
# A product with H (or G) in products v^T G v: backward through the gradient's graph and through that of the forward
# pass, where v^T G v takes the first alone.
HESSIAN_FORMS = 2.0
# A product v^T G v in forward passes, where none was timed.
FORM_FORWARDS = 3.0
# Vectors of the basis that a product is made orthogonal to, twice.
BASIS_VECTORS = 12
# Timed products; the first one builds the graph.
TIMED = 2


@dataclass(frozen=True)
class Effort:
    """Seconds over all data: a forward pass; v^T G v on a graph as it is kept (0: not timed, or it fails)."""

    forward: float
    form: float


def timed_effort(network: Network, enough: float = float("inf")) -> Effort:
    """Times the passes; no products where the forward passes of one series alone take `enough` seconds."""
    device, counted = next(iter(network.parameters.values())).device, network.passes
    forward = seconds_of(network.loss, device)
    form = 0.0 if FORWARDS_A_SERIES * forward > enough else _form_seconds(network, device)
    network.passes = counted  # those of the stages, not of the timing
    return Effort(forward, form)


def _form_seconds(network: Network, device: torch.device) -> float:
    signs = {name: torch.ones_like(p) for name, p in network.parameters.items()}
    form = network.ggn_form()
    found = []
    try:
        for _ in range(1 + TIMED):
            start = now(device)
            form(signs)
            found.append(now(device).since(start))
    except (RuntimeError, NotImplementedError) as error:
        # an operation without a second derivative: the stages say so
        if out_of_memory(error):
            raise
        return 0.0
    return min(found[1:])


def steps_seconds(network: Network, effort: Effort, fisher: str) -> float:
    """What the steps of the whole network take: forward passes, products with J, and the solves of every layer."""
    specs = [spec for spec in network.graph.chosen() if not spec.exact_only and not spec.roles]
    solves = sum(4.0 * spec.d_out * inputs_of(spec) * (inputs_of(spec) + spec.d_out // spec.groups) for spec in specs)
    step = STEP_SECONDS * len(specs) + solves / ASSUMED.product64
    each = FORWARDS_A_SERIES * (effort.forward + step) + FORMS_A_SERIES * effort.form
    return series_taken(network, fisher) * each


def series_taken(network: Network, fisher: str) -> int:
    """How many of the series have passes of their own.

    Without exact columns there are only those of K-FAC; with one position an example reduce is expand.
    """
    known = [name for name, _ in SERIES if name.startswith("kfac") or fisher not in ("probe", "mc")]
    known = [name for name in known if fisher != "empirical" or "fac" in name]
    if _single(network.graph, network.examples.pieces.survey.positions):
        known = [name for name in known if not name.endswith("reduce")]
    return len(known)


def stability_seconds(network: Network, effort: Effort, settings: Settings, rates: Rates, *, known: bool) -> float:
    """What the stability measures take, within their share of --time; `known` says that an optimizer is."""
    size = sum(p.numel() for p in network.parameters.values())
    # read twice for both projections, each time beside the image
    orthogonal = 4.0 * BASIS_VECTORS * 8 * size / rates.bytes
    products = JUDGED_PRODUCTS if known or "stability" in settings.measure else PLAIN_PRODUCTS
    form = effort.form or FORM_FORWARDS * effort.forward
    seconds = products * (HESSIAN_FORMS * form + orthogonal)
    return min(seconds, STABILITY_SHARE * settings.time_seconds)


def _single(graph: Graph, positions: dict[str, int]) -> bool:
    def of(spec: LayerSpec) -> int:
        return sum(positions[site.target] for site in spec.sites)

    return all(of(spec) == 1 for spec in graph.chosen() if not spec.exact_only)


def why_too_long(seconds: float, settings: Settings) -> str:
    """Why steps are left out by default; empty where they are not."""
    if "steps" in settings.measure or seconds <= SHARE_OF_TIME * settings.time_seconds:
        return ""
    return (
        f"they would take about {seconds:.2g} s, over {SHARE_OF_TIME:.0%} of --time {settings.time_seconds:g}: "
        "--measure steps takes them all the same"
    )
