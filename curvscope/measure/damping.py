"""tables/damping and tables/ranges of one layer: what each damping would have done with each approximation.

The exact step and all approximations' steps come from one decomposition a matrix (`curvscope.measure.damped`); those of
K-FAC and EKFAC are summed while EKFAC's pass over the columns goes on (`DampingStage.follow`). The grid is relative to
the mean eigenvalue of the block over all P of them, tr G / P, and goes on in decades until it has passed the largest
one: beyond that even a wrong approximation lets the exact quadratic model decrease.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Approximation, Kronecker
from curvscope.curvature.rotated import rotated
from curvscope.measure.condition import flops, preconditioned_condition
from curvscope.measure.damped import Damped, ExactSteps, ExactSums, StepSums, mean_ratio
from curvscope.measure.damping_rows import RowMaker
from curvscope.measure.peaks import agree, peaks
from curvscope.measure.ranges import Curve, Values, joined, range_row, with_form_gaps
from curvscope.measure.step_sums import FollowedSteps, step_sums
from curvscope.records import NAN, DampingRow, RangeRow

RELATIVE_GRID = tuple(10.0**exponent for exponent in range(-8, 3))
# The eigenvectors of larger blocks take minutes, their eigenvalues a third of that.
LARGEST = 4096
# All conditions of a layer may take this many operations together.
CONDITION_FREE = 2e10
# Looks at a curve for its peaks, each with what the one before has computed.
PEAK_ROUNDS = 3
USE_EIGENBASIS = "pi is undefined, a factor being zero: use the eigenbasis form"


@dataclass(frozen=True)
class DampingWishes:
    """What the damping stage needs beyond the columns.

    Attributes:
        current: layer to the optimizer's own damping, in the loss's own scale.
        decay: layer to the L2 weight decay that the optimizer adds to the gradient.
        weights: parameters by name, for the layers that have decay.
        remarks: layer to what limits its rows.
        always: also where it takes long (large blocks; every condition).
    """

    current: Mapping[str, float] = field(default_factory=dict)
    decay: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    always: bool = False


@dataclass(frozen=True)
class Subject:
    """One layer with everything that its damped steps depend on, but for the approximations.

    Attributes:
        blocks: the exact block of each group, in the columns' unit.
        gradient: dL/dW, [d_out, d_in(+1)].
        scale: what turns the columns' unit into the loss's.
        dtype: the one the factors were summed in.
        current: the optimizer's own damping; None if unknown.
        decay, weights: L2 weight decay and the weights [d_out, d_in(+1)] it pulls on.
        seed: of Lanczos' first vectors.
        always: compute every condition, whatever it costs.
        remark: what limits every row of tables/ranges.
        inputs: d_in with those inputs that the columns leave out (an embedding's tokens that do not occur); 0: none.
    """

    layer: str
    blocks: Sequence[Block]
    gradient: Tensor
    scale: float
    dtype: torch.dtype
    current: float | None = None
    decay: float = 0.0
    weights: Tensor | None = None
    seed: int = 0
    always: bool = False
    remark: str = ""
    inputs: int = 0


def not_assessed(layer: str, reason: str, status: str = "not_assessed") -> list[DampingRow]:
    """The one row of a layer whose damped steps are not known."""
    return [DampingRow(layer, "ggn", "eigenbasis", status=status, reason=reason)]


def why_skipped(blocks: Sequence[Block], always: bool) -> str:
    """Why the stage is skipped: eigenvectors of a block this large take minutes; empty if it isn't."""
    small = max(min(block.parameters, block.total_columns) for block in blocks)
    if always or small <= LARGEST:
        return ""
    return f"eigenvectors of a block of min(P, N K) = {small} take minutes; --measure damping computes them"


@dataclass
class _Variant:
    """One approximation in one form, in every group, with its steps over ascending damping."""

    name: str
    form: str
    matrices: list[Damped]
    damping: Values = field(default_factory=lambda: np.zeros(0))
    rows: list[DampingRow] = field(default_factory=list)
    curve: Curve | None = None


class DampingStage:
    """The work on one layer: first the grid, then `follow` for every group and flavour, then `tables`.

    Numbers are those of `DampingRow` and `RangeRow`, in float64 from columns of the run's dtype. Degenerate layers are
    answered in rows that say why they are not assessed.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.parameters = sum(block.parameters for block in subject.blocks)
        self.mean = subject.scale * sum(block.trace for block in subject.blocks) / self.parameters
        self.rank = sum(min(block.parameters, block.total_columns) for block in subject.blocks)
        outputs = [block.d_out for block in subject.blocks]
        pull: Sequence[Tensor | None] = [None] * len(outputs)
        if subject.decay and subject.weights is not None:
            pull = (subject.decay * subject.weights.double()).split(outputs)
        self.decay = subject.decay if subject.weights is not None else 0.0
        self.exact = [
            ExactSteps(block, gradient, pull=add, decay=self.decay / subject.scale)
            for block, gradient, add in zip(subject.blocks, subject.gradient.split(outputs), pull, strict=True)
        ]
        # below this the eigenvalues of G are rounding of the columns' own dtype
        eps = torch.finfo(subject.dtype).eps
        top = max(0.0, *(float(one.values[-1:].sum()) for one in self.exact))
        unresolved = 0.0 if subject.dtype == torch.float64 else subject.scale * eps * top
        self.maker = RowMaker(subject.layer, subject.scale, self.mean, self.decay, subject.current, unresolved)
        grid = self._relative_grid() * self.mean
        self.damping = np.unique(np.append(grid, [] if subject.current is None else [subject.current]))
        self.followed: dict[tuple[str, int], FollowedSteps] = {}

    def follow(self, group: int, flavour: str, kronecker: Kronecker) -> FollowedSteps | None:
        """What is to see every tile of the columns turned into K-FAC's basis; a second call starts afresh."""
        block = self.subject.blocks[group]
        if not len(self.damping) or block.columns.form == "formed":
            return None
        matrix = rotated(kronecker, self.subject.dtype)
        shift = self._grid(self.damping) + self.exact[group].decay
        found = FollowedSteps(self.exact[group], matrix, shift, self.subject.inputs or block.d_in)
        self.followed[flavour, group] = found
        return found

    def tables(
        self, approximations: Mapping[str, Sequence[Approximation]], blind: Collection[str] = ()
    ) -> tuple[list[DampingRow], list[RangeRow]]:
        """Both tables' rows: the grid's values, the optimizer's own and the recommended one of each form.

        `approximations` maps a name to the approximation of each group; `blind` names those whose B is zero but for
        rounding.
        """
        layer, damping = self.subject.layer, self.damping
        if not len(damping):
            reason = "the exact block is zero on this batch, so there is no scale for damping"
            return not_assessed(layer, reason), []
        variants, refused = self._variants(approximations, blind)
        exact = self._exact(damping)
        rows = self.maker.exact(damping, exact)
        known = self._followed()
        others = [variant for variant in variants if (variant.name, variant.form) not in known]
        for variant, sums in zip(others, self._steps(others, [damping] * len(others)), strict=True):
            known[variant.name, variant.form] = sums
        for variant in variants:
            self._fill(variant, damping, known[variant.name, variant.form], exact)
        self._recommend(variants)
        self._conditions(variants)
        ranges = self._ranges(variants)
        for variant in variants:
            rows += variant.rows
        for variant, reason in refused:
            rows.append(DampingRow(layer, variant.name, variant.form, status="not_assessed", reason=reason))
            ranges.append(RangeRow(layer, variant.name, variant.form, status="not_assessed", reason=reason))
        return rows, ranges

    def _relative_grid(self) -> Values:
        """The default grid with as many decades more as reach G's largest eigenvalue; empty for a zero block."""
        if not self.mean > 0:
            return np.zeros(0)
        top = self.subject.scale * max(float(exact.values[-1]) for exact in self.exact if exact.values.numel())
        more = math.ceil(math.log10(top / self.mean)) - round(math.log10(RELATIVE_GRID[-1]))
        return np.array([*RELATIVE_GRID, *(RELATIVE_GRID[-1] * 10.0**step for step in range(1, more + 1))])

    def _followed(self) -> dict[tuple[str, str], StepSums]:
        """Sums over all groups, by approximation and form, of what was followed in every group."""
        groups = len(self.exact)
        total: dict[tuple[str, str], list[StepSums]] = {}
        for (flavour, _), followed in self.followed.items():
            for (kind, form), sums in followed.sums().items():
                total.setdefault((f"{kind}_{flavour}", form), []).append(sums)
        self.followed = {}
        return {key: reduce(operator.add, each) for key, each in total.items() if len(each) == groups}

    def _variants(
        self, approximations: Mapping[str, Sequence[Approximation]], blind: Collection[str]
    ) -> tuple[list[_Variant], list[tuple[_Variant, str]]]:
        """Every approximation in every form it has, and the forms that are undefined, with the reason."""
        subject = self.subject
        found, refused = [], []
        for name, groups in approximations.items():
            matrices = [rotated(one, subject.dtype) for one in groups]
            found.append(_Variant(name, "eigenbasis", [Damped(matrix) for matrix in matrices]))
            if not name.startswith("kfac"):
                continue
            damped = []
            for matrix in matrices:
                assert matrix.lam_A is not None and matrix.lam_B is not None
                traces = [float(lam.sum()) for lam in (matrix.lam_A, matrix.lam_B)]
                pi = mean_ratio(traces[0], subject.inputs or matrix.lam_A.numel(), traces[1], matrix.lam_B.numel())
                damped.append(None if pi is None else Damped(matrix, pi))
            factored = _Variant(name, "factored", [one for one in damped if one is not None])
            if name in blind or None in damped:
                refused.append((factored, USE_EIGENBASIS))
            else:
                found.append(factored)
        return found, refused

    def _grid(self, damping: Values) -> Tensor:
        """Damping in the columns' unit."""
        device = self.subject.blocks[0].device
        return torch.as_tensor(damping / self.subject.scale, dtype=torch.float64, device=device)

    def _exact(self, damping: Values) -> ExactSums:
        """The exact steps' sums over all groups."""
        return reduce(operator.add, [one.sums(self._grid(damping)) for one in self.exact])

    def _steps(self, variants: Sequence[_Variant], damping: Sequence[Values]) -> list[StepSums]:
        """Every variant's sums over all groups, each over its own damping."""
        grids = [self._grid(values) for values in damping]
        total: list[StepSums] = []
        for group, exact in enumerate(self.exact):
            each = step_sums(exact, [variant.matrices[group] for variant in variants], grids)
            total = each if not total else [a + b for a, b in zip(total, each, strict=True)]
        return total

    def _fill(self, variant: _Variant, damping: Values, sums: StepSums, exact: ExactSums) -> Curve:
        """The variant's rows and curve, with these added."""
        least = min(float(one.matrix.scale.min()) for one in variant.matrices)
        rows, curve = self.maker.steps(variant.name, variant.form, damping, sums, exact, least)
        variant.rows += rows
        variant.curve = curve if variant.curve is None else joined(variant.curve, curve)
        return variant.curve

    def _recommend(self, variants: Sequence[_Variant]) -> None:
        """Compute each variant's steps at the peaks between the grid's values, and mark the best of all."""
        tried: dict[int, set[float]] = {}
        waiting = [(variant, variant.curve) for variant in variants if variant.curve is not None]
        for _ in range(PEAK_ROUNDS):
            chosen = [(variant, found) for variant, curve in waiting if (found := peaks(curve))]
            if not chosen:
                break
            places = [np.sort(np.array(list(found))) for _, found in chosen]
            sums = self._steps([variant for variant, _ in chosen], places)
            waiting = []
            for (variant, found), each, place in zip(chosen, sums, places, strict=True):
                curve = self._fill(variant, place, each, self._exact(place))
                tried.setdefault(id(variant), set()).update(found)
                # where the curve turned out another, its peak may be elsewhere
                waiting += [] if agree(curve, found) else [(variant, curve)]
        for variant in variants:
            rows = sorted(variant.rows, key=lambda row: row.damping)
            best = max(rows, key=lambda row: _or_nothing(row.predicted_decrease))
            # of the values between the grid's only the best one is of use, if it is one of them
            rows = [row for row in rows if row is best or row.mark or row.damping not in tried.get(id(variant), ())]
            if _or_nothing(best.predicted_decrease) > 0:
                mark = ", ".join(filter(None, (best.mark, "recommended")))
                rows = [dataclasses.replace(row, mark=mark) if row is best else row for row in rows]
            variant.rows = rows

    def _conditions(self, variants: Sequence[_Variant]) -> None:
        """The condition at the marked values, as far as the layer's budget goes."""
        cost = sum(flops(exact) for exact in self.exact)
        left = math.inf if self.subject.always else CONDITION_FREE
        for variant in variants:
            for i, row in enumerate(variant.rows):
                if not row.mark or row.status != "ok":
                    continue
                if cost > left:
                    remark = f"condition: skipped, about {cost / 1e9:.0f} GFLOP; --measure damping computes it"
                    value = NAN
                else:
                    left -= cost
                    value, remark = preconditioned_condition(
                        self.exact, variant.matrices, row.damping / self.subject.scale, seed=self.subject.seed
                    )
                reason = "; ".join(filter(None, (row.reason, remark)))
                status = "not_converged" if "residual" in remark else row.status
                variant.rows[i] = dataclasses.replace(row, condition=value, status=status, reason=reason)

    def _ranges(self, variants: Sequence[_Variant]) -> list[RangeRow]:
        """tables/ranges: one row a variant."""
        current = NAN if self.subject.current is None else self.subject.current
        curves = {(variant.name, variant.form): variant.curve for variant in variants if variant.curve is not None}
        rows = [
            range_row(curves[variant.name, variant.form], variant.rows, current, self.rank, self.subject.remark)
            for variant in variants
        ]
        return with_form_gaps(rows, curves)


def _or_nothing(value: float) -> float:
    """The value, or minus infinity where there is none."""
    return -math.inf if math.isnan(value) else value
