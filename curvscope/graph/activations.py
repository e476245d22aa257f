"""What the forward pass shows of attention and of nonlinear units: logits, entropy, saturation, dead units.

Numbers come from one pass through the exported graph; eager modules show none of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from curvscope.graph.functional import Graph
from curvscope.graph.operands import SAME_VALUES, VIEWS, operand_of
from curvscope.graph.sites import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from curvscope.graph.tap_places import INDEXING, NORMS

aten = torch.ops.aten

LINEAR = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
# unit -> where its slope is below a twentieth of the steepest: |tanh| > 0.975, sigmoid beyond 0.0127 of either end
BOUNDED: dict[Any, tuple[float, float]] = {
    aten.tanh.default: (-0.975, 0.975),
    aten.tanh_.default: (-0.975, 0.975),
    aten.sigmoid.default: (0.0127, 0.9873),
    aten.sigmoid_.default: (0.0127, 0.9873),
}
RECTIFIED = (aten.relu.default, aten.relu_.default)
# what a unit's input may pass through on its way from a linear layer
THROUGH = {*SAME_VALUES, *VIEWS, *INDEXING, *NORMS, aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar}


@dataclass(frozen=True)
class AttentionSeen:
    """One attention: `layer` makes its queries.

    `logit` is the largest |q k| (scaled, masked entries left out); `entropy` the mean over rows of -sum p log p over
    log(number of keys allowed): 1 is uniform, 0 one key alone; rows with one key are left out.
    """

    layer: str
    logit: float
    entropy: float


@dataclass(frozen=True)
class UnitsSeen:
    """One nonlinearity behind `layer`: `kind` tanh, sigmoid or relu.

    `saturated` is the share of values in the flat parts of a bounded unit; `dead` the share of units that are flat (for
    relu: zero) at every example and position.
    """

    layer: str
    kind: str
    saturated: float
    dead: float


@dataclass(frozen=True)
class Activations:
    """Everything seen in one pass over all data."""

    attention: tuple[AttentionSeen, ...]
    units: tuple[UnitsSeen, ...]


class Observer:
    """Attention and units, seen piece by piece; nothing in a graph of eager modules."""

    def __init__(self, graph: Graph) -> None:
        self._observer: _Observer | None = None
        if graph.plain is not None:
            names = {spec.weight: name for name, spec in graph.layers.items() if not spec.exact_only}
            sources = _Sources({key: p.shape for key, p in graph.parameters.items()}, names)
            self._observer = _Observer(graph.plain, sources)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Runs the graph on the inputs of further examples."""
        if self._observer is not None:
            with torch.no_grad():
                self._observer.run(*tensors)

    def seen(self) -> Activations | None:
        """What all of them showed; None for a graph of eager modules."""
        if self._observer is None:
            return None
        attention = (one.seen() for one in self._observer.attention.values())
        return Activations(tuple(attention), tuple(one.seen() for one in self._observer.units.values()))


@dataclass
class _Attention:
    """Sums over the rows seen so far."""

    layer: str
    logit: float = 0.0
    entropy: float = 0.0
    rows: int = 0

    def seen(self) -> AttentionSeen:
        return AttentionSeen(self.layer, self.logit, self.entropy / self.rows)


@dataclass
class _Units:
    """Sums over the values seen so far; `still` are the units that were flat at all of them."""

    layer: str
    kind: str
    still: Tensor
    flat: int = 0
    values: int = 0

    def seen(self) -> UnitsSeen:
        saturated = float("nan") if self.kind == "relu" else self.flat / self.values
        return UnitsSeen(self.layer, self.kind, saturated, float(self.still.double().mean()))


class _Sources:
    """Which layer a value comes from: the nearest linear operation upstream."""

    def __init__(self, shapes: dict[str, torch.Size], names: dict[str, str]) -> None:
        self.shapes = shapes
        self.names = names

    def layer(self, node: Any, *, everything: bool = False) -> str:
        """The layer's name; empty where another operation lies between, unless `everything` is passed through."""
        pending, seen = [node], set()
        while pending:
            node = pending.pop(0)
            if not isinstance(node, fx.Node) or node in seen or node.op != "call_function":
                continue
            seen.add(node)
            if node.target in LINEAR:
                found = [operand_of(argument, self.shapes) for argument in node.all_input_nodes]
                weights = [one.parameter for one in found if one is not None and one.parameter in self.names]
                if weights:
                    return self.names[weights[0]]
                if not everything:
                    continue
            if everything or node.target in THROUGH or "getitem" in str(node.target):
                pending += node.all_input_nodes
        return ""


class _Observer(fx.Interpreter):
    """Runs the graph and looks at single nodes as they pass."""

    def __init__(self, module: fx.GraphModule, sources: _Sources) -> None:
        super().__init__(module)
        self.sources = sources
        self.attention: dict[str, _Attention] = {}
        self.units: dict[str, _Units] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; what it shows is noted."""
        result = super().run_node(n)
        if n.op == "call_function":
            if n.target is aten.scaled_dot_product_attention.default:
                self._fused(n)
            elif n.target in SOFTMAX and self._weighs(n):
                logits, _ = self.fetch_args_kwargs_from_env(n)
                self._attention(n, logits[0], logits[1])
            elif n.target in BOUNDED or n.target in RECTIFIED:
                self._unit(n, result)
        return result

    def _fused(self, node: fx.Node) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        if query.shape[-3:-2] != key.shape[-3:-2] and query.ndim > 3:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)  # grouped queries
        scale = given.get("scale")
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if given.get("is_causal"):
            allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~allowed, -math.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        self._attention(node, logits, -1)

    def _weighs(self, node: fx.Node) -> bool:
        """Whether the softmax weighs something in a product: an attention's, not a classifier's."""
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if user.target in (aten.bmm.default, aten.matmul.default, aten.einsum.default):
                return True
            if user.target in (*SAME_VALUES, *INDEXING, aten.dropout.default, aten._to_copy.default):
                pending += list(user.users)
        return False

    def _attention(self, node: fx.Node, logits: Tensor, axis: int) -> None:
        logits = logits.double().movedim(axis, -1)
        floor = torch.finfo(torch.float32).min / 2  # some models mask with the least number instead of -inf
        allowed = logits > floor
        keys = allowed.sum(-1)
        rows = keys > 1
        if not bool(rows.any()):
            return
        p = torch.softmax(logits, -1)[rows]
        entropy = -(p * torch.where(p > 0, p, torch.ones_like(p)).log()).sum(-1) / keys[rows].double().log()
        largest = float(logits[allowed].abs().max())
        if node.name not in self.attention:
            self.attention[node.name] = _Attention(self.sources.layer(node.args[0], everything=True))
        seen = self.attention[node.name]
        seen.logit = max(seen.logit, largest)
        seen.entropy += float(entropy.sum())
        seen.rows += entropy.numel()

    def _unit(self, node: fx.Node, values: Tensor) -> None:
        layer = self.sources.layer(node.args[0])
        if not layer or values.ndim < 2:
            return
        axis = 1 if values.ndim > 3 else -1
        flat = values.movedim(axis, -1).flatten(0, -2)
        if node.target in RECTIFIED:
            still = flat <= 0
        else:
            low, high = BOUNDED[node.target]
            still = (flat < low) | (flat > high)
        if node.name not in self.units:
            kind = str(node.target).removeprefix("aten.").split(".")[0].removesuffix("_")
            self.units[node.name] = _Units(layer, kind, still.all(0))
        seen = self.units[node.name]
        seen.still = seen.still & still.all(0)
        seen.flat += int(still.sum())
        seen.values += still.numel()
