"""What a second sweep can give of blocks whose columns can't be kept: diagonals in bases known from the first.

`Lambda = sum (U_B^T V U_A)^2`, EKFAC's diagonal, and diag(G) itself add over columns, so no column outlives its pass.
With them come tr G and `<G, B (x) A> = sum(Lambda * outer(lam_B, lam_A))`; ||G|| does not add and stays unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvscope.extract.collector import Collector
from curvscope.extract.plan import PIECE_BYTES
from curvscope.graph.sites import LayerSpec
from curvscope.graph.verify import Layouts

Bases = Mapping[str, tuple[Tensor, Tensor]]


class ProjectedCollector(Collector):
    """`Collector` that squares each column in the given bases (U_A, U_B), and in none ("diag"), and lets it go."""

    def __init__(self, spec: LayerSpec, layouts: Layouts, bases: Bases, piece_bytes: int = PIECE_BYTES) -> None:
        super().__init__(spec, layouts, None, False, False)
        self.bases = bases
        self.piece_bytes = piece_bytes
        self.sums: dict[str, Tensor] = {}

    def _keep(self, g: Tensor, total: Tensor) -> None:
        a = self._a()
        if self.spec.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=-1)
        each = a.element_size() * 2 * (g.shape[-1] * a.shape[-1] + a.shape[1] * (g.shape[-1] + a.shape[-1]))
        step = max(1, self.piece_bytes // each)
        for low in range(0, a.shape[0], step):
            rows, gradients = a[low : low + step], g[low : low + step]
            self._add("diag", gradients, rows)
            for name, (U_A, U_B) in self.bases.items():
                self._add(name, gradients @ U_B.to(g.dtype), rows @ U_A.to(a.dtype))

    def _add(self, name: str, gradients: Tensor, rows: Tensor) -> None:
        columns = torch.bmm(gradients.transpose(1, 2), rows)
        squares = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64).square()
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
