"""The table of test cases: model, batch, loss, and for each layer what the oracle needs to know of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests import models, reference
from tests.reference import Inputs, LossFunction, ToRows, examples_first

LOSS_MODULES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
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
    """

    make: Callable[[], tuple[nn.Module, Inputs, Any]]
    loss: tuple[str, Mapping[str, Any]] | LossFunction
    layers: Mapping[str, Layer]
    hessian: Callable[[Tensor, Any], Tensor] | None = None
    example_axes: Mapping[str, int] = field(default_factory=dict)

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
    """What the oracle says of one layer of a case (not cached: see `expected`)."""
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
        H=None if case.hessian is None else case.hessian(reference.call(model, inputs), targets),
    )


@cache
def expected(case_name: str, layer_name: str) -> reference.LayerReference:
    """The oracle's result for one layer of `CASES`, computed once a test session."""
    return oracle(CASES[case_name], layer_name)


def f64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape)


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


def conv_case(
    conv: Callable[[], nn.Module], size: tuple[int, ...], bias: bool = True, examples: int = 4
) -> Case:
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


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """A convex loss that torch has no module for; couples the outputs of an example."""
    difference = outputs - targets
    return (difference.cosh().log().sum(1) + 0.5 * difference.sum(1) ** 2).sum() / 5


def trained_batchnorm() -> nn.Module:
    """Running statistics and affine parameters away from their defaults."""
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    )


def dead_relu() -> nn.Module:
    """No example activates a hidden unit: the first layer has G = 0, the second sees only its bias."""
    model = models.mlp(4, 5, 3, activation=nn.ReLU)
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100)
    return model


def cut_off() -> nn.Module:
    """A head of zeros: no curvature reaches the first layer."""
    model = models.mlp(4, 5, 3)
    with torch.no_grad():
        model.get_parameter("2.weight").zero_()
    return model


def saturated() -> tuple[nn.Module, Inputs, Any]:
    """Logit gaps of about 40 to 80: softmax rounds to one class, the curvature is tiny but not zero."""
    model = models.mlp(4, 5, 4, 3)
    with torch.no_grad():
        model.get_parameter("4.weight").mul_(5)
        model.get_parameter("4.bias").copy_(torch.tensor([60.0, 0.0, -3.0]))
    return model, f64(6, 4), labels(3, 6)


def padded_batch() -> tuple[nn.Module, Inputs, Any]:
    lengths = torch.tensor([4, 2, 3, 1, 4])
    mask = torch.arange(4) < lengths[:, None]
    return models.MaskedPool(), (f64(5, 4, 3) * mask[..., None], mask), labels(3, 5)


def padding_mask(inputs: Inputs) -> Tensor:
    assert isinstance(inputs, tuple)
    return inputs[1]


def ignored_tokens() -> tuple[nn.Module, Inputs, Any]:
    targets = labels(3, 4, 3)
    targets[0, 1] = targets[2, 0] = targets[2, 2] = -100
    return models.TokenClassifier(), f64(4, 3, 3), targets


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
TOKENS = linears("mix.q", "mix.k", "mix.v", "head")

CASES: dict[str, Case] = {
    # Losses
    "ce_mean": mlp_case(("cross_entropy", {}), lambda: labels(3, 6)),
    "ce_sum": mlp_case(("cross_entropy", {"reduction": "sum"}), lambda: labels(3, 6)),
    "ce_weights": mlp_case(("cross_entropy", {"weight": CLASS_WEIGHTS}), lambda: labels(3, 6)),
    "ce_weights_sum": mlp_case(
        ("cross_entropy", {"weight": CLASS_WEIGHTS, "reduction": "sum"}), lambda: labels(3, 6)
    ),
    "ce_smoothing": mlp_case(("cross_entropy", {"label_smoothing": 0.1}), lambda: labels(3, 6)),
    "ce_smoothing_weights": mlp_case(
        ("cross_entropy", {"label_smoothing": 0.2, "weight": CLASS_WEIGHTS}), lambda: labels(3, 6)
    ),
    "ce_smoothing_weights_sum": mlp_case(
        ("cross_entropy", {"label_smoothing": 0.1, "weight": CLASS_WEIGHTS, "reduction": "sum"}),
        lambda: labels(3, 6),
    ),
    "ce_ignore_index": mlp_case(
        ("cross_entropy", {"ignore_index": 2, "weight": CLASS_WEIGHTS}),
        lambda: torch.tensor([0, 2, 1, 1, 2, 0]),
    ),
    "ce_two_classes": mlp_case(("cross_entropy", {}), lambda: labels(2, 6), widths=(4, 5, 2)),
    "ce_saturated": Case(
        saturated,
        ("cross_entropy", {}),
        linears("0", "2", "4"),
        hessian=lambda logits, _: reference.cross_entropy_hessian(logits, torch.full((6,), 1 / 6).double()),
    ),
    "mse_mean": mlp_case(("mse", {}), lambda: f64(6, 3)),
    "mse_sum": mlp_case(("mse", {"reduction": "sum"}), lambda: f64(6, 3)),
    "mse_one_output": mlp_case(("mse", {}), lambda: f64(6, 1), widths=(4, 3, 1)),
    "bce_mean": mlp_case(("bce_with_logits", {}), lambda: labels(2, 6, 3).double()),
    "bce_pos_weight": mlp_case(
        ("bce_with_logits", {"pos_weight": CLASS_WEIGHTS, "reduction": "sum"}),
        lambda: labels(2, 6, 3).double(),
    ),
    "bce_weight_soft": mlp_case(
        ("bce_with_logits", {"weight": CLASS_WEIGHTS, "pos_weight": CLASS_WEIGHTS.flip(0)}),
        lambda: torch.rand(6, 3, dtype=torch.float64),
    ),
    "callable": mlp_case(log_cosh, lambda: f64(6, 3)),
    # Shapes
    "one_example": mlp_case(("cross_entropy", {}), lambda: labels(3, 1), examples=1),
    "no_bias": mlp_case(("cross_entropy", {}), lambda: labels(3, 6), bias=False),
    "one_wide": mlp_case(("cross_entropy", {}), lambda: labels(3, 6), widths=(1, 1, 3)),
    "root_linear": model_case(lambda: nn.Linear(4, 3), (6, 4), {"model": linear("")}),
    "keyword_inputs": Case(
        lambda: (models.TextLike(), {"first": f64(6, 3), "second": f64(6, 3)}, labels(3, 6)),
        ("cross_entropy", {}),
        linears("left", "right", "head", without_bias=("right",)),
    ),
    "relu": model_case(lambda: models.mlp(4, 6, 3, activation=nn.ReLU), (6, 4), linears("0", "2")),
    # Convolutions
    "conv2d": conv_case(lambda: nn.Conv2d(2, 3, 3), (5, 5)),
    "conv2d_stride": conv_case(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (5, 6)),
    "conv2d_uneven": conv_case(
        lambda: nn.Conv2d(2, 3, (2, 3), (2, 1), (1, 0), (1, 2), bias=False), (5, 7), bias=False
    ),
    "conv2d_leftover": conv_case(lambda: nn.Conv2d(2, 3, 2, stride=3), (7, 6)),
    "conv2d_same": conv_case(lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), (4, 4)),
    "conv2d_valid": conv_case(lambda: nn.Conv2d(2, 3, 2, padding="valid", stride=2), (6, 4)),
    "conv2d_circular": conv_case(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 4)),
    "conv2d_reflect": conv_case(
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode="reflect"), (4, 5)
    ),
    "conv2d_same_circular": conv_case(
        lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="circular"), (4, 4)
    ),
    "conv1d": conv_case(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (9,)),
    # More examples than inputs: here EKFAC-reduce has no choice of basis.
    "conv1d_small": conv_case(lambda: nn.Conv1d(2, 3, 2), (4,), examples=6),
    "conv3d": conv_case(lambda: nn.Conv3d(2, 3, (2, 1, 2), padding=(0, 1, 1), stride=(1, 2, 1)), (3, 3, 3)),
    "cnn_residual": model_case(
        models.ResidualCNN,
        (5, 2, 8, 8),
        {
            name: linear(name, name not in ("conv1", "skip"))
            for name in ("stem", "conv1", "conv2", "skip", "head")
        },
    ),
    "cnn_batchnorm": model_case(trained_batchnorm, (5, 2, 5, 5), linears("0", "3", "5", without_bias=("0",))),
    # Sequences and layouts
    "tokens_pooled": model_case(
        lambda: models.Pooled(models.mlp(3, 4, 3), nn.Linear(3, 3)),
        (5, 3, 3),
        linears("body.0", "body.2", "head"),
    ),
    "attention": model_case(
        models.SelfAttention,
        (4, 3, 4),
        {
            # nn.MultiheadAttention works on [T, N, d] inside, and flattens it before out_proj.
            "attn": Layer("attn.in_proj_weight", "attn.in_proj_bias", second),
            "attn.out_proj": linear("attn.out_proj", to_rows=interleaved(4)),
            "head": linear("head"),
        },
    ),
    "attention_batch_second": model_case(
        lambda: models.SelfAttention(batch_first=False),
        (4, 3, 4),
        {
            "attn": Layer("attn.in_proj_weight", "attn.in_proj_bias", second),
            "attn.out_proj": linear("attn.out_proj", to_rows=interleaved(4)),
            "head": linear("head"),
        },
    ),
    "encoder_layer": model_case(
        models.EncoderLayer,
        (4, 3, 4),
        {
            "block.self_attn": Layer(
                "block.self_attn.in_proj_weight", "block.self_attn.in_proj_bias", second
            ),
            "block.self_attn.out_proj": linear("block.self_attn.out_proj", to_rows=interleaved(4)),
            **linears("block.linear1", "block.linear2", "head"),
        },
    ),
    "shared_twice": model_case(models.SharedTwice, (6, 4), linears("shared", "head")),
    "shared_unequally": model_case(models.SharedUnequally, (5, 3, 4), linears("shared", "head")),
    "batch_second": model_case(
        lambda: models.Rearranged("second"),
        (4, 3, 3),
        {"inner": linear("inner", to_rows=second), **linears("head")},
    ),
    "batch_second_input": Case(
        lambda: (models.SecondAxisInput(), f64(3, 5, 3), labels(3, 5)),
        ("cross_entropy", {}),
        {"inner": linear("inner", to_rows=second), **linears("head")},
        example_axes={"0": 1},
    ),
    "flattened": model_case(
        lambda: models.Rearranged("flat_nt"),
        (4, 3, 3),
        {"inner": linear("inner", to_rows=grouped(4)), **linears("head")},
    ),
    "flattened_minor": model_case(
        lambda: models.Rearranged("flat_tn"),
        (4, 3, 3),
        {"inner": linear("inner", to_rows=interleaved(4)), **linears("head")},
    ),
    "windowed": model_case(
        models.Windowed,
        (3, 4, 4, 3),
        {
            "inner": linear("inner", to_rows=grouped(3)),
            "outer": linear("outer", to_rows=grouped(3)),
            **linears("head"),
        },
    ),
    "framewise_conv": model_case(
        models.FramewiseConv,
        (3, 2, 2, 4, 4),
        {"conv": linear("conv", to_rows=grouped(3)), **linears("head")},
    ),
    "mixer": model_case(models.Mixer, (5, 4, 3), linears("tokens", "channels", "head")),
    "padded_tokens": Case(
        padded_batch,
        ("cross_entropy", {}),
        {"inner": Layer("inner.weight", "inner.bias", row_mask=padding_mask), **linears("head")},
    ),
    "token_regression": Case(
        lambda: (nn.Sequential(models.PlainAttention(3), nn.Linear(3, 2)), f64(4, 3, 3), f64(4, 3, 2)),
        ("mse", {}),
        linears("0.q", "0.k", "0.v", "1"),
    ),
    "token_outputs": Case(
        lambda: (models.TokenClassifier(), f64(4, 3, 3), labels(3, 4, 3)), ("cross_entropy", {}), TOKENS
    ),
    "token_outputs_ignored": Case(ignored_tokens, ("cross_entropy", {"weight": CLASS_WEIGHTS}), TOKENS),
    "token_outputs_unmixed": Case(
        lambda: (models.TokenClassifier(mixing=False), f64(4, 3, 3), labels(3, 4, 3)),
        ("cross_entropy", {"reduction": "sum"}),
        linears("mix.0", "mix.2", "head"),
    ),
    # Weights that are not an nn.Linear's
    "matmul_operator": layer_case(
        lambda: models.MatmulLayer(3, 4, "operator"),
        {"body.proj": Layer("body.proj.weight", transposed=True)},
    ),
    "matmul_bias": layer_case(
        lambda: models.MatmulLayer(3, 4, "matmul"),
        {"body.proj": Layer("body.proj.weight", "body.proj.bias", transposed=True)},
    ),
    "matmul_two_axes": model_case(
        lambda: nn.Sequential(models.MatmulLayer(3, 4, "matmul"), nn.Tanh(), nn.Linear(4, 3)),
        (5, 3),
        {"0": Layer("0.weight", "0.bias", transposed=True), **linears("2")},
    ),
    "addmm_transposed": layer_case(
        lambda: models.MatmulLayer(3, 4, "addmm"),
        {"body.proj": Layer("body.proj.weight", "body.proj.bias", grouped(5), transposed=True)},
    ),
    "functional_linear": layer_case(
        lambda: models.FunctionalLinear(3, 4), {"body.proj": Layer("body.proj.weight", "body.proj.bias")}
    ),
    "two_weights": layer_case(
        models.TwoWeights,
        {"body.proj.w_in": Layer("body.proj.w_in"), "body.proj.w_out": Layer("body.proj.w_out")},
        width=3,
    ),
}

# Layers without any curvature: no error is defined there, and nothing may fail.
DEGENERATE: dict[str, Case] = {
    "dead_relu": model_case(dead_relu, (6, 4), linears("0", "2")),
    "zero_head": model_case(cut_off, (6, 4), linears("0", "2")),
}

CASE_LAYERS: list[tuple[str, str]] = [(name, layer) for name, case in CASES.items() for layer in case.layers]
