"""How often 95 % intervals of estimates hold the exact number: in 90 to 99 % of repetitions (docs/estimates.md)."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from tests.measure.coverages import coverages

REPETITIONS = 120
DRAWS = 8
# 90 % itself, three binomial standard errors of the repetition below it
LEAST = 0.9 - 3 * (0.9 * 0.1 / REPETITIONS) ** 0.5


@pytest.mark.parametrize(
    ("model", "fisher", "exact_factors"),
    [
        *product(("mlp", "tokens", "conv"), ("probe", "mc"), (False,)),
        ("conv", "probe", True),
        ("trained", "probe", False),
        ("grouped", "probe", False),
    ],
)
def test_intervals_hold_the_exact_number(model: str, fisher: str, exact_factors: bool) -> None:
    found = coverages(model, fisher, DRAWS, REPETITIONS, exact_factors=exact_factors)
    kinds = {(name.split("_")[0], quantity) for _, name, quantity in found}
    # of kfac (whose trace may be exact), ekfac, diag and ggn
    assert len(kinds) == 4 - exact_factors + 2 + 2 + 1
    covered = {key: share for key, (share, _) in found.items()}
    assert min(covered.values()) >= LEAST, sorted(covered.items(), key=lambda item: item[1])[:5]
    assert 0.93 <= np.mean(list(covered.values())) <= 0.99
    # numbers are withheld only where the error is small against what so few draws resolve
    for (layer, name, quantity), (_, withheld) in found.items():
        if withheld > 0.02:
            assert quantity == "rel_frobenius", (layer, name, quantity)


def test_draws_that_miss_the_rare_labels_get_no_error_bar() -> None:
    """A model that is certain of most labels: 8 draws of labels agree with each other, and are wrong together."""
    for share, withheld in coverages("trained", "mc", DRAWS, 20).values():
        assert math.isnan(share)
        assert withheld == 1.0
