"""Embeddings: linear layers whose inputs are one-hot, summed without ever forming those over the whole vocabulary.

All rows of the weight that the batch does not look up have zero gradient, so that columns, gradient and A of reduce run
over the U tokens that occur; the row of `padding_idx` never gets a gradient, and its positions count as padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvscope.extract.collector import Collector, Form
from curvscope.extract.symmetric import input_gram
from curvscope.graph.sites import LayerSpec
from curvscope.graph.verify import Layouts


class EmbeddingCollector(Collector):
    """`Collector` for look-ups; with `whole`, columns and gradient run over the whole vocabulary."""

    def __init__(
        self,
        spec: LayerSpec,
        layouts: Layouts,
        form: Form | None,
        factors: bool,
        per_draw: bool,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__(spec, layouts, form, factors, per_draw)
        self.tokens = layouts.tokens[spec.name]
        self.whole = whole
        self._counted: Tensor | None = None

    def _a(self) -> Tensor:
        """The tokens of all calls, [N, R]; those of padding stand as they are."""
        if self._joined is None:
            parts: dict[str, Tensor] = {}
            for target, rows in self.rows.items():
                index = self.inputs.pop(target)
                parts[target] = rows.tokens(index)
                real = rows.real(index)
                if real is not None:
                    self.present[target] = real
            self.shapes = {target: part.shape for target, part in parts.items()}
            self._joined = torch.cat(list(parts.values()), dim=1)
            counted = [part != self._padding(target) for target, part in parts.items()]
            if not all(bool(part.all()) for part in counted):
                self._counted = torch.cat(counted, dim=1)
        return self._joined

    def _padding(self, target: str) -> int:
        row = self.rows[target].module.padding_idx
        return -1 if row is None else int(row)  # type: ignore[arg-type]

    def _g(self) -> Tensor:
        g = super()._g()
        return g if self._counted is None else g * self._counted.unsqueeze(-1)

    def _places(self) -> Tensor:
        """Where every position's token stands among the columns' inputs, [N, R]; padding's place is of no account."""
        if self.whole:
            return self._a()
        return torch.searchsorted(self.tokens, self._a()).clamp_(max=self.tokens.numel() - 1)

    def _width(self) -> int:
        return self.spec.d_in if self.whole else self.tokens.numel()

    def _weight_gradient(self, g: Tensor) -> Tensor:
        gradient = g.new_zeros(self._width(), g.shape[-1])
        return gradient.index_add_(0, self._places().flatten(), g.flatten(0, 1)).T

    def _example_squares(self, g: Tensor) -> Tensor:
        places = self._places()
        same = places.unsqueeze(2) == places.unsqueeze(1)  # inner products of one-hot rows
        return (same * torch.bmm(g, g.transpose(1, 2))).sum((1, 2), dtype=torch.float64)

    def _mean_input(self, real: Tensor | None, counts: Tensor) -> Tensor | None:
        return None

    def _fill(self, column: Tensor, g: Tensor, total: Tensor) -> None:
        places = self._places().unsqueeze(1).expand(-1, g.shape[-1], -1)
        column.zero_().scatter_add_(2, places, g.transpose(1, 2))

    def _inputs(self) -> Tensor:
        onehot = self.like.new_zeros(*self._a().shape, self._width())
        onehot.scatter_(2, self._places().unsqueeze(-1), 1.0)
        return onehot if self._counted is None else onehot * self._counted.unsqueeze(-1)

    def _tokens(self) -> Tensor | None:
        return self.tokens

    def _real(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        real = super()._real(masks)
        if real is None or self._counted is None:
            return self._counted if real is None else real
        return real & self._counted

    def _input_factors(self, real: Tensor | None, counts: Tensor) -> dict[str, Tensor]:
        """A of expand as a vector [V]: the share of every token; A of reduce [U, U] over the tokens that occur."""
        tokens = self._a()
        weight = torch.ones_like(tokens, dtype=self.like.dtype) if real is None else real.to(self.like.dtype)
        expand = self.like.new_zeros(self.spec.d_in).index_add_(0, tokens.flatten(), weight.flatten())
        places = torch.searchsorted(self.tokens, tokens).clamp_(max=self.tokens.numel() - 1)
        means = self.like.new_zeros(self.examples, self.tokens.numel()).scatter_add_(1, places, weight)
        means = means / counts.clamp(min=1).unsqueeze(1)
        reached = counts > 0
        # a batch of padding alone has no positions, and factors of zeros
        number = max(1.0, float(reached.sum()))
        return {
            "expand": expand / counts.sum().clamp(min=1),
            "reduce": input_gram(means[reached], number, bias=False),
        }
