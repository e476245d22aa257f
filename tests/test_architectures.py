"""Every architecture of the table: it runs, its graph is the model, and every parameter is covered or explained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import curvscope
from curvscope.graph import prepare
from curvscope.graph.export import Exported, export_model
from curvscope.graph.functional import Graph, build
from curvscope.load.problem import Inputs
from curvscope.records import LayerRow
from curvscope.run import Run
from tests.architectures import ARCHITECTURES, BilinearHead, Built, CellLoop, EinsumAttention, Experts

# It warns of a slower implementation, once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

# Taken apart for the graph (recurrent steps, products with more axes), in another order of additions.
REORDERED = (nn.RNNBase, CellLoop, BilinearHead, EinsumAttention, Experts)
ANALYZED = {"kronecker", "exact_only"}


def as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, dict):
        return Inputs(kwargs=inputs)
    return Inputs(args=inputs if isinstance(inputs, tuple) else (inputs,))


def eager(model: nn.Module, inputs: Any) -> Tensor:
    """The output tensor of the model itself in eval mode."""
    given = as_inputs(inputs)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # another order of additions
    try:
        result = model.eval()(*given.args, **given.kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


@cache
def exported(name: str) -> Exported:
    """The export of two examples, which every other size runs through: exports are most of the time here."""
    architecture = ARCHITECTURES[name]
    model, inputs, _ = architecture.build(2)
    return export_model(
        model,
        as_inputs(inputs),
        architecture.example_axes,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@cache
def graph_of(name: str) -> Graph:
    return build(
        exported(name).program, device=torch.device("cpu"), dtype=torch.float32, dynamic=exported(name).dynamic
    )


def analyze(name: str, examples: int, **options: Any) -> Run:
    architecture = ARCHITECTURES[name]
    model, inputs, targets = architecture.build(examples)
    return curvscope.analyze(
        model,
        (inputs, targets),
        loss=architecture.loss,
        example_axes=dict(architecture.example_axes),
        **options,
    )


@cache
def run_of(name: str, examples: int) -> Run:
    """Four probes of float32 through the one export."""
    with mock.patch.object(prepare, "export_model", return_value=exported(name)):
        return analyze(name, examples, fisher="probe", samples=4)


BOTH = [pytest.param(name, examples, id=f"{name}-{examples}") for name in ARCHITECTURES for examples in (1, 2)]


@pytest.mark.parametrize(("name", "examples"), BOTH)
def test_every_parameter_is_covered_or_explained(name: str, examples: int) -> None:
    model, _, _ = ARCHITECTURES[name].build(examples)
    run = run_of(name, examples)
    assert run.model.graph == "exported"
    rows = {row.parameter: row for row in run.tables["coverage"]}
    assert {key: row.count for key, row in rows.items()} == {key: p.numel() for key, p in model.named_parameters()}
    for row in rows.values():
        assert row.treatment in {*ANALYZED, "uncovered"}
        if row.treatment in ANALYZED:
            assert row.layer in run.layers
        else:
            assert row.reason, row.parameter
    for layer in run.layers.values():
        assert all(np.isfinite(f.A).all() and np.isfinite(f.B).all() for f in layer.factors.values()), layer.name
    covered = sum(row.count for row in rows.values() if row.treatment == "kronecker")
    assert run.coverage == pytest.approx(covered / run.model.parameters)
    assert math.isfinite(run.model.loss)
    assert run.model.gradient_norm > 0


# Weights of linear modules that have no Kronecker form (yet): module path endings -> words of the reason.
WITHOUT_FACTORS: dict[str, tuple[tuple[str, str], ...]] = {
    # Both ends of the network use one table.
    "gpt2_lm": (("lm_head", ""),),
    "bert_masked_lm": (("decoder", ""),),
    "t5": (("lm_head", ""),),
}
# Their rows are positions, the same for every example: an exact block, no factors.
WITHOUT_EXAMPLES: dict[str, tuple[str, ...]] = {"swin_v2_tiny": ("cpb_mlp.0", "cpb_mlp.2")}
LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_modules_have_factors(name: str) -> None:
    model, _, _ = ARCHITECTURES[name].build(2)
    run = run_of(name, 2)
    rows = {row.parameter: row for row in run.tables["coverage"]}
    exceptions = WITHOUT_FACTORS.get(name, ())
    for path, module in model.named_modules():
        if not isinstance(module, LINEAR) and type(module).__name__ != "Conv1D":
            continue
        words = [words for ending, words in exceptions if path.endswith(ending)]
        weight = f"{path}.weight"
        if words:
            # a tied weight goes by the name of its first owner
            assert weight not in rows or words[0] in rows[weight].reason or rows[weight].treatment == "kronecker"
        else:
            positions = path.endswith(WITHOUT_EXAMPLES.get(name, ("no such path",)))
            assert rows[weight].treatment == ("exact_only" if positions else "kronecker"), rows[weight]


# Not everything there is covered (yet), which `WITHOUT_FACTORS` and the coverage table tell of.
INCOMPLETE = ("gpt2_lm", "bert_masked_lm", "bert_classifier", "llama_lm", "llama_classifier", "t5")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in INCOMPLETE])
def test_nothing_is_left_out(name: str) -> None:
    left = {row.parameter: row.reason for row in run_of(name, 2).tables["coverage"] if row.treatment not in ANALYZED}
    assert not left


# The recurrent layers' and cells' biases and the slices of packed projections belong to their weights.
ALL_KRONECKER = (
    *("attention_cross", "attention_cross_batch_second"),
    *("rnn", "rnn_batch_second", "gru", "gru_batch_second", "lstm", "lstm_batch_second", "lstm_projected"),
    *("rnn_cell", "gru_cell", "lstm_cell", "bilinear_head", "einsum_attention"),
)


@pytest.mark.parametrize("name", ALL_KRONECKER)
def test_everything_has_factors(name: str) -> None:
    assert run_of(name, 2).coverage == 1.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_graph_is_the_model(name: str) -> None:
    """To the bit at the exported size; other sizes run through it and agree to rounding."""
    assert exported(name).dynamic
    for examples in (2, 1, 3):
        model, inputs, _ = ARCHITECTURES[name].build(examples)
        given = as_inputs(inputs)
        with torch.no_grad():
            # aten.linear adds up in another order where the weight requires a gradient and rows are not contiguous
            want = eager(model.requires_grad_(False), inputs)
            got = graph_of(name).run(*given.tensors().values())
        if examples == 2 and not isinstance(model, REORDERED):
            assert torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# One of each way to lay out and to pass the inputs is exported from a single example.
FROM_ONE_EXAMPLE = ("mobilenet_v2", "transformer_decoder_batch_second", "lstm_batch_second", "gpt2_classifier")


@pytest.mark.parametrize("name", FROM_ONE_EXAMPLE)
def test_one_example_exports_by_itself(name: str) -> None:
    alone, shared = analyze(name, 1, fisher="probe", samples=4), run_of(name, 1)
    assert alone.model.graph == "exported"
    assert alone.model.loss == pytest.approx(shared.model.loss, rel=1e-5)
    assert alone.model.gradient_norm == pytest.approx(shared.model.gradient_norm, rel=1e-4)
    assert alone.tables["coverage"] == shared.tables["coverage"]


# Against brute force -------------------------------------------------------------------------------------------------


class Widened(TorchFunctionMode):
    """Casts to float32 inside a model (RMSNorm) become casts to float64, as in the graph of a float64 run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(
            lambda item: torch.float64 if item is torch.float32 else item, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def in_float64(built: Built) -> Built:
    model, inputs, targets = built
    inputs, targets = pytree.tree_map(
        lambda item: item.double() if isinstance(item, Tensor) and item.is_floating_point() else item,
        (inputs, targets),
    )
    return model.double(), inputs, targets


def output_jacobians(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """d output / d parameter as [all outputs, *shape], zero where a parameter is not reached."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in output.flatten()
    ]
    return {name: torch.stack(of_one) for name, of_one in zip(names, zip(*rows, strict=True), strict=True)}


# Parameters with axes for heads or experts -> their Jacobian's axes as outputs of the model, rows and inputs.
AXES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("query", "key", "value"), (0, 2, 3, 1)),
    "out": (0, 3, 1, 2),
    **dict.fromkeys(("up", "down"), (0, 1, 3, 2)),
}


def layer_jacobian(
    model: nn.Module, row: LayerRow, names: list[str], J: dict[str, Tensor], exact_only: bool
) -> Tensor | None:
    """[all outputs, groups, P of a group] in the order of the layer's columns; None where that order is not plain."""
    if exact_only:
        return torch.cat([J[name].flatten(1) for name in names], dim=1).unsqueeze(1)
    if names[0] in AXES:
        jacobian = J[names[0]].permute(AXES[names[0]]).reshape(len(J[names[0]]), -1, row.d_in)
        jacobian = torch.cat([jacobian, *(J[name].flatten(1).unsqueeze(2) for name in names[1:])], dim=2)
        return jacobian.unflatten(1, (row.groups, -1)).flatten(2)
    if not row.kind.startswith(("linear", "conv")) or sum(J[name].ndim > 2 for name in names) != 1:
        return None
    weight, *bias = sorted(names, key=lambda name: -J[name].ndim)
    jacobian = J[weight]
    if type(model.get_submodule(weight.rpartition(".")[0])).__name__ == "Conv1D":
        jacobian = jacobian.transpose(1, 2)
    jacobian = torch.cat([jacobian.flatten(2), *(J[name].unsqueeze(2) for name in bias)], dim=2)
    return jacobian.unflatten(1, (row.groups, -1)).flatten(2)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
}
BRUTE_FORCE = (
    "mobilenet_v2",  # depthwise convolutions
    "swin_tiny",  # shifted windows
    "swin_v2_tiny",  # parameters that meet no example by themselves
    "attention_cross",  # slices of one weight and of its bias
    "einsum_attention",
    "experts",  # groups
    "lstm_cell",
    "transformer_decoder_batch_second",
    "lstm",  # both directions
    "gpt2_classifier",  # stored transposed, padding
    "llama_lm",
)


@pytest.mark.parametrize("name", BRUTE_FORCE)
def test_blocks_agree_with_brute_force(name: str) -> None:
    """Every layer: V V^T is sum_n J_n^T H_n J_n, with J by one backward pass an output."""
    architecture = ARCHITECTURES[name]
    model, inputs, targets = in_float64(architecture.build(2))
    loss = LOSSES.get(str(architecture.loss), architecture.loss)
    run = curvscope.analyze(
        model,
        (inputs, targets),
        loss=architecture.loss,
        example_axes=dict(architecture.example_axes),
        fisher="exact",
        dtype="float64",
        dump=("columns",),
    )
    with Widened():
        output = eager(model, inputs)
    H = torch.autograd.functional.hessian(
        lambda flat: loss(flat.reshape(output.shape), targets), output.detach().flatten()
    )
    J = output_jacobians(model, output)
    owned: dict[str, list[str]] = {}
    exact_only = set()
    for row in run.tables["coverage"]:
        if row.treatment in ANALYZED:
            owned.setdefault(row.layer, []).append(row.parameter)
        if row.treatment == "exact_only":
            exact_only.add(row.layer)
    assert set(owned) == set(run.layers)
    for layer, names in owned.items():
        record = run.layers[layer].row
        V = torch.from_numpy(np.asarray(run.layers[layer].columns())).double()
        M = layer_jacobian(model, record, names, J, layer in exact_only)
        if M is None:  # another order of the same numbers has the same spectrum
            M = torch.cat([J[key].flatten(1) for key in names], dim=1)
            got, want = (torch.linalg.eigvalsh(G) for G in (V.flatten(1).T @ V.flatten(1), M.T @ H @ M))
            assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max()), layer
            continue
        V = V.reshape(record.columns, record.groups, -1)
        for group in range(record.groups):
            want = M[:, group].T @ H @ M[:, group]
            got = V[:, group].T @ V[:, group]
            assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max()), (layer, group)
