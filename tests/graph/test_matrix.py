"""A layer's parameters as its matrix: what its sites hold, and back to the parameters' own shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvscope.graph.export import export_model
from curvscope.graph.functional import Graph, build
from curvscope.graph.matrix import to_matrix, to_parameters
from curvscope.load.problem import Inputs


class Weighted(nn.Module):
    """One weight and what is done with it."""

    def __init__(self, *shape: int, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "stored_transposed": (lambda: Weighted(4, 3, use=lambda x, w: x @ w), (5, 4)),
    "heads": (lambda: Weighted(2, 4, 3, use=lambda x, w: torch.einsum("nd,hdk->nhk", x, w)), (5, 4)),
    "heads_inside": (lambda: Weighted(4, 2, 3, use=lambda x, w: torch.einsum("nd,dhk->nhk", x, w)), (5, 4)),
    "groups": (lambda: Weighted(2, 4, 3, use=lambda x, w: torch.einsum("nhd,hdk->nhk", x, w)), (5, 2, 4)),
    "bilinear": (lambda: nn.Sequential(nn.Linear(4, 3), Square(3)), (5, 4)),
    "grouped_convolution": (lambda: nn.Conv2d(4, 6, 2, groups=2), (5, 4, 3, 3)),
    "transposed_convolution": (lambda: nn.ConvTranspose1d(4, 6, 3), (5, 4, 3)),
    "grouped_transposed_convolution": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (5, 4, 3)),
}


class Square(nn.Module):
    """An nn.Bilinear of its input with itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.form = nn.Bilinear(width, width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    exported = export_model(make(), Inputs(args=(torch.randn(shape),)), {})
    return build(exported.program, device=torch.device("cpu"), dtype=torch.float32, dynamic=exported.dynamic)


@pytest.mark.parametrize("name", MODULES)
def test_the_matrix_is_the_sites_and_goes_back(name: str) -> None:
    graph = graph_of(name)
    shapes = {key: value.shape for key, value in graph.parameters.items()}
    for spec in graph.layers.values():
        matrix = to_matrix(spec, graph.parameters)
        assert matrix.shape == (spec.d_out, spec.d_in + (spec.bias is not None))
        module = spec.sites[0].module
        held = module.weight
        if isinstance(module, nn.ConvTranspose1d):  # [C_in, C_out / groups, kernel]
            held = held.unflatten(0, (spec.groups, -1)).transpose(1, 2).flatten(0, 1)
        assert torch.equal(matrix[:, : spec.d_in], held.flatten(1))
        back = to_parameters(spec, matrix, shapes)
        assert all(torch.equal(value, graph.parameters[key]) for key, value in back.items())
        assert set(back) == {key for key in (spec.weight, spec.bias) if key is not None}
