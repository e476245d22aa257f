"""What is advised lowers the loss: forward passes of a committed sample after the steps at the advised dampings."""

from __future__ import annotations

import math

import torch

from sample_models.train import FOLDER
from tests.whole import with_network

EXAMPLES = 12


def test_recommended_safe_and_set_dampings_lower_the_loss() -> None:
    """docs/damping.md has all samples, four batches and every flavour."""
    path = FOLDER / "digits_mlp.pt"
    stored = torch.load(path, weights_only=True)["batch"]
    (inputs,), targets = stored["inputs"]["args"], stored["targets"]
    batch = inputs[:EXAMPLES], targets[:EXAMPLES]
    run, whole = with_network(str(path), batch, None, dtype="float32")  # type: ignore[arg-type]
    network, series = whole.objective.network, ("kfac_expand", "eigenbasis")
    [row] = [one for one in run.tables["global_damping"] if (one.approximation, one.form) == series]

    def loss(damping: dict[str, float]) -> float:
        return network.loss(network.moved(whole._joint(*series, damping), 1.0))

    layers = [part.spec.name for part in whole.parts]
    own = {one.layer: one.joint for one in run.tables["ranges"] if (one.approximation, one.form) == series}
    assert own
    assert not any(math.isnan(damping) for damping in own.values())
    before = network.value
    assert loss(dict.fromkeys(layers, row.damping)) < before
    assert loss(dict.fromkeys(layers, row.safe_damping)) < before
    assert loss(dict.fromkeys(layers, row.safe_damping) | own) < before
