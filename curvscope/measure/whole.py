"""The stage of whole-network steps: dampings to try, steps of every approximation, and the rows that come out.

It has two halves. `curvscope.measure.begin` runs before the layers are measured and decides the dampings, so that the
exact blocks' steps can be kept while their columns are there; `WholeNetwork.finish` takes the steps afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from curvscope.measure import per_layer
from curvscope.measure.parts import EXACT, Keeper, LayerPart, parameters_of
from curvscope.measure.recommend import GRADIENT_COSINE, LOWER, RAISE, holds_from, lowest, lowest_safe
from curvscope.measure.series import EXTRA_DECADES, FACTORS, SERIES
from curvscope.measure.steps import NOISE_FACTOR, Objective, Step, joint_step
from curvscope.records import NAN, GlobalDampingRow, StepRow

NO_OWN = "no dampings by layer: no layer's own step is assessed with this approximation"


@dataclass
class WholeNetwork:
    """Steps of the whole network at chosen dampings.

    Attributes:
        objective: the loss with the optimizer's L2 decay around the present parameters.
        estimate: the mean eigenvalue of the network's GGN, tr G / P, from a few probes, with its standard error.
        grid: the dampings to try, decades.
        current: the optimizer's own damping, or None.
        keeper: what takes each layer's share while the layers are measured.
        fisher: how the loss Hessian's root was taken.
        why_no_steps: why no steps are taken; empty where they are.
        own: the damping that each layer's own block recommends, by approximation and form.
        rows, summaries: of tables/steps and tables/global_damping, once finished.
        withheld: why the layers get no damping each though steps were taken, by approximation and form.
    """

    objective: Objective
    estimate: tuple[float, float]
    grid: tuple[float, ...]
    current: float | None
    keeper: Keeper
    fisher: str
    why_no_steps: str = ""
    own: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    withheld: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: list[StepRow] = field(default_factory=list)
    summaries: list[GlobalDampingRow] = field(default_factory=list)

    @property
    def parts(self) -> list[LayerPart]:
        """The layers that were kept."""
        return list(self.keeper.parts.values())

    @property
    def mean(self) -> tuple[float, float]:
        """Tr G / P over all trained parameters that the loss reaches, and its standard error.

        From the layers' traces, NaN the error, where every parameter has its exact block; else the estimate.
        """
        traces = self.keeper.traces
        covered = {name for layer in traces for name in parameters_of(self.keeper.parts[layer].spec)}
        parameters = self.objective.network.parameters
        if not covered >= set(parameters):
            return self.estimate
        return sum(traces.values()) / sum(p.numel() for p in parameters.values()), NAN

    def finish(
        self, own: Mapping[tuple[str, str], Mapping[str, float]] | None = None
    ) -> tuple[list[StepRow], list[GlobalDampingRow]]:
        """The rows of tables/steps and tables/global_damping.

        `own` holds the damping that each layer's own block recommends, by approximation and form.
        """
        self.own = dict(own or {})
        if self.why_no_steps:
            return no_steps(self.why_no_steps)
        self.rows, self.summaries, self.withheld = [], [], {}
        for approximation, form in SERIES:
            reason = self._refusal(approximation)
            twin = approximation.replace("reduce", "expand")
            if reason:
                self.rows.append(_no_step(approximation, form, reason))
                self.summaries.append(_no_summary(approximation, form, reason))
            elif twin != approximation and all(part.positions == 1 for part in self.parts if part.inverses):
                # one position an example: both flavours are the same matrix
                rows = [row for row in self.rows if (row.approximation, row.form) == (twin, form)]
                self.rows += [dataclasses.replace(row, approximation=approximation, passes=0) for row in rows]
                whole = [row for row in self.summaries if (row.approximation, row.form) == (twin, form)]
                self.summaries += [dataclasses.replace(row, approximation=approximation, passes=0) for row in whole]
                if (twin, form) in self.withheld:
                    self.withheld[approximation, form] = self.withheld[twin, form]
            else:
                self._series(approximation, form)
        return self.rows, self.summaries

    def _refusal(self, approximation: str) -> str:
        """Why an approximation has no steps; empty where it has."""
        if not any(part.inverses for part in self.parts):
            return "no layer with Kronecker factors was measured"
        if self.objective.flat:
            return "the gradient is zero: every damped step is zero"
        if not math.isfinite(self.estimate[0]) or self.estimate[0] <= 0:
            return "the network's GGN is zero on this batch: a damped step is the gradient over the damping"
        damping = self.grid[0]
        missing = [part.spec.name for part in self.parts if part.step(approximation, "eigenbasis", damping) is None]
        missing = [name for name in missing if self.keeper.parts[name].inverses]
        if not missing:
            return ""
        what = "the exact block" if approximation == EXACT else "EKFAC's diagonal"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if self.fisher in ("probe", "mc"):
            return f"{what} needs exact columns; these are draws: --fisher exact"
        if approximation == EXACT and self.fisher == "empirical":
            return "the columns are those of the empirical Fisher, not of the GGN: --fisher exact"
        return f"{what} of {missing[0]}{more} is not known, or its steps were too many to keep"

    def _joint(self, approximation: str, form: str, damping: float | Mapping[str, float]) -> dict[str, Tensor]:
        given = damping if isinstance(damping, Mapping) else {part.spec.name: damping for part in self.parts}
        shapes = {name: p.shape for name, p in self.objective.network.parameters.items()}
        return joint_step(self.parts, shapes, approximation, form, given)

    def _series(self, approximation: str, form: str) -> None:
        """Rows and summary of one approximation and form."""
        network = self.objective.network
        start = network.passes
        judged: dict[float, Step] = {}
        spent: dict[float, int] = {}

        def judge(damping: float) -> Step:
            if damping not in judged:
                before = network.passes
                judged[damping] = self.objective.judged(self._joint(approximation, form, damping))
                spent[damping] = network.passes - before
            return judged[damping]

        def change(damping: float) -> float:
            if damping in judged:
                return judged[damping].actual
            return self.objective.change(self._joint(approximation, form, damping))

        asked = [*self.grid, *([self.current] if self.current is not None else [])]
        for damping in asked:
            judge(damping)
        lowest_at, tried = lowest(change, self.grid, extend=EXTRA_DECADES)
        if self.current is not None and judged[self.current].actual < tried[lowest_at]:
            lowest_at = self.current
        judge(lowest_at)
        _, best = lowest_safe(tuple(judged), lambda damping: self._verdict(judge(damping)))
        # the search for the edge of what is safe may have met a lower one
        lowest_at = min(judged, key=lambda damping: _finite(judged[damping].actual))
        around = lowest_at if math.isnan(best) else best
        nearest = min(range(len(self.grid)), key=lambda index: abs(math.log(self.grid[index] / around)))
        # line searches along the steps of one form tell enough
        searched = self.grid[max(0, min(nearest - 1, len(self.grid) - 3)) :][:3] if form == "eigenbasis" else ()
        for damping in sorted(judged):
            role = "grid" if damping in self.grid else "boundary"
            role = "safest" if damping == best else role
            role = "recommended" if damping == lowest_at and judged[damping].actual < 0 else role
            role = "current" if damping == self.current else role
            self.rows.append(
                self._row(approximation, form, damping, role, judged[damping], spent[damping], damping in searched)
            )
        self.summaries.append(self._summary(approximation, form, best, lowest_at, judged, start))

    def _verdict(self, step: Step) -> tuple[bool | None, float]:
        """Whether a step is safe, None where that can't be told, and its change."""
        return (self._safe(step) if self._audible(step) else None), step.actual

    @staticmethod
    def _safe(step: Step) -> bool:
        return step.predicted < 0 and step.rho >= RAISE

    def _row(
        self, approximation: str, form: str, damping: float, role: str, step: Step, passes: int, search: bool
    ) -> StepRow:
        """One line of tables/steps."""
        before = self.objective.network.passes
        row = StepRow(
            approximation,
            form,
            damping,
            role,
            relative_damping=damping / self.mean[0],
            relative_damping_stderr=self._relative_stderr(damping),
            predicted_change=step.predicted,
            actual_change=step.actual,
            rho=self._rho(step),
            step_norm=step.norm,
            angle_to_gradient_degrees=math.degrees(math.acos(max(-1.0, min(1.0, step.cosine)))),
            alpha_star=step.alpha_star,
            status="estimated" if self.fisher in ("probe", "mc") else "ok",
        )
        reasons = self._reasons(approximation, form, damping, step)
        if not self._audible(step):
            reasons.append("rho: the changes are within rounding of the loss")
        if search:
            found = self.objective.search(step)
            row = dataclasses.replace(
                row,
                best_step_length=found.best_length,
                best_length_change=found.best_change,
                model_length=found.model_length,
            )
            if found.holds:
                reasons.append("the model holds up to the longest step tried")
        spent = passes + self.objective.network.passes - before
        return dataclasses.replace(row, passes=spent, reason="; ".join(reasons))

    def _relative_stderr(self, damping: float) -> float:
        mean, stderr = self.mean
        return damping / mean * (stderr / mean)

    def _summary(
        self, approximation: str, form: str, best: float, lowest_at: float, judged: Mapping[float, Step], start: int
    ) -> GlobalDampingRow:
        audible = {damping: one for damping, one in judged.items() if self._audible(one)}
        bottom = judged[lowest_at]
        row = GlobalDampingRow(
            approximation,
            form,
            safe_from=holds_from({d: self._safe(one) for d, one in audible.items()}),
            lowerable_from=holds_from({d: one.predicted < 0 and one.rho > LOWER for d, one in audible.items()}),
            gradient_from=holds_from({d: one.cosine >= GRADIENT_COSINE for d, one in judged.items()}),
            status="estimated" if self.fisher in ("probe", "mc") else "ok",
        )
        reasons = self._reasons(approximation, form, lowest_at if math.isnan(best) else best, bottom)
        if bottom.actual < 0:
            row = dataclasses.replace(
                row,
                damping=lowest_at,
                relative_damping=lowest_at / self.mean[0],
                relative_damping_stderr=self._relative_stderr(lowest_at),
                change=bottom.actual,
                predicted_change=bottom.predicted,
                rho=self._rho(bottom),
            )
            if self._audible(bottom) and not lowest_at >= row.safe_from:
                beside = "" if math.isnan(best) else f", the safe one is {best:.3g}"
                reasons.append(f"the recommended damping is not safe (rho {bottom.rho:.3g}){beside}")
        else:
            reasons.append("no damping tried lowers the objective")
        if math.isnan(best):
            reasons.append("no damping tried is safe: a decrease that the quadratic model predicts, and a quarter kept")
        else:
            step = judged[best]
            row = dataclasses.replace(row, safe_damping=best, safe_change=step.actual, safe_rho=self._rho(step))
        if self.current is not None:
            now = judged[self.current]
            row = dataclasses.replace(
                row,
                current=self.current,
                current_change=now.actual,
                current_rho=self._rho(now),
                current_alpha_star=now.alpha_star,
            )
        around = lowest_at if math.isnan(best) else best
        row, withheld = self._with_own(row, around, judged[around].linear)
        if withheld:
            self.withheld[approximation, form] = withheld
            reasons.append(withheld)
        passes = self.objective.network.passes - start
        return dataclasses.replace(row, passes=passes, reason="; ".join(reasons))

    def _with_own(self, row: GlobalDampingRow, damping: float, reference: float) -> tuple[GlobalDampingRow, str]:
        """The row with the step of the layers' own dampings, and why these are not to be set; empty where they are.

        Layers without one take `damping`, whose step for all has R . delta = `reference`.
        """
        series = row.approximation, row.form
        own = self.own.get(series, {})
        if not own:
            return row, "" if row.approximation == EXACT else NO_OWN
        found = per_layer.search(
            self.parts,
            own,
            damping,
            lambda dampings: self.objective.judged(self._joint(*series, dampings)),
            self._verdict,
            self.objective.right,
            reference,
        )
        if found.step is None:
            return row, found.why
        row = dataclasses.replace(
            row,
            per_layer_predicted=found.step.predicted,
            per_layer_change=found.step.actual,
            per_layer_rho=found.step.rho,
            per_layer_factor=found.factor,
            per_layer_gain=found.step.actual / row.change - 1 if row.change < 0 else NAN,
        )
        if row.by_layer:
            return row, ""
        less = f"{row.per_layer_change:.3g} by one step, one for all {row.change:.3g}"
        return row, f"dampings of each layer's own do no better together than one for all: {less}"

    def _rho(self, step: Step) -> float:
        """Rho, NaN where the changes are within rounding of the loss."""
        return step.rho if self._audible(step) else NAN

    def _audible(self, step: Step) -> bool:
        """Whether the predicted change is well above the rounding of a change of the loss."""
        return abs(step.predicted) > NOISE_FACTOR * self.objective.rounding

    def _reasons(self, approximation: str, form: str, damping: float, step: Step) -> list[str]:
        """What limits a step, a clause each."""
        reasons = []
        if self.fisher in FACTORS:
            reasons.append(FACTORS[self.fisher])
        parameters = self.objective.network.parameters
        still = sum(p.numel() for name, p in parameters.items() if name not in step.vector)
        if still:
            total = sum(p.numel() for p in parameters.values())
            reasons.append(f"{still} of {total} parameters have no curvature here and stay where they are")
        kind, _, flavour = approximation.partition("_")
        if kind == "kfac":
            noisy = [
                part.spec.name
                for part in self.parts
                if any(one.noise > 0.1 * damping for one in part.inverses.get(flavour, ()))
            ]
            if noisy:
                reasons.append(
                    f"rounding of the factors is not small against this damping ({noisy[0]}): --dtype float64"
                )
        if form == "factored":
            undefined = [
                part.spec.name for part in self.parts if any(one.pi is None for one in part.inverses.get(flavour, ()))
            ]
            if undefined:
                more = f" and {len(undefined) - 1} more" if len(undefined) > 1 else ""
                reasons.append(f"{undefined[0]}{more}: a factor is zero, so eigenbasis damping is used there")
        if approximation == EXACT and any(p.exact and damping not in p.exact for p in self.parts):
            reasons.append("interpolated between kept steps, within 1 % in every eigendirection")
        return reasons


def _finite(change: float) -> float:
    return change if math.isfinite(change) else math.inf


def no_steps(reason: str) -> tuple[list[StepRow], list[GlobalDampingRow]]:
    """The rows of a run without steps."""
    return [_no_step(*series, reason) for series in SERIES], [_no_summary(*series, reason) for series in SERIES]


def _no_step(approximation: str, form: str, reason: str) -> StepRow:
    return StepRow(approximation, form, NAN, "grid", status="not_assessed", reason=reason)


def _no_summary(approximation: str, form: str, reason: str) -> GlobalDampingRow:
    return GlobalDampingRow(approximation, form, status="not_assessed", reason=reason)
