"""What is advised lowers the loss: real torch steps of a small K-FAC on committed samples at the advised dampings."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.measure import whole
from curvscope.records import Layer
from sample_models.train import FOLDER, LOSSES, RECIPES
from tests.whole import with_network

EXAMPLES = 5
SERIES = (("kfac_expand", "eigenbasis"), ("kfac_reduce", "eigenbasis"))
# the optimizer's L2 decay, part of what is lowered
DECAY = {"graph_gnn": 5e-4}


class Kfac(torch.optim.Optimizer):
    """-(B (x) A + damping I)^{-1} grad for every layer with factors, each at its own damping; the others stay."""

    def __init__(
        self, model: nn.Module, run: curvscope.Run, flavour: str, damping: Mapping[str, float], decay: float
    ) -> None:
        given = dict(model.named_parameters())
        super().__init__(list(given.values()), {"weight_decay": decay})
        self.layers: list[tuple[nn.Parameter, nn.Parameter | None, Layer]] = []
        for name in damping:
            members = [given[row.parameter] for row in run.tables["coverage"] if row.layer == name]
            weight = next(one for one in members if one.ndim > 1)
            bias = next((one for one in members if one.ndim == 1), None)
            self.layers.append((weight, bias, run.layers[name]))
        self.flavour, self.damping = flavour, damping

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for weight, bias, layer in self.layers:
            both = [(weight, weight.flatten(1)), *([(bias, bias[:, None])] if bias is not None else [])]
            g = torch.cat(
                [p.grad.reshape(flat.shape) + self.param_groups[0]["weight_decay"] * flat for p, flat in both], dim=1
            ).double()
            pair = layer.factors[self.flavour]
            a, U = torch.linalg.eigh(torch.as_tensor(np.asarray(pair.A, dtype=np.float64)))
            b, V = torch.linalg.eigh(torch.as_tensor(np.asarray(pair.B, dtype=np.float64)))
            found = V @ ((V.T @ g @ U) / (torch.outer(b, a) + self.damping[layer.name])) @ U.T
            weight -= found[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype)
            if bias is not None:
                bias -= found[:, -1].to(bias.dtype)


class Setting:
    """A sample with its batch, cut to a few examples, analyzed; and the network itself, with the trained weights."""

    def __init__(self, name: str) -> None:
        recipe = RECIPES[name]
        stored = torch.load(FOLDER / f"{name}.pt", weights_only=True)
        inputs, self.targets = stored["batch"]["inputs"], stored["batch"]["targets"]
        self.given: Any = inputs.get("kwargs") or inputs["args"]
        if isinstance(self.given, (list, tuple)):
            self.given, self.targets = self.given[0][:EXAMPLES], self.targets[:EXAMPLES]
        self.model = recipe.model().eval()
        archive = torch.export.load(io.BytesIO(stored["graph"].numpy().tobytes()))
        self.model.load_state_dict(archive.state_dict)
        self.loss, self.decay = LOSSES[recipe.loss], DECAY.get(name, 0.0)
        path: Any = str(FOLDER / f"{name}.pt")
        # little time for what is of no concern here; steps are asked for
        more: Any = {"dtype": "float32", "example_index": recipe.example_index, "time": 0.1}
        with mock.patch.object(whole, "SERIES", SERIES):
            self.run, _ = with_network(path, (self.given, self.targets), None, **more)
        self.before = self.objective(self.model)

    def objective(self, model: nn.Module) -> float:
        with torch.no_grad():
            value = self.loss(self.outputs(model), self.targets).double()
            return float(value + 0.5 * self.decay * sum(p.double().square().sum() for p in model.parameters()))

    def outputs(self, model: nn.Module) -> Tensor:
        return model(**self.given) if isinstance(self.given, dict) else model(self.given)

    def change(self, flavour: str, damping: Mapping[str, float]) -> float:
        """The change of the objective by one real step."""
        model = copy.deepcopy(self.model)
        optimizer = Kfac(model, self.run, flavour, damping, self.decay)
        self.loss(self.outputs(model), self.targets).backward()
        optimizer.step()
        return self.objective(model) - self.before


@pytest.fixture(scope="module", params=["digits_mlp", "digits_cnn", "digits_vit", "digits_autoencoder", "graph_gnn"])
def setting(request: Any) -> Setting:
    return Setting(request.param)


def test_recommended_safe_and_set_dampings_lower_the_loss(setting: Setting) -> None:
    """docs/damping.md has all samples, four batches and every flavour."""
    layers = [name for name, layer in setting.run.layers.items() if layer.factors]
    for series in SERIES:
        flavour = series[0].removeprefix("kfac_")
        [row] = [one for one in setting.run.tables["global_damping"] if (one.approximation, one.form) == series]
        assert setting.change(flavour, dict.fromkeys(layers, row.damping)) < 0
        assert setting.change(flavour, dict.fromkeys(layers, row.safe_damping)) < 0
        own = {one.layer: one.joint for one in setting.run.tables["ranges"] if (one.approximation, one.form) == series}
        own = {name: value for name, value in own.items() if value == value}
        assert bool(own) == row.by_layer
        if own:
            assert setting.change(flavour, dict.fromkeys(layers, row.safe_damping) | own) < 0
        if len(layers) == len(setting.run.layers):
            # nothing else moves: the report's own figures
            for damping, change in ((row.damping, row.change), (row.safe_damping, row.safe_change)):
                got = setting.change(flavour, dict.fromkeys(layers, damping))
                assert got == pytest.approx(change, rel=2e-3, abs=1e-6 * abs(setting.before))
            if own:
                assert setting.change(flavour, dict.fromkeys(layers, row.safe_damping) | own) < row.change
