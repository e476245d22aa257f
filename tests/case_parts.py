"""What a test case is and how to make one: model, batch, loss, and what the oracle needs of each layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests import models, reference
from tests.reference import LossFunction
from tests.rows import Inputs, ToRows, call, examples_first


class ClassesLast(nn.CrossEntropyLoss):
    """Cross-entropy of outputs [N, T, C]."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs.mT, targets.mT if targets.is_floating_point() else targets)


class CausalLM(ClassesLast):
    """Outputs [N, T, V] against the token after each, from token ids [N, T]."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs[:, :-1], targets[:, 1:])


LOSS_MODULES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "classes_last": ClassesLast,
    "causal_lm": CausalLM,
    "mse": nn.MSELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
}


@dataclass(frozen=True)
class Layer:
    """A weight as the oracle sees it.

    `to_rows` makes [N, R, d] of a tensor laid out as the layer's input or output (for convolutions of
    [batch, positions, d]); `transposed`: the weight is stored [d_in, d_out]; `row_mask` gives the real rows
    [N, R] from the inputs where some are padding.
    """

    weight: str
    bias: str | None = None
    to_rows: ToRows = examples_first
    transposed: bool = False
    row_mask: Callable[[Inputs], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """One model with its batch and loss.

    Attributes:
        make: `() -> (model, inputs, targets)` under a seeded generator; `build` adds float64 and eval mode.
        loss: name and settings of a loss, or a callable `(outputs, targets) -> scalar`.
        layers: every linear layer in forward order, by the name curvscope gives it.
        hessian: the loss Hessian [N, D, D] in closed form, where autograd's would lose digits.
        example_axes: example axis of an input by position, where it is not 0.
        given: the loss as curvscope is given it, where that is not `loss_fn`: a text, or name and settings.
        rearrange: `(model, targets) -> targets` sets the model to lay out its outputs otherwise for curvscope; the
            oracle needs them as [N, ...].
    """

    make: Callable[[], tuple[nn.Module, Inputs, Any]]
    loss: tuple[str, Mapping[str, Any]] | LossFunction
    layers: Mapping[str, Layer]
    hessian: Callable[[Tensor, Any], Tensor] | None = None
    example_axes: Mapping[str, int] = field(default_factory=dict)
    given: Any = None
    rearrange: Callable[[nn.Module, Any], Any] | None = None

    def build(self) -> tuple[nn.Module, Inputs, Any]:
        """Model in float64 and eval mode, inputs and targets: the same ones at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model, inputs, targets = self.make()
        return model.double().eval(), inputs, targets

    @property
    def loss_fn(self) -> LossFunction:
        """The loss as `(outputs, targets) -> scalar`: a torch loss module where it has a name."""
        if not isinstance(self.loss, tuple):
            return self.loss
        name, settings = self.loss
        return LOSS_MODULES[name](**settings)


def oracle(case: Case, layer_name: str) -> reference.LayerReference:
    """What the oracle says of one layer of a case (computed anew: see `cases.expected`)."""
    model, inputs, targets = case.build()
    layer = case.layers[layer_name]
    return reference.layer_reference(
        model,
        inputs,
        targets,
        case.loss_fn,
        layer.weight,
        layer.bias,
        to_rows=layer.to_rows,
        transposed=layer.transposed,
        row_mask=None if layer.row_mask is None else layer.row_mask(inputs),
        H=None if case.hessian is None else case.hessian(call(model, inputs), targets),
    )


def f64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape)


def laid_out(layout: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """`Case.rearrange` of a models.TokenModel with targets [N, T]."""

    def rearrange(model: nn.Module, targets: Tensor) -> Tensor:
        assert isinstance(model, models.TokenModel)
        model.layout = layout
        targets = targets.transpose(0, 1) if layout in ("second", "flat_tn") else targets
        return targets.flatten() if layout.startswith("flat") else targets

    return rearrange


def token_case(
    loss: tuple[str, Mapping[str, Any]] | LossFunction,
    targets: Callable[[], Any],
    given: Any,
    classes: int = 4,
    shape: tuple[int, int] = (4, 3),
    **fields: Any,
) -> Case:
    """Attention that mixes the tokens, and a class for each of them: outputs [N, T, C]."""
    return Case(
        make=lambda: (models.TokenModel(classes=classes), f64(*shape, 3), targets()),
        loss=loss,
        layers=linears("q", "k", "v", "head"),
        given=given,
        **fields,
    )


def linear(path: str, bias: bool = True, to_rows: ToRows = examples_first) -> Layer:
    """The layer of the nn.Linear or nn.ConvNd at a path ("" is the root)."""
    prefix = path and path + "."
    return Layer(f"{prefix}weight", f"{prefix}bias" if bias else None, to_rows)


def linears(*paths: str, without_bias: tuple[str, ...] = ()) -> dict[str, Layer]:
    return {path: linear(path, path not in without_bias) for path in paths}


def second(x: Tensor) -> Tensor:
    """[T, N, d] -> [N, T, d]."""
    return x.transpose(0, 1)


def grouped(examples: int) -> ToRows:
    """[N * R, d] or [N * windows, w, d], example-major -> [N, R, d]."""
    return lambda x: x.reshape(examples, -1, x.shape[-1])


def interleaved(examples: int) -> ToRows:
    """[R * N, d], example-minor -> [N, R, d]."""
    return lambda x: x.reshape(-1, examples, x.shape[-1]).transpose(0, 1)


def mlp_case(
    loss: tuple[str, Mapping[str, Any]] | LossFunction,
    targets: Callable[[], Any],
    widths: tuple[int, ...] = (4, 5, 4, 3),
    examples: int = 6,
    **model_settings: Any,
) -> Case:
    """A tanh MLP under some loss."""
    bias = model_settings.get("bias", True)
    return Case(
        make=lambda: (models.mlp(*widths, **model_settings), f64(examples, widths[0]), targets()),
        loss=loss,
        layers={str(2 * i): linear(str(2 * i), bias) for i in range(len(widths) - 1)},
    )


def conv_case(conv: Callable[[], nn.Module], size: tuple[int, ...], bias: bool = True, examples: int = 4) -> Case:
    """Convolution, tanh, and a linear layer on all positions: [N, 2, *size] -> 3 classes."""

    def make() -> tuple[nn.Module, Inputs, Any]:
        first = conv()
        width = first(torch.zeros(1, 2, *size)).numel()
        model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))
        return model, f64(examples, 2, *size), labels(3, examples)

    return Case(make, ("cross_entropy", {}), {"0": linear("0", bias), "3": linear("3")})


def model_case(
    model: Callable[[], nn.Module], shape: tuple[int, ...], layers: Mapping[str, Layer], **fields: Any
) -> Case:
    """A model of three classes on inputs of one shape, under mean cross-entropy."""
    return Case(
        make=lambda: (model(), f64(*shape), labels(3, shape[0])),
        loss=("cross_entropy", {}),
        layers=layers,
        **fields,
    )


def layer_case(body: Callable[[], nn.Module], layers: Mapping[str, Layer], width: int = 4) -> Case:
    """A layer on tokens [N, T, 3], tanh, mean, a head: for weights that are not an nn.Linear."""
    return model_case(
        lambda: models.Pooled(nn.Sequential(OrderedDict(proj=body(), act=nn.Tanh())), nn.Linear(width, 3)),
        (5, 3, 3),
        {**layers, **linears("head")},
    )
