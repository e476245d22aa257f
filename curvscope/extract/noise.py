"""Random numbers that belong to places: an output of an example gets the same ones however the data is cut.

A number is a hash of the draw's seed, the example and where in its outputs it stands (a counter-based generator, as in
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The hash takes one coordinate after the other
through the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), in integers, so it is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvscope.graph.layout import Layout
from curvscope.graph.ragged import Ragged

# As signed numbers: products of int64 wrap around.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64
# Signs that are taken of one word.
BITS = 32


@dataclass(frozen=True)
class Noise:
    """The numbers of one draw for tensors whose examples lie as `layout` says, the first of them number `start`."""

    seed: int
    layout: Layout
    start: int = 0

    def without(self, axis: int) -> Noise:
        """For tensors that lack this axis."""
        return replace(self, layout=self.layout.on_axis(self.layout.axis - (axis < self.layout.axis)))

    def words(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """64 random bits for every entry, int64.

        Coordinates count from the example's own first entry, so that longer examples begin with the same numbers.
        """
        own = self.layout.axis
        word = mixed(torch.tensor([self.seed + GOLDEN], device=device)).view([1] * len(shape))
        for coordinate in _of_examples(self.layout, shape[own], self.start, device):
            word = _hashed(word, coordinate.view([-1 if axis == own else 1 for axis in range(len(shape))]))
        for axis, size in enumerate(shape):
            if axis != own:
                coordinate = torch.arange(size, device=device)
                word = _hashed(word, coordinate.view([-1 if other == axis else 1 for other in range(len(shape))]))
        return word

    def signs(self, like: Tensor) -> Tensor:
        """+1 and -1 with equal odds, as `like` in shape, dtype and device."""
        return _as_signs(_shifted(self.words(like.shape, like.device), 63), like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Normal numbers (Box and Muller's), as `like` in shape, dtype and device."""
        words = self.words(like.shape, like.device)
        radius = (-2 * uniform(words).log()).sqrt()
        return (radius * (2 * math.pi * uniform(mixed(words + GOLDEN))).cos()).to(like.dtype)

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers between 0 and 1 (neither of them), float64, as `like` in shape and device."""
        return uniform(self.words(like.shape, like.device))


def mixed(word: Tensor) -> Tensor:
    """SplitMix64's finalizer of an int64 tensor."""
    word = (word ^ _shifted(word, 30)) * FIRST
    word = (word ^ _shifted(word, 27)) * SECOND
    return word ^ _shifted(word, 31)


def uniform(words: Tensor) -> Tensor:
    """Numbers between 0 and 1 (neither of them), float64, from random words."""
    return (_shifted(words, 12).double() + 0.5) * 2.0**-52


def signs_of(words: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`count` signs of every word [m], as [m, count]."""
    blocks = torch.arange(-(-count // BITS), device=words.device)
    more = _hashed(words.unsqueeze(-1), blocks)
    bits = _shifted(more.unsqueeze(-1), torch.arange(BITS, device=words.device)) & 1
    return _as_signs(bits.flatten(-2)[..., :count], dtype)


def _of_examples(layout: Layout, size: int, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The example's number, and which of its entries it is, along the axis that holds the examples."""
    if isinstance(layout, Ragged):
        places = layout.places.to(device)
        return start + places // layout.inner, places % layout.inner
    number = torch.arange(size, device=device)
    each = size // layout.outer
    return start + number % each // layout.inner, number // each * layout.inner + number % layout.inner


def _hashed(word: Tensor, coordinate: Tensor) -> Tensor:
    return mixed(word + (coordinate + 1) * GOLDEN)


def _shifted(word: Tensor, bits: int | Tensor) -> Tensor:
    """A shift to the right that fills up with zeros."""
    if isinstance(bits, Tensor):
        return word >> bits  # the sign comes in from the left: mask what is wanted
    return (word >> bits) & (2 ** (64 - bits) - 1)


def _as_signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return (2 * bits - 1).to(dtype)
