"""B of every single draw is that of a sweep over this draw alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.measure.coverages import repeated

DRAWS = 3


@pytest.mark.parametrize("fisher", ["probe", "mc"])
@pytest.mark.parametrize("model", ["conv", "grouped", "tokens", "lookup"])
def test_draws_are_those_of_sweeps_over_one(model: str, fisher: str) -> None:
    problem = repeated(model)
    root = problem.root(fisher, 0, DRAWS)
    together = problem.swept(root)
    seen = 0
    for k in range(DRAWS):
        alone = problem.swept(dataclasses.replace(root, columns=1, column=lambda _, k=k: root.column(k)))
        for name, extract in together.items():
            for flavour, draws in extract.probe_B.items():
                torch.testing.assert_close(draws[k], alone[name].factors[flavour][1], rtol=1e-12, atol=1e-14)
                seen += 1
    assert seen >= DRAWS * 2 * 2
