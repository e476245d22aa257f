"""Wrappers that models are taken out of, and models that are refused: what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import curvscope
from curvscope.errors import EXIT_BAD_INPUT, ModelError
from curvscope.load.kinds import plain_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def inside(change: Callable[[nn.Module], Any]) -> nn.Module:
    """The network with its first layer changed."""
    model = net()
    model.add_module("0", change(model[0]))
    return model


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "OptimizedModule": torch.compile,
    "OptimizedModule of DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("group")
def test_models_are_taken_out_of_wrappers(wrapper: str) -> None:
    model = net()
    found, notes = plain_model(WRAPPERS[wrapper](model))
    assert found is model
    names = wrapper.split(" of ")
    assert notes == tuple(f"The model was taken out of its {name} wrapper." for name in names)


def test_compiled_in_place() -> None:
    model = net()
    model.compile()
    assert plain_model(model) == (model, ())


def test_a_wrapped_model_has_the_numbers_of_the_model() -> None:
    batch = torch.randn(6, 4), torch.arange(6) % 3
    options: dict[str, Any] = {"loss": "cross_entropy", "fisher": "exact", "dtype": "float64", "time": 1e-3}
    wrapped, plain = (curvscope.analyze(each, batch, **options) for each in (nn.DataParallel(net()), net()))
    assert list(wrapped.layers) == list(plain.layers)
    for name, layer in plain.layers.items():
        assert wrapped.layers[name].errors["kfac_expand"].rel_frobenius == layer.errors["kfac_expand"].rel_frobenius
    assert any("DataParallel" in note for note in wrapped.notes)


class ComplexWeight(nn.Module):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat), requires_grad=trained)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.cfloat) @ self.w).abs())


def fully_sharded() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net(), device_id=torch.device("cpu"))


def sharded_by_parameter() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
    return model


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})


def trained_to_be_quantized() -> nn.Module:
    model: Any = net().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


# make, and words of what is wrong, of where, and of the remedy
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "scripted": (lambda: torch.jit.script(net()), "TorchScript", "the model, a Rec", "nn.Module that was scripted"),
    "traced": (lambda: torch.jit.trace(net(), torch.ones(2, 4)), "TorchScript", "the model, a Top", "state_dict()"),
    "scripted inside": (lambda: inside(torch.jit.script), "TorchScript", "0, a Rec", "nn.Module that was scripted"),
    "FSDP": (fully_sharded, "sharded", "a FullyShardedDataParallel", "full_state_dict=True"),
    "DTensor": (sharded_by_parameter, "sharded", "parameter 0.weight, a DTensor", "full_state_dict=True"),
    "quantized": (quantized, "weights are integers", "0, a Linear of torch.ao.nn.quantized", "floating-point model"),
    "fake quantization": (
        trained_to_be_quantized,
        "rounds its weight",
        "fake",
        "quantization.prepare_qat",
    ),
    "lazy": (lambda: inside(lambda _: nn.LazyLinear(5)), "has no shape", "parameter 0.weight", "one forward pass"),
    "complex": (lambda: ComplexWeight(True), "complex", "parameter w, a Parameter of complex64", "view_as_complex"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("group")
def test_refusals(name: str) -> None:
    make, what, where, remedy = REFUSED[name]
    model = make()
    with pytest.raises(ModelError) as caught:
        curvscope.analyze(model, (torch.ones(2, 4), torch.zeros(2).long()), loss="cross_entropy")
    error = caught.value
    assert error.exit_code == EXIT_BAD_INPUT == 3
    assert what in error.what
    assert where in error.where
    assert remedy in error.remedy


def test_complex_parameters_that_are_not_trained() -> None:
    model = ComplexWeight(False)
    assert plain_model(model) == (model, ())
    batch = torch.randn(4, 4), torch.arange(4) % 3
    assert list(curvscope.analyze(model, batch, loss="cross_entropy", time=1e-3).layers) == ["head"]


def test_layers_that_are_not_rounded_are_analyzed() -> None:
    model = nn.Sequential(trained_to_be_quantized(), nn.Linear(3, 3))
    assert plain_model(model) == (model, ())
