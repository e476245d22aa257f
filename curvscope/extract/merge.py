"""Putting the extracts of several pieces of data together: what adds is added, columns stand side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from curvscope.extract.collector import Columns, Extract
from curvscope.extract.counts import side_by_side


class MergedColumns:
    """The columns of all examples, written into place piece by piece: one copy of them is held, never two.

    Pieces with fewer columns an example than `count` leave zeros, and so do those with fewer positions.
    """

    def __init__(self, examples: int, count: int) -> None:
        self.examples = examples
        self.count = count
        self.start = 0
        self.form: str | None = None
        self.parts: dict[str, Tensor] = {}

    def add(self, columns: Columns) -> None:
        """The columns of the next `columns.examples` examples."""
        self.form = columns.form
        if columns.form == "formed":
            assert columns.block is not None
            known = self.parts.get("block")
            if known is None:
                self.parts["block"] = columns.block
            elif known.data_ptr() != columns.block.data_ptr():  # else the sweep went on adding to it
                known += columns.block
        if columns.examples == self.examples and columns.count == self.count:
            self.parts |= _tensors(columns)
        else:
            for name, tensor in _tensors(columns).items():
                self._write(name, tensor)
        self.start += columns.examples

    def _write(self, name: str, tensor: Tensor) -> None:
        """Values and gradients [K, N, ...], inputs [N, R, d_in]; gradients and inputs have R behind N."""
        lead = [] if name.endswith("inputs") else [self.count]
        rest = list(tensor.shape[len(lead) + 1 :])
        known = self.parts.get(name)
        if known is None:
            known = self.parts[name] = tensor.new_zeros(*lead, self.examples, *rest)
        wider = len(lead) + 1
        if name != "values" and rest[0] > known.shape[wider]:  # longer examples than before
            grown = tensor.new_zeros(*lead, self.examples, *rest)
            grown[..., : known.shape[wider], :] = known
            known = self.parts[name] = grown
        stop = self.start + tensor.shape[len(lead)]
        if not lead:
            known[self.start : stop, : rest[0]] = tensor
        elif name != "values":
            known[: tensor.shape[0], self.start : stop, : rest[0]] = tensor
        else:
            known[: tensor.shape[0], self.start : stop] = tensor

    def rescale(self, factor: float) -> None:
        """Columns times `factor`."""
        for name, tensor in self.parts.items():
            if name not in ("inputs", "row_inputs"):
                tensor *= factor**2 if name == "block" else factor

    def result(self) -> Columns:
        """All of them."""
        assert self.form is not None
        return Columns(self.form, self.examples, self.count, **self.parts)  # type: ignore[arg-type]


class Merged:
    """One layer's extracts, added up over the pieces: A weighted by rows or examples, B, gradient and draws as sums.

    Where rows look like padding and later pieces may refute it, A and the mean of all rows are added up, too.
    """

    def __init__(self, examples: int, count: int) -> None:
        self.examples = examples
        self.count = count
        self.total: Extract | None = None
        self.columns: list[MergedColumns] = []
        self.grouped = False
        self.unmasked: dict[str, Tensor] | None = None
        self.real: list[tuple[int, int, Tensor | None]] = []
        self.roles: dict[str, Merged] = {}

    def add(self, extract: Extract) -> None:
        """The next piece."""
        given = extract.columns
        if given is not None:
            self.grouped = isinstance(given, list)
            each = given if isinstance(given, list) else [given]
            if extract.examples == self.examples:
                # all at once; where positions are kept apart, there are more columns' examples than examples
                self.columns = [MergedColumns(one.examples, one.count) for one in each]
            self.columns = self.columns or [MergedColumns(self.examples, self.count) for _ in each]
            for merged, one in zip(self.columns, each, strict=True):
                merged.add(one)
        for name, role in extract.roles.items():
            self.roles.setdefault(name, Merged(self.examples, self.count)).add(role)
        extract = dataclasses.replace(extract, columns=None, roles={})
        if extract.examples == self.examples:
            self.total = extract
            return
        self.real.append((extract.examples, extract.counts.longest, extract.real))
        extract = dataclasses.replace(extract, real=None)
        if self.total is None:
            self.total = extract
            self.unmasked = extract.unmasked or None
            return
        before, old, new = self.total, self.total.counts, extract.counts
        if extract.unmasked and self.unmasked is None:
            self.unmasked = _all_rows(before)  # nothing looked like padding so far
        if self.unmasked is not None:
            mine = _all_rows(extract)
            weights = {"reduce": (old.present, new.present)}
            self.unmasked = {
                name: _mean(A, mine[name], *weights.get(name, (old.there, new.there)))
                for name, A in self.unmasked.items()
            }
        weights = {"expand": (old.real, new.real), "reduce": (old.reached, new.reached)}
        counts = old + new
        self.total = dataclasses.replace(
            before,
            examples=before.examples + extract.examples,
            positions=counts.positions,
            padded=counts.padded,
            counts=counts,
            factors={
                name: (_mean(before.factors[name][0], A, *weights[name]), before.factors[name][1] + B)
                for name, (A, B) in extract.factors.items()
            },
            mean_input=None
            if before.mean_input is None or extract.mean_input is None
            else _mean(before.mean_input, extract.mean_input, old.real, new.real),
            gradient=_sum(before.gradient, extract.gradient),
            example_squares=_joined(before.example_squares, extract.example_squares),
            probe_B={name: _drawn(before.probe_B[name], B) for name, B in extract.probe_B.items()},
            draw_moments=(
                before.draw_moments[0] + extract.draw_moments[0],
                before.draw_moments[1] + extract.draw_moments[1],
            ),
        )

    def rescale(self, factor: float) -> None:
        """Everything so far in a unit `factor` times the old one."""
        for role in self.roles.values():
            role.rescale(factor)
        for merged in self.columns:
            merged.rescale(factor)
        if self.total is not None:
            square = factor**2
            self.total = dataclasses.replace(
                self.total,
                factors={name: (A, B * square) for name, (A, B) in self.total.factors.items()},
                probe_B={name: B * square for name, B in self.total.probe_B.items()},
                unit=self.total.unit * factor,
            )

    def result(self, padded: bool) -> Extract:
        """The layer's extract over all data; `padded` says whether rows that look like padding are."""
        assert self.total is not None
        columns = [merged.result() for merged in self.columns]
        extract = dataclasses.replace(
            self.total,
            columns=(columns if self.grouped else columns[0]) if columns else None,
            unmasked={},
            roles={name: role.result(padded) for name, role in self.roles.items()},
        )
        if self.real:
            extract = dataclasses.replace(extract, real=_real(self.real, padded))
        if extract.roles:
            counts = side_by_side(role.counts for role in extract.roles.values())
            positions = sum(role.positions for role in extract.roles.values())
            return dataclasses.replace(extract, positions=positions, padded=counts.padded, counts=counts)
        if padded or self.unmasked is None or extract.padded == 0.0:
            return extract
        counts = extract.counts.unmasked
        return dataclasses.replace(
            extract,
            factors={name: (self.unmasked[name], B) for name, (_, B) in extract.factors.items()},
            mean_input=self.unmasked.get("mean"),
            positions=counts.positions,
            padded=0.0,
            counts=counts,
        )


def _all_rows(extract: Extract) -> dict[str, Tensor]:
    """A and the mean of all rows, whether they look like padding or not."""
    mean = {} if extract.mean_input is None else {"mean": extract.mean_input}
    return extract.unmasked or {name: A for name, (A, _) in extract.factors.items()} | mean


def _mean(a: Tensor, b: Tensor, old: float, new: float) -> Tensor:
    """Two means as one, of so many numbers each."""
    return a if new == 0.0 else a * (old / (old + new)) + b * (new / (old + new))


def _real(pieces: Sequence[tuple[int, int, Tensor | None]], padded: bool) -> Tensor | None:
    """Which rows [N, R] are real, R those of the longest example; None where all are.

    From (examples, rows, which are real) of every piece. Where nothing is `padded` all rows that are there are real.
    """
    longest = max(rows for _, rows, _ in pieces)
    if all((real is None or not padded) and rows == longest for _, rows, real in pieces):
        return None
    device = next((real.device for _, _, real in pieces if real is not None), None)
    found = torch.zeros(sum(count for count, _, _ in pieces), longest, dtype=torch.bool, device=device)
    start = 0
    for count, rows, real in pieces:
        found[start : start + count, :rows] = True if real is None or not padded else real
        start += count
    return found


def _tensors(columns: Columns) -> dict[str, Tensor]:
    """What is kept for each example."""
    names = ("inputs", "gradients", "values", "row_inputs", "row_gradients")
    found = {name: getattr(columns, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """One after the other, where both are known."""
    return None if a is None or b is None else torch.cat([a, b])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _drawn(a: Tensor, b: Tensor) -> Tensor:
    """Draws of two pieces; a piece in which no term counts has one column of zeros."""
    if a.shape[0] == b.shape[0]:
        return a + b
    small, large = sorted((a, b), key=len)
    total = large.clone()
    total[: len(small)] += small
    return total
