"""A weight used in several roles: factors for each role, columns and gradient of all of them together.

The derivative with respect to the weight is the sum over its uses, so a column is the sum of the roles' columns, those
of a role that uses the transpose transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvscope.extract.collector import Collector, Columns, Extract, Form
from curvscope.extract.counts import side_by_side
from curvscope.extract.embedding import EmbeddingCollector
from curvscope.extract.symmetric import BlockSum
from curvscope.graph.sites import LayerSpec
from curvscope.graph.verify import Layouts


class TiedCollector:
    """`Collector` for a layer of several roles."""

    def __init__(self, spec: LayerSpec, layouts: Layouts, form: Form | None, factors: bool, per_draw: bool) -> None:
        self.spec = spec
        self.form = form
        self.examples = layouts.examples
        self.like = layouts.outputs
        self.count = 0
        self.column: int | None = None
        self.parts: dict[str, Collector] = {}
        for name in spec.roles:
            role = spec.role(name)
            given = (role, layouts, None, factors, per_draw)
            lookup = role.kind == "embedding"
            self.parts[name] = EmbeddingCollector(*given, whole=True) if lookup else Collector(*given)
        self.owners = {site.target: site.role for site in spec.sites}
        self.values: Tensor | None = None
        self.block: BlockSum | None = None
        self.formed_draws = 0
        self.undecided = False

    def begin(self, stored: Mapping[str, Any], columns: int) -> None:
        """Take what the forward pass left at the sites."""
        self.count = columns
        for part in self.parts.values():
            part.undecided = self.undecided
            part.begin(stored, columns)

    def start(self, column: int | None) -> None:
        """The next gradients belong to this column; None: to the loss itself."""
        self.column = column
        for part in self.parts.values():
            part.start(column)

    def receive(self, target: str, gradient: Tensor) -> None:
        """One site's output gradient of this pass."""
        self.parts[self.owners[target]].receive(target, gradient)

    def finish(self) -> None:
        """All sites of the layer have reported: add the pass up."""
        for part in self.parts.values():
            part.finish()
        if self.column is None or self.form is None:
            return
        shape = self.examples, self.spec.d_out, self.spec.d_in
        if self.form == "dense":
            if self.values is None:
                self.values = self.like.new_empty(self.count, *shape)
            column = self.values[self.column].zero_()
        else:
            column = self.like.new_zeros(shape)
        for name, part in self.parts.items():
            found = part.columns_of_pass()
            column += found.transpose(1, 2) if self.spec.roles[name] else found
        if self.form == "formed":
            if self.block is None:
                self.block = BlockSum(self.spec.parameters, self.formed_draws, column.device)
            self.block.add(self.column, column.flatten(1))

    def result(self, masks: Mapping[str, Tensor]) -> Extract:
        """Every role's sums, and the columns of the whole."""
        roles = {name: part.result(masks) for name, part in self.parts.items()}
        gradient: Tensor | None = None
        for name, role in roles.items():
            if role.gradient is not None:
                own = role.gradient.T if self.spec.roles[name] else role.gradient
                gradient = own if gradient is None else gradient + own
        columns = None
        if self.block is not None:
            columns = Columns("formed", self.examples, self.count, block=self.block.result())
        elif self.values is not None:
            columns = Columns("dense", self.examples, self.count, values=self.values)
        positions = sum(role.positions for role in roles.values())
        counts = side_by_side(role.counts for role in roles.values())
        return Extract(
            self.spec, self.examples, positions, counts.padded, {}, gradient, columns, roles=roles, counts=counts
        )
