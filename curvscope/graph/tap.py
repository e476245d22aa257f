"""What a tap is: a place in the graph whose output gradient gives parameters their gradient for every example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from curvscope.graph.replay import Replay
from curvscope.graph.still import Pull


@dataclass(frozen=True)
class Member:
    """One parameter, or one value computed from parameters, behind a tap.

    Attributes:
        parameter: its name.
        role: scale (times `other`), shift, minus, or replayed.
        channels_first: it belongs to axis 1 of the output; otherwise it broadcasts as it is.
        index: the node that holds, for every element that was read, its place in the parameter (None: read whole).
        other: the node that a scale is multiplied with.
        replay: the operation as a function of it, where that has no rule of its own, and `arguments` the nodes that
            hold its arguments.
    """

    parameter: str
    role: str
    channels_first: bool = False
    index: fx.Node | None = None
    other: fx.Node | None = None
    replay: Replay | None = None
    arguments: tuple[fx.Node, ...] = ()

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes that a tap takes for it, in the order that `extract.taps` reads them."""
        return [node for node in (self.other, self.index) if node is not None] + list(self.arguments)


@dataclass(frozen=True)
class TapPlan:
    """A tap to insert behind `node`.

    Attributes:
        layer: the layer it belongs to.
        kind: the operation.
        members: what is read there; parameters, or values computed from parameters alone.
        parameters: the layer's parameters behind the members.
        shapes: the shape of every member.
        pulls: value -> how the gradients of its parameters follow from its own.
    """

    node: fx.Node
    layer: str
    kind: str
    members: tuple[Member, ...]
    parameters: tuple[str, ...]
    shapes: dict[str, torch.Size]
    pulls: dict[str, Pull]


class Tap(nn.Module):
    """Hands its first argument on; BackPACK keeps all of them for the extension.

    Attributes:
        members: what is read there; the further arguments are the `operands` of one after the other.
        shapes: the shape of every member.
        pulls: for members that are computed, how the gradients of their parameters follow.
    """

    def __init__(
        self, members: tuple[Member, ...], shapes: dict[str, torch.Size], pulls: Mapping[str, Pull] | None = None
    ) -> None:
        super().__init__()
        self.members = members
        self.shapes = shapes
        self.pulls = dict(pulls or {})

    def forward(self, output: Tensor, *extra: Tensor) -> Tensor:
        """The output itself."""
        return output.view_as(output)
