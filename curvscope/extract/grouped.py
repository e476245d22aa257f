"""Grouped and depthwise convolutions, and weights of several heads: every group is a layer of its own, all batched.

A group's weight sees only its own inputs, so K-FAC gives each group its factors, and the block is the exact
one of each group: curvature between groups belongs, like that between layers, to no block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from curvscope.extract.collector import Collector, Columns, Extract, example_squares
from curvscope.extract.counts import RowCounts


class GroupedCollector(Collector):
    """`Collector` for a layer of several groups: factors [groups, ., .], one `Columns` a group."""

    _sums: dict[str, Tensor]
    _blocks: Tensor | None = None

    def _split(self, rows: Tensor) -> Tensor:
        """[N, R, groups * d] -> [groups, N, R, d]."""
        return rows.unflatten(-1, (self.spec.groups, -1)).permute(2, 0, 1, 3)

    def finish(self) -> None:
        """All sites of the layer have reported: add the pass up, group by group in one product."""
        a = self._split(self._a())
        g = self._split(self._g())
        total = g.sum(2)
        if self.column is None:
            weight = torch.bmm(g.flatten(1, 2).transpose(1, 2), a.flatten(1, 2))
            if self.spec.bias is not None:
                weight = torch.cat([weight, total.sum(1).unsqueeze(-1)], dim=-1)
            self.gradient = weight.flatten(0, 1)
            self.squares = sum(
                example_squares(a[i], g[i], bias=self.spec.bias is not None) for i in range(self.spec.groups)
            )  # type: ignore[assignment]
            return
        if self.factors:
            rows = g.flatten(1, 2)
            expand, reduce = torch.bmm(rows.transpose(1, 2), rows), torch.bmm(total.transpose(1, 2), total)
            if self.per_draw:
                self.draws["expand"].append(expand)
                self.draws["reduce"].append(reduce)
            if self.column == 0:
                # copies where the first draw's own are kept: the sums grow in place
                self._sums = {"expand": expand.clone(), "reduce": reduce.clone()}
            else:
                self._sums["expand"] += expand
                self._sums["reduce"] += reduce
        self._keep_groups(a, g, total)

    def _keep_groups(self, a: Tensor, g: Tensor, total: Tensor) -> None:
        if self.form is None:
            return
        groups, examples = g.shape[:2]
        column = torch.bmm(g.flatten(0, 1).transpose(1, 2), a.flatten(0, 1)).unflatten(0, (groups, examples))
        if self.spec.bias is not None:
            column = torch.cat([column, total.unsqueeze(-1)], dim=-1)
        if self.form == "formed":
            flat = column.flatten(2).double()
            product = torch.bmm(flat.transpose(1, 2), flat)
            if self._blocks is None:
                # those of one group's draws side by side
                draws = [self.formed_draws] if self.formed_draws else []
                self._blocks = product.new_zeros(groups, *draws, *product.shape[1:])
            own = self._blocks[:, self.column] if self.formed_draws else self._blocks
            own += product
            return
        if self.values is None:
            self.values = column.new_empty(groups, self.count, *column.shape[1:])
        assert self.column is not None
        self.values[:, self.column] = column

    def result(self, masks: Mapping[str, Tensor]) -> Extract:
        """The layer's sums, scaled as records.CONVENTIONS says."""
        a = self._split(self._a())
        examples, positions = a.shape[1:3]
        there, real = self._real({}), self._real(masks)
        full = torch.full((examples,), positions, device=a.device)
        counts, whole = (full if rows is None else rows.sum(1) for rows in (real, there))
        factors, unmasked = {}, {}
        if self.factors:
            A = self._group_factors(a, real, counts)
            factors = {name: (A[name], self._sums[name]) for name in self._sums}
            if real is not None and self.undecided:
                unmasked = self._group_factors(a, there, whole)
            mean = A["mean"]
        draws = {name: torch.stack(each) for name, each in self.draws.items() if each}
        columns: list[Columns] | None = None
        if self._blocks is not None:
            columns = [Columns("formed", examples, self.count, block=block) for block in self._blocks]
        elif self.values is not None:
            columns = [Columns("dense", examples, self.count, values=each) for each in self.values]
        rows = RowCounts.of(counts, whole, positions)
        found = Extract(self.spec, examples, rows.positions, rows.padded, factors, self.gradient, columns, draws)
        return dataclasses.replace(
            found,
            example_squares=self.squares,
            mean_input=mean if self.factors else None,
            real=real,
            counts=rows,
            unmasked=unmasked,
        )

    def _group_factors(self, a: Tensor, real: Tensor | None, counts: Tensor) -> dict[str, Tensor]:
        """A of both flavours [groups, ., .] and the mean [groups, d_in] over real rows of a [groups, N, R, d_in]."""
        a = a if real is None else a * real.unsqueeze(-1)
        mean = a.sum((1, 2), dtype=torch.float64) / max(1, int(counts.sum()))
        if self.spec.bias is not None:
            ones = a.new_ones(*a.shape[:3], 1)
            a = torch.cat([a, ones if real is None else ones * real.unsqueeze(-1)], dim=-1)
        rows = a.flatten(1, 2)
        means = a.sum(2) / counts.clamp(min=1).view(1, -1, 1)
        return {
            "expand": torch.bmm(rows.transpose(1, 2), rows) / max(1, int(counts.sum())),
            "reduce": torch.bmm(means.transpose(1, 2), means) / max(1, int((counts > 0).sum())),
            "mean": mean,
        }
