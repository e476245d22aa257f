"""Parameters as operations read them: whole, transposed or sliced, as one matrix that all readings agree on."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

SAME_VALUES = (
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
VIEWS = (
    *TRANSPOSES,
    operator.getitem,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)


@dataclass(frozen=True)
class Operand:
    """A view of a parameter: element (i, j, ...) is the parameter's entry number `offset + i strides[0] + ...`.

    `chain` are the nodes that take the view, in order.
    """

    parameter: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    chain: tuple[fx.Node, ...]

    def of(self, value: Tensor) -> Tensor:
        """The view of the parameter's value."""
        return _replayed(value, self.chain)

    def places(self, axes: Sequence[int]) -> Tensor:
        """Places in the parameter along these axes, row-major, at index 0 of all others."""
        found = torch.tensor([self.offset])
        for axis in axes:
            found = (found.unsqueeze(1) + torch.arange(self.sizes[axis]) * self.strides[axis]).flatten()
        return found

    def first_axis_split(self, groups: int) -> Operand:
        """The same view with its first axis as [groups, rest]."""
        rest = self.sizes[0] // groups
        sizes = (groups, rest, *self.sizes[1:])
        strides = (self.strides[0] * rest, self.strides[0], *self.strides[1:])
        return Operand(self.parameter, sizes, strides, self.offset, self.chain)


def operand_of(node: Any, shapes: Mapping[str, torch.Size]) -> Operand | None:
    """The parameter behind a node that shows a view of it; None for anything else."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in VIEWS:
            if len(node.all_input_nodes) != 1:
                return None
            chain.insert(0, node)
        elif node.target not in SAME_VALUES:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr" or str(node.target) not in shapes:
        return None
    name = str(node.target)
    whole = torch.empty(shapes[name], device="meta")
    shown = _replayed(whole, chain)
    if not isinstance(shown, Tensor) or shown.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    return Operand(name, tuple(shown.shape), shown.stride(), int(shown.storage_offset()), tuple(chain))


def _replayed(value: Any, chain: Sequence[fx.Node]) -> Any:
    for node in chain:
        operation: Any = node.target
        value = operation(value, *node.args[1:], **node.kwargs)
    return value


@dataclass(frozen=True)
class Reading:
    """An operand as a linear operation's weight: which of its axes are groups, outputs and inputs."""

    operand: Operand
    groups: tuple[int, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...]

    def matrix(self, value: Tensor) -> Tensor:
        """The weight as [groups * outputs, inputs], a view of the parameter's value where strides allow."""
        shown = self.operand.of(value)
        if shown.ndim < len(self.operand.sizes):
            shown = shown.unflatten(0, self.operand.sizes[:2])
        kept = (*self.groups, *self.outs)
        ones = [axis for axis in range(shown.ndim) if axis not in (*kept, *self.ins)]
        return shown.permute(*kept, *self.ins, *ones).reshape(math.prod(shown.shape[axis] for axis in kept), -1)


@dataclass(frozen=True)
class MatrixForm:
    """How a parameter is a layer's matrix: `parameter.view(view).permute(order).reshape(d_out, d_in)`."""

    view: tuple[int, ...]
    order: tuple[int, ...]
    d_out: int
    d_in: int


@dataclass(frozen=True)
class Part:
    """Which rows and columns of the layer's matrix one site reads; None where that is all of them in order."""

    rows: Tensor | None
    columns: Tensor | None


WHOLE = Part(None, None)


def stored_form(shape: Sequence[int], *, transposed: bool = False, groups: int = 1) -> MatrixForm:
    """The matrix of a whole weight stored [d_out, d_in, ...], or [d_in, d_out, ...] with the inputs' axis grouped."""
    view, order = tuple(shape), tuple(range(len(shape)))
    if transposed and groups > 1:
        view = (groups, shape[0] // groups, *shape[1:])
        order = (0, 2, 1, *range(3, len(view)))
    elif transposed:
        order = (1, 0, *order[2:])
    d_out = shape[1] * groups if transposed else shape[0]
    return MatrixForm(view, order, d_out, math.prod(shape) // d_out)


def matrix_form(
    view: Sequence[int], readings: Sequence[Reading], *, whole: bool
) -> tuple[MatrixForm, list[Part]] | None:
    """The matrix of which every reading takes rows (and, failing that, columns), and which ones; None if there is none.

    `view` is the parameter's shape (or finer); `whole` demands that every reading takes all of it in order, as
    groups need.
    """
    accepted: list[tuple[MatrixForm, list[Part]]] = []
    for outs, ins in _divisions(len(view), permuted=whole):
        parts = [_part(view, outs, ins, reading) for reading in readings]
        if any(part is None for part in parts):
            continue
        found = [part for part in parts if part is not None]
        d_out, d_in = (math.prod(view[axis] for axis in axes) for axes in (outs, ins))
        form = MatrixForm(tuple(view), (*outs, *ins), d_out, d_in)
        if all(part.columns is None and (part.rows is None or not whole) for part in found):
            return form, found
        accepted.append((form, found))
    return accepted[0] if accepted and not whole else None


def _divisions(count: int, *, permuted: bool) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Axes of rows and of columns: the usual first (the first axis is rows, or the second), then all others."""
    usual = [tuple(range(1, count)), (0, *range(2, count))]
    others = [ins for size in range(1, count + 1) for ins in itertools.combinations(range(count), size)]
    for ins in [*usual, *others] if count > 1 else others:
        outs = tuple(axis for axis in range(count) if axis not in ins)
        for order in itertools.permutations(outs) if permuted else [outs]:
            yield order, ins


def _part(view: Sequence[int], outs: Sequence[int], ins: Sequence[int], reading: Reading) -> Part | None:
    """The reading's rows and columns of the matrix with these axes, None where it takes neither."""
    rows = reading.operand.places((*reading.groups, *reading.outs))
    columns = reading.operand.places(reading.ins)
    found = []
    for places, own, other in ((rows, outs, ins), (columns, ins, outs)):
        across = _index(view, other, places)
        if bool((across != across[0]).any()):
            return None
        along = _index(view, own, places)
        size = math.prod(view[axis] for axis in own)
        complete = len(along) == size and bool((along == torch.arange(size)).all())
        found.append(None if complete else along)
    return Part(*found)


def _index(view: Sequence[int], axes: Sequence[int], places: Tensor) -> Tensor:
    """The row-major index over these axes of entries given by their places."""
    index = torch.zeros_like(places)
    for axis in axes:
        index = index * view[axis] + places // math.prod(view[axis + 1 :]) % view[axis]
    return index
