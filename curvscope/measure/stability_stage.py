"""The stability table: sharpness of the network and its layers against the threshold of the optimizer in use."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvscope.curvature.extremes import LEAST_BASIS, Extremes
from curvscope.errors import AnalysisError, out_of_memory
from curvscope.graph.sites import LayerSpec
from curvscope.load.optimizer_settings import OptimizerSettings, optimizer_settings
from curvscope.load.problem import Problem
from curvscope.measure import stability
from curvscope.measure.halves import halves
from curvscope.measure.layer_signs import example_rows, share_row
from curvscope.measure.network import Network
from curvscope.measure.preconditioner import Preconditioner, Unassessable, preconditioner
from curvscope.measure.sharpness import Space, decay_share, energy_shares
from curvscope.measure.sign_stage import members, signs
from curvscope.measure.spreads import Spreads, Wanted
from curvscope.measure.stability import Spread, verdict
from curvscope.measure.surroundings import clip_scale, clipped, clipped_rows, norm_of, scheduled_row
from curvscope.measure.thresholds import rule
from curvscope.measure.update import TAKES_IN, advanced_settings
from curvscope.records import NAN, ExampleRow, KroneckerFactors, Layer, StabilityRow

# Layers with at least this share of the top direction's energy get spreads and verdicts of their own.
LARGE_SHARE = 0.1
# From this share on an eigenvalue is told to be weight decay.
DECAY_SHARE = 0.5
# The smallest basis of the iteration, and what a product and P^{-1/2} hold beside it.
LEAST_VECTORS = 2 * (LEAST_BASIS + 2)
NO_OPTIMIZER = "no optimizer is known: the checkpoint holds none that fits the model, and none was given (--optimizer)"
NO_MEMORY = "memory ran out for products with the Hessian, even with one example at a time"
MOMENTUMS_OWN = "the momentum's own rate, whatever the sharpness: it tells of no margin"
BEYOND = "beyond what a float64 can say"
QUADRATIC = "full-batch threshold of the quadratic model; training on mini-batches can diverge below it"


@dataclass(frozen=True)
class Assessment:
    """The stability table with what a report says of the optimizer."""

    rows: list[StabilityRow]
    examples: list[ExampleRow] = field(default_factory=list)
    optimizer: str = ""
    learning_rate: float = NAN
    notes: tuple[str, ...] = ()


def stability_stage(problem: Problem, network: Network, layers: Mapping[str, Layer], wanted: Wanted) -> Assessment:
    """The stability table of a problem whose loss is settled; a model without second derivatives gets the reason."""
    stage = None
    listed: list[ExampleRow] = []
    examples = 0
    shapes = {name: p.shape for name, p in network.parameters.items()}
    settings = optimizer_settings(problem.optimizer, shapes, problem.optimizer_options)
    try:
        factors = {name: layer.factors for name, layer in layers.items()}
        rows, found = _assess(network, settings, network.graph.layers, factors, wanted)
        if found is not None:
            stage, direction, space = found
            listed, examples = _top_examples(stage, direction, space, layers)
    except (
        RuntimeError,
        AnalysisError,
        MemoryError,
    ) as error:  # no second derivative, one that is not finite, or memory
        reason = f"the Hessian can't be multiplied with: {(str(error).splitlines() or [type(error).__name__])[0]}"
        if out_of_memory(error):
            reason = NO_MEMORY
        rows = [StabilityRow("network", "", "preconditioned_sharpness", status="not_assessed", reason=reason)]
    gradients = [network.gradient()]
    if stage is not None:
        gradients += [{name: half.scale * g for name, g in half.network.gradient().items()} for half in stage.parts]
        stage.products.clear()
    rows += signs(network, layers, gradients, settings, None if stage is None else stage.P)
    if listed:
        rows.append(share_row(listed, examples))
    if settings is None:
        return Assessment(rows, listed)
    return Assessment(rows, listed, settings.label, settings.learning_rate, settings.notes)


def assess(
    network: Network,
    settings: OptimizerSettings | None,
    specs: Mapping[str, LayerSpec],
    factors: Mapping[str, Mapping[str, KroneckerFactors]],
    wanted: Wanted,
) -> list[StabilityRow]:
    """All rows of the stability table: the network's first, then the layers', the largest share first.

    Network: `hessian_top`, `hessian_bottom`, `ggn_top`; with an optimizer `preconditioned_sharpness` (top eigenvalue of
    P^{-1} (H + wd)) with its threshold and verdict, `growth_factor` and `largest_stable_lr`. Layers: `direction_share`
    of the top direction's energy, and the block's `preconditioned_sharpness` (without an optimizer `hessian_top`) where
    the share is large or time is left. `wanted.seconds` bounds all of it; what it cut off says so.
    """
    return _assess(network, settings, specs, factors, wanted)[0]


def _assess(
    network: Network,
    settings: OptimizerSettings | None,
    specs: Mapping[str, LayerSpec],
    factors: Mapping[str, Mapping[str, KroneckerFactors]],
    wanted: Wanted,
) -> tuple[list[StabilityRow], tuple[Spreads, Tensor, Space] | None]:
    """The rows, and what they came from: the stage, the top direction (where P is 1) and the space it lies in."""
    started = time.monotonic()
    if (least := 8 * Space.of(network).size * LEAST_VECTORS) > wanted.memory_bytes:
        reason = f"its vectors take {least / 2**30:.2g} GiB, over --memory ({wanted.memory_bytes / 2**30:.2g} GiB)"
        return [StabilityRow("network", "", "preconditioned_sharpness", status="not_assessed", reason=reason)], None
    spare = settings is None and not wanted.full
    found = NO_OPTIMIZER if spare else halves(network, seed=wanted.seed)
    P: Preconditioner | None = None
    refusal = NO_OPTIMIZER
    if settings is not None:
        made = preconditioner(settings, list(network.parameters), specs, factors)
        P, refusal = (None, made.reason) if isinstance(made, Unassessable) else (made, "")
    parts, no_parts = ([], found) if isinstance(found, str) else (found, "")
    stage = Spreads(network, wanted, parts, no_parts, P, deadline=started + wanted.seconds)
    rows, direction, space = _network_rows(stage, settings, refusal)
    if spare:
        return rows, (stage, direction, space)
    decided = next((row.verdict for row in rows if row.quantity == "preconditioned_sharpness"), "")
    rows += _layer_rows(stage, settings, specs, direction, space, every=decided in ("above", "undecided"))
    return rows, (stage, direction, space)


def _top_examples(
    stage: Spreads, direction: Tensor, space: Space, layers: Mapping[str, Layer]
) -> tuple[list[ExampleRow], int]:
    """The examples that carry most of the GGN along the top direction, and of how many; none if it is not curved."""
    vector = space.split(direction)
    if stage.P is not None:
        vector = stage.P.inverse_root(vector)
    energy = stage.network.example_curvature(vector)
    total = float(energy.sum())
    if not total > 0 or bool((energy < 0).any()):
        return [], len(energy)
    squares = [layer.example_gradients for layer in layers.values() if layer.example_gradients is not None]
    return example_rows("", energy / total, torch.as_tensor(sum(squares)) if squares else None), len(energy)


def _network_rows(
    stage: Spreads, settings: OptimizerSettings | None, refusal: str
) -> tuple[list[StabilityRow], Tensor, Space]:
    """The network's rows, the top direction (in coordinates where P is 1), and the space it lies in."""
    P, network = stage.P, stage.network
    everything = Space.of(network)
    plain = stage.on(0, everything, None, bottom=1)
    governs = P is None or P.identity
    spread = stage.spread(everything, None, plain)[0] if governs else Spread.of(plain, [])
    rows = [
        stability.eigenvalue_row("network", "", "hessian_top", spread, timed_out=stage.late),
        _bottom(plain, stage),
        stability.eigenvalue_row(
            "network",
            "",
            "ggn_top",
            Spread.of(stage.ggn(everything), []),
            timed_out=stage.late,
        ),
    ]
    if P is None or settings is None:
        rows.append(StabilityRow("network", "", "preconditioned_sharpness", status="not_assessed", reason=refusal))
        return rows, plain.top[0].vector, everything
    space = Space.of(network, P.names)
    whole = plain
    if not (P.identity and space.size == everything.size):
        spread, whole = stage.spread(space, P)
    joint = not P.fixed
    said = verdict(spread, P.step.threshold, halved=bool(stage.parts), joint=joint)
    limits = [QUADRATIC, stage.no_parts, _decay(whole, space, P)]
    if P.fixed:
        limits.append(f"{len(P.fixed)} parameters are held fixed ({P.fixed[0]}, ...): {P.fixed_reason}")
    main = max((settings.parameters[name] for name in P.names), key=lambda one: one.lr)
    source = rule(settings.kind, main)
    rows.append(
        stability.eigenvalue_row(
            "network",
            "",
            "preconditioned_sharpness",
            spread,
            threshold=P.step.threshold,
            said=said,
            source=source,
            reason="; ".join(filter(None, limits)),
            timed_out=stage.late,
        )
    )
    rows += _consequences(stage, P, spread, said, main.lr)
    if said == "above" and settings.kind in TAKES_IN:
        rows += _taken_in(stage, settings, space)
    if settings.clip is not None:
        norm = norm_of(network.gradient())
        clipped = _clipped(stage, P, space, spread, clip_scale(norm, settings.clip))
        rows += clipped_rows(settings, P, spread, clipped, norm, lr=main.lr, halved=bool(stage.parts))
    scheduled = scheduled_row(settings, P, spread, halved=bool(stage.parts))
    return [*rows, *([] if scheduled is None else [scheduled])], whole.top[0].vector, space


def _taken_in(stage: Spreads, settings: OptimizerSettings, space: Space) -> list[StabilityRow]:
    """The sharpness under the P of the very next step, whose moments have taken this batch's gradient in.

    It is another where entries whose squared gradients were small meet large ones, as of a token seen for the first
    time: P as stored divides by next to nothing there, and the optimizer never does.
    """
    network = stage.network
    gradient = clipped(network.gradient(), settings.clip)
    after = advanced_settings(settings, network.parameters, gradient)
    made = preconditioner(after, space.names)
    if isinstance(made, Unassessable):
        return []
    spread = Spread.of(stage.on(0, space, made), [])
    row = stability.eigenvalue_row(
        "network",
        "",
        "next_sharpness",
        spread,
        threshold=made.step.threshold,
        said="not_assessed" if not spread.converged else "above" if spread.value > made.step.threshold else "below",
        source="the rule for preconditioned_sharpness, with P of the next step",
        reason="on the whole batch alone: no halves",
        timed_out=stage.late,
    )
    return [row]


def _clipped(stage: Spreads, P: Preconditioner, space: Space, plain: Spread, scale: float) -> Spread:
    """The spread of P^{-1} (s H + wd); without wd it is the plain one's, s times."""
    if scale == 1.0 or not any(P.l2.values()):
        return plain.scaled(scale)
    stage.products.clear()
    return dataclasses.replace(stage, factor=scale, products={}).spread(space, P)[0]


def _decay(whole: Extremes, space: Space, P: Preconditioner) -> str:
    """Says where an eigenvalue is weight decay more than curvature; then it is the same on every part of the batch."""
    share = decay_share(whole.top[0].vector, whole.top[0].value, space, P)
    if share < DECAY_SHARE:
        return ""
    return f"{share:.0%} of it is weight decay over P, at weights with hardly any gradient: no batch changes it"


def _bottom(plain: Extremes, stage: Spreads) -> StabilityRow:
    """The Hessian's most negative eigenvalue, which the same iteration gives; an upper bound where not converged."""
    pair = plain.bottom[0]
    return StabilityRow(
        "network",
        "",
        "hessian_bottom",
        pair.value,
        residual=pair.residual,
        status="ok" if pair.converged else "not_converged",
        reason="" if pair.converged else "the iteration ended with the other end of the spectrum; an upper bound",
    )


def _consequences(stage: Spreads, P: Preconditioner, spread: Spread, said: str, lr: float) -> list[StabilityRow]:
    """The growth factor along the top direction, and the largest rate that would be stable."""
    known = spread.converged and not P.momentum_differs
    why = "groups differ in momentum" if P.momentum_differs else "the sharpness is a lower bound only"
    low, high = spread.bounds
    growth = [P.step.growth(value) if value == value else value for value in (spread.value, low, high)]
    rates = [P.step.stable_lr(value) if value == value else value for value in (spread.value, high, low)]
    grown = StabilityRow(
        "network",
        "",
        "growth_factor",
        threshold=1.0,
        source="spectral radius of the linearised step",
        status="ok" if known else "not_assessed",
        reason="" if known else why,
    )
    if known:
        own = MOMENTUMS_OWN if P.step.pinned(spread.value) else BEYOND if math.isinf(growth[0]) else ""
        grown = dataclasses.replace(grown, value=growth[0], low=growth[1], high=growth[2], verdict=said, reason=own)
    rate = StabilityRow(
        "network",
        "",
        "largest_stable_lr",
        value=rates[0],
        low=rates[1],
        high=rates[2],
        threshold=lr,
        verdict=said,
        source="the rate at which the threshold is the sharpness",
        status="ok" if spread.converged else "not_converged",
        reason="" if spread.converged else "an upper bound: the sharpness is a lower bound",
    )
    return [grown, rate]


def _layer_rows(
    stage: Spreads,
    settings: OptimizerSettings | None,
    specs: Mapping[str, LayerSpec],
    direction: Tensor,
    space: Space,
    *,
    every: bool,
) -> list[StabilityRow]:
    """Shares of the top direction, then the blocks of the layers that carry it; of the others with `every`.

    A block's top eigenvalue is at most the network's: where that is below the threshold, so are all blocks.
    """
    P = stage.P
    of_layer = {name: members(spec) for name, spec in specs.items() if spec.selected}
    shares = energy_shares(direction, space, of_layer)
    order = sorted(shares, key=lambda name: -shares[name])
    rows: list[StabilityRow] = []
    for name in order:
        rows.append(StabilityRow("layer", name, "direction_share", shares[name], verdict="not_assessed"))
    quantity = "hessian_top" if P is None else "preconditioned_sharpness"
    for name in order:
        own = [one for one in of_layer[name] if one in space.shapes]
        if not own:
            continue
        if not every and shares[name] < LARGE_SHARE:
            reason = f"under {LARGE_SHARE:.0%} of the top direction; no block is above the whole network"
            rows.append(StabilityRow("layer", name, quantity, status="skipped", reason=reason))
            continue
        if stage.late:
            reason = f"the {stage.wanted.seconds:.3g} s for stability were spent on the network and on larger layers"
            rows.append(StabilityRow("layer", name, quantity, status="skipped", reason=reason))
            continue
        rows.append(_block_row(stage, settings, name, quantity, Space.of(stage.network, own), shares[name]))
    return rows


def _block_row(
    stage: Spreads, settings: OptimizerSettings | None, name: str, quantity: str, space: Space, share: float
) -> StabilityRow:
    """One layer's block; its spread and verdict only where the layer carries much of the top direction."""
    P = stage.P
    large = share >= LARGE_SHARE
    local = None if P is None else dataclasses.replace(P, names=space.names)
    whole = stage.on(0, space, local)
    spread = stage.spread(space, local, whole)[0] if large else Spread.of(whole, [])
    if P is None or settings is None:
        return stability.eigenvalue_row("layer", name, quantity, spread, timed_out=stage.late)
    said, reason = "not_assessed", f"{share:.1%} of the top direction: no spread was measured"
    if large:
        said = verdict(spread, P.step.threshold, halved=bool(stage.parts))
        decay = _decay(whole, space, P)
        alone = "the block alone: below says nothing of the whole network" if said == "below" else ""
        reason = "; ".join(filter(None, (decay, alone)))
    return stability.eigenvalue_row(
        "layer",
        name,
        quantity,
        spread,
        threshold=P.step.threshold,
        said=said,
        source=rule(settings.kind, settings.parameters[space.names[0]]),
        reason=reason,
        timed_out=stage.late,
    )
