"""What to measure of every layer, and what to keep of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from curvscope.curvature.block import Block
from curvscope.extract.collector import Extract
from curvscope.extract.plan import PIECE_BYTES
from curvscope.measure.approximate import Built
from curvscope.measure.damping import DampingWishes

Keep = Callable[[Extract, Sequence[Block], Sequence[Mapping[str, Built]], str], None]


def keep_nothing(extract: Extract, blocks: Sequence[Block], built: Sequence[Mapping[str, Built]], fisher: str) -> None:
    """Keep nothing of a layer once it is measured."""


@dataclass(frozen=True)
class Wishes:
    """What to measure beyond the default, and what to keep for the file.

    `keep` is shown each layer's extract, its groups' blocks and their approximations (none where there are no exact
    columns), and how its columns were taken, before all of them are let go.
    """

    fisher: str
    measure: tuple[str, ...]
    dump: tuple[str, ...]
    seed: int
    dtype: torch.dtype
    piece_bytes: int = PIECE_BYTES
    keep: Keep = keep_nothing
    damping: DampingWishes = dataclasses.field(default_factory=DampingWishes)
    drawn_factors: bool = False
    no_damping: str = ""
