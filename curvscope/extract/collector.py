"""One layer's sums while the backward passes run: A, B, the gradient, and the columns in the form that was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from curvscope.extract.counts import RowCounts
from curvscope.extract.rows import SiteRows
from curvscope.extract.symmetric import ONE_BLOCK, BlockSum, GramSum, gram, input_gram
from curvscope.graph.sites import LayerSpec
from curvscope.graph.verify import Layouts

Form = Literal["outer", "factored", "dense", "formed"]
BUFFERED_ROWS = 1024
# Numbers of single examples' gradients that are formed at once.
SQUARED_NUMBERS = 2**22


@dataclass(frozen=True)
class Columns:
    """A layer's GGN columns v[n, k] in whichever form is cheapest to keep.

    outer and factored keep `inputs` [N, R, d_in(+1)] and `gradients` [K, N, R, d_out] (outer is R = 1); dense keeps
    `values` [K, N, d_out, d_in(+1)]; formed keeps `block` = G itself, [P, P] in float64, where P < N K, or that of each
    draw alone, [K, P, P], whose sum is G. Beside those two, `row_inputs` and `row_gradients` are what factored would
    keep, where they are small.
    """

    form: Form
    examples: int
    count: int
    inputs: Tensor | None = None
    gradients: Tensor | None = None
    values: Tensor | None = None
    block: Tensor | None = None
    row_inputs: Tensor | None = None
    row_gradients: Tensor | None = None


@dataclass(frozen=True)
class Extract:
    """What one sweep found for one layer.

    `factors` maps expand and reduce to (A, B) in the run's dtype; `probe_B` maps them to the B of each draw alone,
    [K, d_out, d_out] (only for probe and mc). `gradient` is dL/dW as [d_out, d_in(+1)]; `positions` the mean
    number of real positions an example; `padded` the share of rows found to be padding. Columns, B and `probe_B` are in
    multiples of `unit` (`Root.unit`); the gradient is not. With groups, factors have a leading axis of groups and there
    are columns for each. `unmasked` holds A and "mean" of all rows where some look like padding and data that comes
    later may tell otherwise. `example_squares` [N] are the squared norms of the examples' parts of the gradient.
    `mean_input` [d_in] (with groups [groups, d_in]) is the mean of the real rows without the bias's 1, None for an
    embedding; `real` [N, R] tells real rows from others, None where all are real; `counts` are the numbers of rows.

    For an embedding `tokens` [U] says which inputs the columns, the gradient and A of reduce run over, those that occur
    in the data; A of expand, which is diagonal, is a vector over all inputs. A weight of several `roles` has an
    `Extract` for each, without columns and with the role's own orientation, and no factors of its own; its columns and
    its gradient have the first role's orientation and run over all inputs. `draw_moments`: `Root.draw_moments`.
    """

    spec: LayerSpec
    examples: int
    positions: float
    padded: float
    factors: dict[str, tuple[Tensor, Tensor]]
    gradient: Tensor | None
    columns: Columns | list[Columns] | None
    probe_B: dict[str, Tensor] = field(default_factory=dict)
    unit: float = 1.0
    example_squares: Tensor | None = None
    mean_input: Tensor | None = None
    real: Tensor | None = None
    counts: RowCounts = field(default_factory=lambda: RowCounts(0.0, 0.0, 0.0, 0.0, 1))
    unmasked: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    roles: dict[str, Extract] = field(default_factory=dict)
    draw_moments: tuple[float, float] = (0.0, 0.0)

    @property
    def single(self) -> bool:
        """Whether every use of the weight has one position an example: both flavours are the same matrix then."""
        return all(role.positions == 1 for role in self.roles.values()) if self.roles else self.positions == 1

    @property
    def width(self) -> int:
        """The inputs that the columns run over, the bias included."""
        return self.tokens.numel() if self.tokens is not None else self.spec.d_in + (self.spec.bias is not None)


def _both(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return left if right is None else right if left is None else left & right


class _Buffered:
    """The sum of g^T g over passes; small passes are gathered first, so that products stay large."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.total = GramSum(size, dtype=like.dtype, device=like.device)
        self.waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Rows [N, R, d] of one pass."""
        if rows.shape[1] > 1 and rows.stride(-1) != 1 and rows.shape[-1] < ONE_BLOCK:
            self.total.add_batched(rows)
            return
        self.waiting.append(rows.flatten(0, 1))
        if sum(piece.shape[0] for piece in self.waiting) >= BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        if self.waiting:
            self.total.add(self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting))
            self.waiting = []

    def result(self) -> Tensor:
        """The whole sum."""
        self.flush()
        return self.total.result()


def _placed(narrow: Tensor, index: Tensor | None, width: int) -> Tensor:
    """Rows [N, R, d] of a site that reads a part of the weight, with zeros where it reads none: [N, R, width]."""
    if index is None:
        return narrow
    wide = narrow.new_zeros(*narrow.shape[:-1], width)
    return wide.index_add_(-1, index.to(narrow.device), narrow)


class Collector:
    """One layer's sums while the passes run."""

    def __init__(self, spec: LayerSpec, layouts: Layouts, form: Form | None, factors: bool, per_draw: bool) -> None:
        self.spec = spec
        self.form = form
        self.count = 0
        self.factors = factors
        self.per_draw = per_draw
        self.examples = layouts.examples
        self.like = layouts.outputs
        self.rows = {site.target: SiteRows(site.module, layouts.sites[site.target]) for site in spec.sites}
        self.parts = {site.target: site.part for site in spec.sites}
        self.inputs: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.pending: dict[str, Tensor] = {}
        self.column: int | None = None
        self.expand: _Buffered | None = None
        self.reduce: _Buffered | None = None
        self.draws: dict[str, list[Tensor]] = {"expand": [], "reduce": []}
        self.gradient: Tensor | None = None
        self.kept: list[Tensor] = []
        self.whole_examples = layouts.examples
        self.squares: Tensor | None = None
        self.keeps_rows = False
        self.gradients: Tensor | None = None
        self.values: Tensor | None = None
        self.block: BlockSum | None = None
        self.formed_draws = 0
        self.undecided = False
        self._joined: Tensor | None = None
        self.present: dict[str, Tensor] = {}

    def begin(self, stored: Mapping[str, Any], columns: int) -> None:
        """Take what the forward pass left at the sites."""
        self.count = columns
        self.inputs = {target: stored[target].input0.detach() for target in self.rows}

    def start(self, column: int | None) -> None:
        """The next gradients belong to this column; None: to the loss itself."""
        self.column = column
        self.pending = {}

    def receive(self, target: str, gradient: Tensor) -> None:
        """One site's output gradient of this pass."""
        gradients = self.rows[target].outputs(gradient)
        self.pending[target] = _placed(gradients, self.parts[target].rows, self.spec.d_out)

    def finish(self) -> None:
        """All sites of the layer have reported: add the pass up."""
        g = self._g()
        if self.column is None:
            self.gradient = self._weight_gradient(g)
            self.squares = self._example_squares(g)
            return
        single = g.shape[1] == 1
        total = g[:, 0] if single else g.sum(1)
        if self.factors:
            if self.reduce is None:
                self.reduce = _Buffered(g.shape[-1], g)
                self.expand = None if single else _Buffered(g.shape[-1], g)
            self.reduce.add(total.unsqueeze(1))
            if self.expand is not None:
                self.expand.add(g)
            if self.per_draw:
                self.draws["reduce"].append(gram(total))
                self.draws["expand"].append(self.draws["reduce"][-1] if single else gram(g.flatten(0, 1)))
        self._keep(g, total)

    def _g(self) -> Tensor:
        """The output gradients of all calls, [N, R, d_out]; a call that the pass does not reach has none."""
        self._a()
        parts = [
            self.pending[target] if target in self.pending else self.like.new_zeros(*shape, self.spec.d_out)
            for target, shape in self.shapes.items()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _weight_gradient(self, g: Tensor) -> Tensor:
        """dL/dW = sum g a^T, with the bias's as last column."""
        a = self._a()
        if g.stride(-1) == 1:
            weight = g.flatten(0, 1).T @ a.flatten(0, 1)
        else:
            weight = torch.bmm(g.transpose(1, 2), a).sum(0)
        return torch.cat([weight, g.sum((0, 1)).unsqueeze(1)], dim=1) if self.spec.bias else weight

    def _example_squares(self, g: Tensor) -> Tensor:
        """The squared norm of every example's part of the gradient, [N] float64."""
        return example_squares(
            self._a().unflatten(0, (self.whole_examples, -1)).flatten(1, 2),
            g.unflatten(0, (self.whole_examples, -1)).flatten(1, 2),
            bias=self.spec.bias is not None,
        )

    def _mean_input(self, real: Tensor | None, counts: Tensor) -> Tensor | None:
        """The mean of the real rows, [d_in] float64."""
        a = self._a()
        held = a if real is None else a * real.unsqueeze(-1)
        return held.sum((0, 1), dtype=torch.float64) / max(1.0, float(counts.sum()))

    def _a(self) -> Tensor:
        """The layer's rows of all calls, [N, R, d_in]."""
        if self._joined is None:
            width = self.spec.d_in * self.spec.groups
            parts = []
            for target, rows in self.rows.items():
                tensor = self.inputs.pop(target)
                parts.append(_placed(rows.inputs(tensor), self.parts[target].columns, width))
                real = rows.real(tensor)
                if real is not None:
                    self.present[target] = real
            self.shapes = {target: part.shape[:2] for target, part in zip(self.rows, parts, strict=True)}
            self._joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self._joined

    def _keep(self, g: Tensor, total: Tensor) -> None:
        if self.form is None:
            return
        if self.form in ("outer", "factored"):
            if self.gradients is None:
                self.gradients = g.new_empty(self.count, *g.shape)
            assert self.column is not None
            self.gradients[self.column] = g
            return
        if self.keeps_rows:
            self.kept.append(g)
        shape = self.examples, g.shape[-1], self._width()
        if self.form == "dense":
            if self.values is None:
                self.values = g.new_empty(self.count, *shape)
            assert self.column is not None
            column = self.values[self.column]
        else:
            column = g.new_empty(shape)
        self._fill(column, g, total)
        if self.form == "formed":
            flat = column.reshape(self.examples, -1)
            if self.block is None:
                self.block = BlockSum(flat.shape[1], self.formed_draws, flat.device)
            assert self.column is not None
            self.block.add(self.column, flat)

    def _width(self) -> int:
        """The inputs that the columns run over."""
        return self.spec.d_in + (self.spec.bias is not None)

    def _fill(self, column: Tensor, g: Tensor, total: Tensor) -> None:
        """v[n] = sum_r g a^T of this pass into `column` [N, d_out, width]."""
        a = self._a()
        column[..., : a.shape[-1]] = torch.bmm(g.transpose(1, 2), a)
        if self.spec.bias is not None:
            column[..., -1] = total

    def columns_of_pass(self) -> Tensor:
        """This pass's columns v[n], [N, d_out, width]."""
        g = self._g()
        column = g.new_empty(self.examples, g.shape[-1], self._width())
        self._fill(column, g, g.sum(1))
        return column

    def result(self, masks: Mapping[str, Tensor]) -> Extract:
        """The layer's sums, scaled as records.CONVENTIONS says."""
        examples, positions = self._a().shape[:2]
        there, real = self._real({}), self._real(masks)
        full = torch.full((examples,), float(positions), device=self.like.device, dtype=self.like.dtype)
        counts, whole = (full if rows is None else rows.sum(1).to(full) for rows in (real, there))
        factors = {}
        unmasked: dict[str, Tensor] = {}
        if self.factors and self.reduce is not None:
            B_reduce = self.reduce.result()
            B_expand = B_reduce if self.expand is None else self.expand.result()
            A = self._input_factors(real, counts)
            factors = {"expand": (A["expand"], B_expand), "reduce": (A["reduce"], B_reduce)}
            if real is not None and self.undecided:
                unmasked = self._input_factors(there, whole)
                mean = self._mean_input(there, whole)
                unmasked |= {} if mean is None else {"mean": mean}
        rows = RowCounts.of(counts, whole, positions)
        draws = {name: torch.stack(each) for name, each in self.draws.items() if each}
        found = Extract(
            self.spec, examples, rows.positions, rows.padded, factors, self.gradient, self._columns(), draws
        )
        return replace(
            found,
            unmasked=unmasked,
            tokens=self._tokens(),
            example_squares=self.squares,
            mean_input=self._mean_input(real, counts) if self.factors else None,
            real=real,
            counts=rows,
        )

    def _tokens(self) -> Tensor | None:
        return None

    def _input_factors(self, real: Tensor | None, counts: Tensor) -> dict[str, Tensor]:
        """A of both flavours, over the rows that are real, `counts` [N] of them in every example."""
        a = self._a()
        bias = self.spec.bias is not None
        masked = a if real is None else a * real.unsqueeze(-1)
        expand = input_gram(masked.reshape(-1, a.shape[-1]), float(counts.sum().clamp(min=1)), bias=bias)
        if a.shape[1] == 1:
            return {"expand": expand, "reduce": expand}
        means = masked.sum(1) / counts.clamp(min=1).unsqueeze(1).to(a.dtype)
        held = counts > 0
        return {"expand": expand, "reduce": input_gram(means[held], float(held.sum().clamp(min=1)), bias=bias)}

    def _real(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """Which rows count: those that are there (see `Ragged`), without the masked ones; None where all do."""
        parts = [_both(masks.get(target), self.present.get(target)) for target in self.rows]
        if all(part is None for part in parts):
            return None
        device = next(part.device for part in parts if part is not None)
        full = [
            torch.ones(shape, dtype=torch.bool, device=device) if part is None else part
            for part, shape in zip(parts, self.shapes.values(), strict=True)
        ]
        return torch.cat(full, dim=1)

    def _columns(self) -> Columns | None:
        if self.form is None:
            return None
        if self.form in ("outer", "factored"):
            return Columns(self.form, self.examples, self.count, inputs=self._inputs(), gradients=self.gradients)
        kept = {"row_inputs": self._inputs(), "row_gradients": torch.stack(self.kept)} if self.kept else {}
        if self.form == "dense":
            return Columns("dense", self.examples, self.count, values=self.values, **kept)
        assert self.block is not None
        return Columns("formed", self.examples, self.count, block=self.block.result(), **kept)

    def _inputs(self) -> Tensor:
        """The inputs of all columns, [N, R, width]."""
        a = self._a()
        return a if self.spec.bias is None else torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=-1)


def example_squares(a: Tensor, g: Tensor, *, bias: bool) -> Tensor:
    """||sum_r g[n, r] a[n, r]^T||^2 of every example [N], float64, from a [N, R, d_in] and g [N, R, d_out].

    With R^2 (d_in + d_out) < R d_in d_out from inner products of rows, else from the products themselves, a few
    examples at a time.
    """
    examples, positions, d_in = a.shape
    d_out = g.shape[-1]
    if positions * (d_in + d_out) < d_in * d_out or positions == 1:
        inner = torch.bmm(a, a.transpose(1, 2)) + float(bias)
        return (inner * torch.bmm(g, g.transpose(1, 2))).sum((1, 2), dtype=torch.float64)
    step = max(1, SQUARED_NUMBERS // (d_in * d_out))
    parts = []
    for low in range(0, examples, step):
        product = torch.bmm(g[low : low + step].transpose(1, 2), a[low : low + step])
        parts.append(product.flatten(1).square().sum(1, dtype=torch.float64))
    total = torch.cat(parts)
    return total + g.sum(1).square().sum(1, dtype=torch.float64) if bias else total
