"""Products of an input with a parameter, stated as one linear operation over the input's last axis.

`linear`, `addmm` and plain matrix products are that already; `bmm`, `baddbmm`, batched `matmul`, `einsum` and
`bilinear` become it by moving axes. Those that both sides share and the output keeps are groups (heads or experts with
a weight each), those that both share and the output loses are inputs; the weight's others are outputs, the input's
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from curvscope.graph.operands import Operand, Reading, operand_of

aten = torch.ops.aten

Shapes = Mapping[str, torch.Size]


def _as_it_is(graph: fx.Graph, *inputs: fx.Node) -> fx.Node:
    return inputs[0]


@dataclass(frozen=True)
class Operation:
    """A linear operation as the graph states it, before it becomes a site.

    Attributes:
        node: the operation.
        kind: linear, conv1d, ..., conv_transpose3d.
        reading: its weight.
        inputs: the nodes that its rows are made from.
        out_axes: the axes of its output that are groups and outputs, in the order of the weight's rows.
        bias: what it adds by itself.
        options: a convolution's settings.
        before: `(graph, *inputs) -> rows`, after: `(graph, site's output) -> the operation's output`.
    """

    node: fx.Node
    kind: str
    reading: Reading
    inputs: tuple[fx.Node, ...]
    out_axes: tuple[int, ...]
    bias: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[..., fx.Node] = _as_it_is
    after: Callable[..., fx.Node] = _as_it_is

    @property
    def weight(self) -> str:
        """The parameter."""
        return self.reading.operand.parameter

    @property
    def groups(self) -> int:
        """How many groups of inputs have a weight each."""
        sizes = [self.reading.operand.sizes[axis] for axis in self.reading.groups]
        return math.prod(sizes) if self.kind == "linear" else int(self.options["groups"])


def find_product(node: fx.Node, shapes: Shapes) -> Operation | None:
    """The product with a parameter that this node is, if it is one."""
    finders: dict[Any, Callable[[fx.Node, Shapes], Operation | None]] = {
        aten.linear.default: _linear,
        aten.addmm.default: _added_product,
        aten.baddbmm.default: _added_product,
        aten.mm.default: _product,
        aten.bmm.default: _product,
        aten.matmul.default: _product,
        aten.einsum.default: _einsum,
        aten.bilinear.default: _bilinear,
    }
    finder = finders.get(node.target)
    return None if finder is None else finder(node, shapes)


def _rank(node: Any) -> int:
    value = node.meta.get("val")
    return -1 if value is None else int(value.ndim)


def _linear(node: fx.Node, shapes: Shapes) -> Operation | None:
    x, weight, bias = (*_filled(node, ("input", "weight", "bias")),)
    operand = operand_of(weight, shapes)
    if operand is None or len(operand.sizes) != 2:
        return None
    return Operation(node, "linear", Reading(operand, (), (0,), (1,)), (x,), (_rank(node) - 1,), bias)


def _filled(node: fx.Node, names: Sequence[str]) -> list[Any]:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def _added_product(node: fx.Node, shapes: Shapes) -> Operation | None:
    """The operations addmm and baddbmm: `bias + left @ right`."""
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    bias, left, right = node.args[:3]
    return _matmul(node, left, right, bias, shapes)


def _product(node: fx.Node, shapes: Shapes) -> Operation | None:
    left, right = node.args[:2]
    return _matmul(node, left, right, None, shapes)


def _matmul(node: fx.Node, left: Any, right: Any, bias: Any, shapes: Shapes) -> Operation | None:
    """`x @ w` has the weight transposed; in `w @ x` the rows are the columns of x."""
    operand = operand_of(right, shapes)
    on_the_right = operand is not None
    x = left if on_the_right else right
    if operand is None:
        operand = operand_of(left, shapes)
    if operand is None or operand_of(x, shapes) is not None:
        return None
    ranks = len(operand.sizes), _rank(x)
    if ranks[0] == 2 and ranks[1] >= 2:
        if on_the_right:
            return Operation(node, "linear", Reading(operand, (), (1,), (0,)), (x,), (_rank(node) - 1,), bias)
        return Operation(
            node,
            "linear",
            Reading(operand, (), (0,), (1,)),
            (x,),
            (_rank(node) - 2,),
            bias,
            before=_last_two_swapped,
            after=_last_two_swapped,
        )
    return _batched(node, operand, x, on_the_right, bias)


def _last_two_swapped(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.transpose.int, (node, -1, -2))


def _batched(node: fx.Node, operand: Operand, x: fx.Node, on_the_right: bool, bias: Any) -> Operation | None:
    """A matrix product with more axes than two on the weight's side, or with a vector, in the letters of einsum."""
    sizes: tuple[list[Any], list[Any]] = list(operand.sizes), list(x.meta["val"].shape)
    letters: tuple[list[str], list[str]] = [], []
    # the matrices' own axes: n and m are kept, d is summed over
    for side, first in ((0, not on_the_right), (1, on_the_right)):
        own = ["d"] if len(sizes[side]) == 1 else ["n", "d"] if first else ["d", "m"]
        letters[side].extend(own)
    tails = [letter for letter in "nm" if letter in letters[0] + letters[1]]
    batch = [sizes[side][: len(sizes[side]) - len(letters[side])] for side in (0, 1)]
    depth = max(len(each) for each in batch)
    heads: tuple[list[str], list[str]] = [], []
    out: list[str] = []
    for level in range(depth):
        letter = chr(ord("A") + level)
        here = [each[level - depth] if depth - level <= len(each) else None for each in batch]
        ones = [isinstance(size, int) and size == 1 for size in here]
        if here[0] is not None:
            heads[0].append("1" if ones[0] and here[1] is not None else letter)
        if here[1] is not None:
            heads[1].append("1" if ones[1] and here[0] is not None and not ones[0] else letter)
        out.append(letter)
    return _contraction(node, operand, heads[0] + letters[0], x, heads[1] + letters[1], out + tails, bias)


def _einsum(node: fx.Node, shapes: Shapes) -> Operation | None:
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    given: list[Any] = list(tensors)
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    spread = max(
        (_rank(t) - len(s.replace("...", "")) for t, s in zip(given, terms, strict=True) if "..." in s), default=0
    )
    more = [chr(0x4E00 + level) for level in range(spread)]  # letters that no equation has
    labels = []
    for tensor, term in zip(given, terms, strict=True):
        count = _rank(tensor) - len(term.replace("...", ""))
        labels.append(_spread(term, more[spread - count :] if count else []))
    if arrow:
        kept = _spread(output, more)
    else:
        flat = [letter for term in labels for letter in term if letter not in more]
        kept = more + sorted(letter for letter in set(flat) if flat.count(letter) == 1)
    operands = [operand_of(tensor, shapes) for tensor in given]
    for side in (1, 0):
        operand = operands[side]
        if operand is not None and operands[1 - side] is None:
            return _contraction(node, operand, labels[side], given[1 - side], labels[1 - side], kept, None)
    return None


def _spread(term: str, more: Sequence[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(more if dots else []), *after]


def _contraction(
    node: fx.Node,
    operand: Operand,
    weight: Sequence[str],
    x: fx.Node,
    data: Sequence[str],
    out: Sequence[str],
    bias: Any,
) -> Operation | None:
    """The product stated by letters, one an axis; "1" is an axis of size 1 that the other side broadcasts over."""
    for letters in (weight, data, out):
        own = [letter for letter in letters if letter != "1"]
        if len(set(own)) != len(own):
            return None
    groups = [letter for letter in out if letter in weight and letter in data]
    outs = [letter for letter in out if letter in weight and letter not in data]
    rows = [letter for letter in out if letter in data and letter not in weight]
    ins = [letter for letter in weight if letter in data and letter not in out and letter != "1"]
    if not ins or not rows or set(weight) - {*groups, *outs, *ins, "1"}:
        return None
    place = {letter: axis for axis, letter in enumerate(weight)}
    sizes = [operand.sizes[place[letter]] for letter in (*groups, *outs)]
    reading = Reading(operand, *(tuple(place[letter] for letter in part) for part in (groups, outs, ins)))
    dropped = [axis for axis, letter in enumerate(data) if letter not in {*groups, *rows, *ins}]
    left = [letter for axis, letter in enumerate(data) if axis not in dropped]
    order = [left.index(letter) for letter in (*rows, *groups, *ins)]
    width = len(groups) + len(ins)
    back = [[*rows, *groups, *outs].index(letter) for letter in out]

    def before(graph: fx.Graph, given: fx.Node) -> fx.Node:
        if dropped:
            given = graph.call_function(aten.sum.dim_IntList, (given, dropped))
        if order != sorted(order):
            given = graph.call_function(aten.permute.default, (given, order))
        return graph.call_function(aten.flatten.using_ints, (given, -width, -1)) if width > 1 else given

    def after(graph: fx.Graph, given: fx.Node) -> fx.Node:
        if not sizes:
            return graph.call_function(aten.select.int, (given, -1, 0))
        if len(sizes) > 1:
            given = graph.call_function(aten.unflatten.int, (given, -1, sizes))
        return graph.call_function(aten.permute.default, (given, back)) if back != sorted(back) else given

    out_axes = tuple(list(out).index(letter) for letter in (*groups, *outs))
    return Operation(node, "linear", reading, (x,), out_axes, bias, before=before, after=after)


def _bilinear(node: fx.Node, shapes: Shapes) -> Operation | None:
    """x1^T W_o x2 is linear in the outer product of the two inputs."""
    left, right, weight, bias = _filled(node, ("input1", "input2", "weight", "bias"))
    operand = operand_of(weight, shapes)
    if operand is None or any(operand_of(each, shapes) is not None for each in (left, right)):
        return None

    def before(graph: fx.Graph, first: fx.Node, second: fx.Node) -> fx.Node:
        first = graph.call_function(aten.unsqueeze.default, (first, -1))
        second = graph.call_function(aten.unsqueeze.default, (second, -2))
        outer = graph.call_function(aten.mul.Tensor, (first, second))
        return graph.call_function(aten.flatten.using_ints, (outer, -2, -1))

    reading = Reading(operand, (), (0,), (1, 2))
    return Operation(node, "linear", reading, (left, right), (_rank(node) - 1,), bias, before=before)
