"""Random numbers of draws: known words, their distribution, and that they stay with their example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvscope.extract.noise import GOLDEN, Noise, mixed, signs_of, uniform
from curvscope.graph.layout import Layout
from curvscope.graph.ragged import Ragged

LAYOUTS = {
    "first": (Layout(0), (6, 4, 3)),
    "second": (Layout(1), (4, 6, 3)),
    "flattened": (Layout(0, 1, 4), (24, 3)),
    "examples fastest": (Layout(0, 4, 1), (24, 3)),
    "in between": (Layout(1, 2, 2), (3, 24)),
}


def test_words_are_those_of_splitmix64() -> None:
    """The first outputs for the seed 1234567, as they are published beside many implementations."""
    seen = mixed(1234567 + GOLDEN * torch.arange(1, 6))
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [value % 2**64 for value in seen.tolist()] == known


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_of_the_examples_has_its_own_numbers(name: str) -> None:
    layout, shape = LAYOUTS[name]
    words = Noise(3, layout).words(shape, torch.device("cpu"))
    assert words.shape == shape
    assert words.unique().numel() == words.numel()
    for low, high in ((0, 1), (1, 4), (4, 6)):
        part = layout.take(words, low, high)
        assert torch.equal(Noise(3, layout, low).words(part.shape, torch.device("cpu")), part)


def test_longer_examples_begin_with_the_numbers_of_shorter_ones() -> None:
    long, short = (Noise(3, Layout(0)).words((5, length, 7), torch.device("cpu")) for length in (9, 4))
    assert torch.equal(long[:, :4], short)
    lengths = [2, 4, 1]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    ragged = Noise(3, Ragged.of(0, owner, 3)).words((7, 2), torch.device("cpu"))
    dense = Noise(3, Layout(0)).words((3, 4, 2), torch.device("cpu"))
    # the example and the place within it are hashed in the order of a flattened axis
    flat = Noise(3, Layout(0, 1, 4)).words((12, 2), torch.device("cpu")).view(3, 4, 2)
    assert torch.equal(ragged, torch.cat([flat[n, :length] for n, length in enumerate(lengths)]))
    assert not torch.equal(dense, flat)


def correlation(values: Tensor) -> float:
    """The largest correlation between columns [n, many], in standard errors."""
    values = (values - values.mean(0)) / values.std(0)
    found = values.T @ values / len(values)
    return float((found - torch.eye(len(found), dtype=values.dtype)).abs().max()) * len(values) ** 0.5


def test_numbers_have_their_distributions() -> None:
    like = torch.zeros(20000, 3, 4, dtype=torch.float64)
    noise, other = Noise(5, Layout(0)), Noise(6, Layout(0))
    signs, normal, level = noise.signs(like), noise.normal(like), noise.uniform(like)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(level.min()) > 0 and float(level.max()) < 1
    size = like.numel() ** 0.5
    for values, moments in ((signs, (0, 1)), (normal, (0, 1, 0, 3)), (level - 0.5, (0, 1 / 12, 0, 1 / 80))):
        for power, moment in enumerate(moments, start=1):
            each = values**power
            assert abs(float(each.mean()) - moment) <= 4.5 * float(each.std()) / size + 1e-15
    for first, second in ((signs, other.signs(like)), (normal, other.normal(like))):
        # between outputs, between draws, and between neighbouring examples
        columns = torch.cat([first[:-1].flatten(1), second[:-1].flatten(1), first[1:].flatten(1)], 1)
        assert correlation(columns) < 5
    bits = signs_of(noise.words((20000,), like.device), 70, torch.float64)
    assert abs(float(bits.mean())) < 4.5 / bits.numel() ** 0.5
    assert correlation(bits) < 5
    extremes = torch.tensor([0, -1])  # all bits zero, all one
    assert float(uniform(extremes).min()) > 0 and float(uniform(extremes).max()) < 1
