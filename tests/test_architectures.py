"""Every architecture of the table: it runs, its graph is the model, and every parameter is covered or explained."""

from __future__ import annotations

import math
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import curvscope
from curvscope.graph import prepare
from curvscope.graph.export import Exported, export_model
from curvscope.graph.functional import Graph, build
from curvscope.run import Run
from tests.architectures import ARCHITECTURES, BilinearHead, CellLoop, EinsumAttention, Experts
from tests.brute_force import ANALYZED, as_inputs, deviations, eager, exact_run, in_float64
from tests.families import FAMILIES, TESTED

# It warns of a slower implementation, once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

# Taken apart for the graph (recurrent steps, products with more axes), in another order of additions.
REORDERED = (nn.RNNBase, CellLoop, BilinearHead, EinsumAttention, Experts)


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


# Most of their time goes into factors that one example has as well as two.
WIDE = ("resnet18", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "swin_tiny", "swin_v2_tiny")
BOTH = [
    pytest.param(name, examples, id=f"{name}-{examples}")
    for name in ARCHITECTURES
    for examples in ((2,) if name in WIDE else (1, 2))
]


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


# Their rows are positions, the same for every example: an exact block, no factors.
WITHOUT_EXAMPLES: dict[str, tuple[str, ...]] = {"swin_v2_tiny": ("cpb_mlp.0", "cpb_mlp.2")}
LINEAR = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
# Tables of positions, and of anything else that does not come from the batch.
TABLES = ("wpe", "position_embeddings", "relative_attention_bias")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_modules_have_factors(name: str) -> None:
    model, _, _ = ARCHITECTURES[name].build(2)
    run = run_of(name, 2)
    rows = {row.parameter: row for row in run.tables["coverage"]}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, LINEAR) and type(module).__name__ != "Conv1D":
            continue
        # a tied weight goes by the name of its first owner
        row = rows[names[id(module.weight)]]
        positions = path.endswith((*TABLES, *WITHOUT_EXAMPLES.get(name, ())))
        assert row.treatment == ("exact_only" if positions else "kronecker"), row


@pytest.mark.parametrize("name", ARCHITECTURES)
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
    "gpt2_lm",  # its table is its head
    "t5",  # and is looked up by the encoder and the decoder
)


@pytest.mark.parametrize("name", [*BRUTE_FORCE, *TESTED])
def test_blocks_agree_with_brute_force(name: str) -> None:
    """Every layer: V V^T is sum_n J_n^T H_n J_n, with J by one backward pass an output."""
    architecture = (ARCHITECTURES | FAMILIES)[name]
    built = in_float64(architecture.build(2))
    run = exact_run(architecture, built)
    assert {row.treatment for row in run.tables["coverage"]} <= ANALYZED
    for layer, deviation in deviations(architecture, run, built).items():
        assert deviation <= 1e-9, layer
