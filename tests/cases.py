"""The table of test cases."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests import models, reference
from tests.case_parts import (
    Case,
    Layer,
    conv_case,
    f64,
    grouped,
    interleaved,
    labels,
    laid_out,
    layer_case,
    linear,
    linears,
    mlp_case,
    model_case,
    oracle,
    second,
    token_case,
)
from tests.rows import Inputs

__all__ = ["CASES", "CASE_LAYERS", "DEGENERATE", "Case", "Layer", "expected", "oracle"]


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
    targets = labels(3, 4, 4)
    targets[0, 1] = targets[2, 0] = targets[2, 2] = -100
    return models.TokenClassifier(), f64(4, 4, 3), targets


def some_ignored() -> Tensor:
    """Examples with 2, 0, 3 and 1 terms."""
    return torch.tensor([[3, -100, 1], [-100, -100, -100], [0, 2, 2], [-100, 1, -100]])


def padded_sequences() -> tuple[nn.Module, Inputs, Any]:
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1])[:, None]
    return models.TokenModel(classes=3), (f64(4, 4, 3), mask), labels(3, 4, 4).where(mask, -100)


def past_only() -> tuple[nn.Module, Inputs, Any]:
    """A causal model: nothing depends on the last token, nor on what comes after the last target that counts."""
    targets = labels(4, 4, 4)
    targets[0, 2] = targets[1, 3] = targets[2, 2] = targets[2, 3] = -100
    return models.TokenModel(causal=True), f64(4, 4, 3), targets


def past_that_counts(_: Inputs) -> Tensor:
    return torch.arange(4) < torch.tensor([3, 2, 1, 3])[:, None]


FOUR_WEIGHTS = torch.tensor([0.5, 2.0, 1.3, 0.9], dtype=torch.float64)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
TOKENS = linears("mix.q", "mix.k", "mix.v", "head")

CASES: dict[str, Case] = {
    # Losses
    "ce_mean": mlp_case(("cross_entropy", {}), lambda: labels(3, 6)),
    "ce_sum": mlp_case(("cross_entropy", {"reduction": "sum"}), lambda: labels(3, 6)),
    "ce_weights": mlp_case(("cross_entropy", {"weight": CLASS_WEIGHTS}), lambda: labels(3, 6)),
    "ce_weights_sum": mlp_case(("cross_entropy", {"weight": CLASS_WEIGHTS, "reduction": "sum"}), lambda: labels(3, 6)),
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
        hessian=lambda logits, _: reference.cross_entropy_hessian(logits, torch.ones(6).double() / 6),
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
    "conv2d_uneven": conv_case(lambda: nn.Conv2d(2, 3, (2, 3), (2, 1), (1, 0), (1, 2), bias=False), (5, 7), bias=False),
    "conv2d_leftover": conv_case(lambda: nn.Conv2d(2, 3, 2, stride=3), (7, 6)),
    "conv2d_same": conv_case(lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), (4, 4)),
    "conv2d_valid": conv_case(lambda: nn.Conv2d(2, 3, 2, padding="valid", stride=2), (6, 4)),
    "conv2d_circular": conv_case(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 4)),
    "conv2d_reflect": conv_case(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode="reflect"), (4, 5)),
    "conv2d_same_circular": conv_case(lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="circular"), (4, 4)),
    "conv1d": conv_case(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (9,)),
    # More examples than inputs: here EKFAC-reduce has no choice of basis.
    "conv1d_small": conv_case(lambda: nn.Conv1d(2, 3, 2), (4,), examples=6),
    "conv3d": conv_case(lambda: nn.Conv3d(2, 3, (2, 1, 2), padding=(0, 1, 1), stride=(1, 2, 1)), (3, 3, 3)),
    "cnn_residual": model_case(
        models.ResidualCNN,
        (5, 2, 8, 8),
        {name: linear(name, name not in ("conv1", "skip")) for name in ("stem", "conv1", "conv2", "skip", "head")},
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
            "block.self_attn": Layer("block.self_attn.in_proj_weight", "block.self_attn.in_proj_bias", second),
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
        lambda: (models.TokenClassifier(), f64(4, 3, 3), labels(3, 4, 3)),
        ("cross_entropy", {}),
        TOKENS,
        given="cross_entropy:class_axis=second",
    ),
    "token_outputs_ignored": Case(ignored_tokens, ("cross_entropy", {"weight": CLASS_WEIGHTS}), TOKENS),
    "token_outputs_unmixed": Case(
        lambda: (models.TokenClassifier(mixing=False), f64(4, 4, 3), labels(3, 4, 4)),
        ("cross_entropy", {"reduction": "sum"}),
        linears("mix.0", "mix.2", "head"),
    ),
    # Sequence losses, on models that mix the tokens
    "classes_last": token_case(("classes_last", {}), lambda: labels(4, 4, 3), "cross_entropy"),
    "classes_last_square": token_case(
        ("classes_last", {}), lambda: labels(3, 4, 3), "cross_entropy:class_axis=last", classes=3
    ),
    "classes_last_settings": token_case(
        ("classes_last", {"weight": FOUR_WEIGHTS, "label_smoothing": 0.1}),
        some_ignored,
        ("cross_entropy", {"weight": FOUR_WEIGHTS, "label_smoothing": 0.1}),
    ),
    "classes_last_sum": token_case(
        ("classes_last", {"reduction": "sum", "ignore_index": 2}),
        lambda: labels(4, 4, 3),
        "cross_entropy:reduction=sum,ignore_index=2",
    ),
    "classes_last_soft": token_case(
        ("classes_last", {"weight": FOUR_WEIGHTS, "label_smoothing": 0.1}),
        lambda: torch.softmax(f64(4, 3, 4), -1),
        ("cross_entropy", {"weight": FOUR_WEIGHTS, "label_smoothing": 0.1}),
    ),
    "classes_second_soft": Case(
        lambda: (models.TokenClassifier(), f64(4, 3, 3), torch.softmax(f64(4, 3, 3), 1)), ("cross_entropy", {}), TOKENS
    ),
    "flat_outputs": token_case(
        ("classes_last", {"weight": FOUR_WEIGHTS}),
        some_ignored,
        ("cross_entropy", {"weight": FOUR_WEIGHTS}),
        rearrange=laid_out("flat_nt"),
    ),
    "flat_outputs_minor": token_case(
        ("classes_last", {}), some_ignored, "cross_entropy", rearrange=laid_out("flat_tn")
    ),
    "second_outputs": token_case(
        ("classes_last", {}), lambda: labels(4, 5, 3), "cross_entropy", shape=(5, 3), rearrange=laid_out("second")
    ),
    "padded_sequences": Case(
        padded_sequences,
        ("classes_last", {}),
        {name: Layer(f"{name}.weight", f"{name}.bias", row_mask=padding_mask) for name in ("q", "k", "v", "head")},
        given="cross_entropy",
    ),
    "causal_lm": token_case(("causal_lm", {}), some_ignored, "causal_lm"),
    "causal_lm_sum": token_case(
        ("causal_lm", {"reduction": "sum", "ignore_index": 3}),
        lambda: labels(4, 4, 3),
        "causal_lm:reduction=sum,ignore_index=3",
    ),
    "causal_lm_past": Case(
        past_only,
        ("causal_lm", {}),
        {name: Layer(f"{name}.weight", f"{name}.bias", row_mask=past_that_counts) for name in ("q", "k", "v", "head")},
        given="causal_lm",
    ),
    "token_bce": token_case(
        ("bce_with_logits", {"pos_weight": FOUR_WEIGHTS}), lambda: labels(2, 4, 3, 4).double(), None
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


@cache
def expected(case_name: str, layer_name: str) -> reference.LayerReference:
    """The oracle's result for one layer of `CASES`, computed once a test session."""
    return oracle(CASES[case_name], layer_name)
