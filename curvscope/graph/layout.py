"""Where the examples sit in a tensor, and how its rows are assigned to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Axis `axis` of a tensor, of size outer * N * inner, holds the examples in its middle factor.

    outer = inner = 1 is a plain example axis; inner > 1 are rows of one example side by side (windows, flattened
    tokens); outer > 1 are examples that vary fastest (a flattened [T, N] axis).
    """

    axis: int
    outer: int = 1
    inner: int = 1

    def flat(self, tensor: Tensor) -> Tensor:
        """The tensor as [N, everything else], a view where that is possible."""
        return self.split(tensor).flatten(1)

    def rows(self, tensor: Tensor, feature_axis: int = -1) -> Tensor:
        """The tensor as [N, R, features], the features taken from `feature_axis`."""
        feature_axis %= tensor.ndim
        tensor = tensor.movedim(feature_axis, -1)
        axis = self.axis - (feature_axis < self.axis)
        return self.on_axis(axis).split(tensor).flatten(1, -2)

    def on_axis(self, axis: int) -> Layout:
        """The same factors on another axis."""
        return Layout(axis, self.outer, self.inner)

    def width(self, tensor: Tensor) -> int:
        """How many numbers an example has."""
        return tensor.numel() * self.outer * self.inner // tensor.shape[self.axis]

    def real(self, tensor: Tensor, feature_axis: int = -1) -> Tensor | None:
        """Which of `rows` [N, R] are rows of the tensor; None where all are, as always here (see `Ragged`)."""
        return None

    def unflat(self, flat: Tensor, like: Tensor) -> Tensor:
        """The inverse of `flat`: [N, everything else] back to the shape of `like`."""
        shape = list(like.shape)
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        tensor = flat.reshape([flat.shape[0], *before, self.outer, self.inner, *after])
        return tensor.movedim(0, self.axis + 1).reshape(shape)

    def take(self, tensor: Tensor, low: int, high: int) -> Tensor:
        """The tensor of examples low to high alone, its layout the same."""
        return self.pick(tensor, slice(low, high))

    def pick(self, tensor: Tensor, chosen: slice | Tensor) -> Tensor:
        """The tensor of some examples alone, by a slice or their numbers in any order, its layout the same."""
        shape = list(tensor.shape)
        part = self.split(tensor)[chosen.to(tensor.device) if isinstance(chosen, Tensor) else chosen]
        shape[self.axis] = self.outer * part.shape[0] * self.inner
        return part.movedim(0, self.axis + 1).reshape(shape)

    def split(self, tensor: Tensor) -> Tensor:
        """The tensor as [N, *axes before, outer, inner, *axes after]."""
        shape = list(tensor.shape)
        count = shape[self.axis] // (self.outer * self.inner)
        split = tensor.reshape([*shape[: self.axis], self.outer, count, self.inner, *shape[self.axis + 1 :]])
        return split.movedim(self.axis + 1, 0)


def candidates(factors: dict[int, int]) -> list[Layout]:
    """Every layout that the sizes allow: `factors` maps an axis to its size divided by N.

    The plainest come first: a whole axis, then examples slowest, then examples fastest, then in between.
    """
    found = []
    for axis, rest in factors.items():
        splits = [(1, rest), (rest, 1)] if rest > 1 else [(1, 1)]
        splits += [(outer, rest // outer) for outer in range(2, rest) if rest % outer == 0]
        found += [Layout(axis, outer, inner) for outer, inner in splits]
    return sorted(found, key=lambda layout: (layout.outer * layout.inner > 1, layout.axis))


def holds(layout: Layout, original: Tensor, permuted: Tensor, order: Tensor) -> float:
    """How far the rows of a pass over permuted examples are from the permuted rows, relative to their size.

    0 is a perfect match; what rounding leaves is about 1e-6 in float32. `order` is the permutation applied.
    """
    expected = layout.flat(original)[order]
    got = layout.flat(permuted)
    scale = float(expected.abs().max())
    if scale == 0.0:
        return 0.0 if float(got.abs().max()) == 0.0 else 1.0
    return float((got - expected).abs().max()) / scale
