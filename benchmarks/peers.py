"""The peer: curvlinops' K-FAC operator, its expand run and its reduce run, and a check that its factors are right.

`KFACLinearOperator` computes nothing when it is made without its determinism check; `compute_kronecker_factors` is
what its first product would call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.floor import activation_only
from benchmarks.workloads import Workload

FLAVOURS = ("expand", "reduce")
SEED = 2147483647

Factors = dict[str, tuple[Tensor, Tensor]]


def curvlinops_factors(workload: Workload) -> dict[str, Factors]:
    """A and B of every layer in both flavours, from two runs, the bias joined to the weight.

    The shapes of the data are given, so that it is not traversed to find them.
    """
    from curvlinops import KFACLinearOperator

    parameters = [p for module in workload.layers().values() for p in module.parameters()]
    factors: dict[str, Factors] = {}
    for flavour in FLAVOURS:
        operator = KFACLinearOperator(
            workload.model,
            nn.CrossEntropyLoss(),
            parameters,
            [(workload.inputs, workload.targets)],
            check_deterministic=False,
            seed=SEED,
            fisher_type="mc" if workload.fisher == "mc" else "type-2",
            mc_samples=1,
            kfac_approx=flavour,
            num_per_example_loss_terms=workload.targets.numel() // workload.examples,
            separate_weight_and_bias=False,
            num_data=workload.examples,
        )
        operator.compute_kronecker_factors()
        factors[flavour] = {
            name: (operator._input_covariances[name], operator._gradient_covariances[name])
            for name in workload.layers()
        }
    return factors


def root_columns(workload: Workload, logits: Tensor) -> list[Tensor]:
    """Columns of a root of the loss Hessian, each of the logits' shape, in the scale of the mean.

    Exact: all C columns of `diag(sqrt p) - p sqrt(p)^T` over sqrt(N). mc: the labels that the peer draws.
    """
    if workload.fisher == "mc":
        flat = logits.transpose(1, -1).flatten(0, -2) if logits.ndim > 2 else logits
        generator = torch.Generator(device=logits.device).manual_seed(SEED)
        labels = flat.softmax(1).multinomial(1, generator=generator).squeeze(1)
        residual = (flat.softmax(1) - F.one_hot(labels, flat.shape[1])) / len(flat) ** 0.5
        return [residual.unflatten(0, (logits.shape[0], -1)).transpose(1, 2)]
    p = logits.softmax(1)
    root = (torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)) / workload.examples**0.5
    return list(root.unbind(2))


@dataclass(frozen=True)
class Rows:
    """A layer's inputs and output gradients as rows: [N, R, d_in(+1)] and [N, R, d_out] a column."""

    inputs: Tensor
    gradients: list[Tensor]


def naive_rows(workload: Workload) -> dict[str, Rows]:
    """Every layer's rows, kept in full: one forward pass and one backward pass a column."""
    layers = workload.layers()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i[0].detach(), o)))
        for name, module in layers.items()
    ]
    try:
        with activation_only(workload):
            logits = workload.model(workload.inputs)
            outputs = [output for _, output in seen.values()]
            # A batch is not mixed, so one pass a column serves all examples.
            passes = [
                torch.autograd.grad(logits, outputs, column, retain_graph=True)
                for column in root_columns(workload, logits.detach())
            ]
    finally:
        for handle in handles:
            handle.remove()
    rows = {}
    for index, (name, module) in enumerate(layers.items()):
        x = seen[name][0]
        gradients = [gradient[index] for gradient in passes]
        if isinstance(module, nn.Conv2d):
            patches = F.unfold(x, module.kernel_size, padding=cast(Any, module.padding), stride=module.stride)
            x = patches.transpose(1, 2)
            gradients = [g.flatten(2).transpose(1, 2) for g in gradients]
        if x.ndim == 2:
            x, gradients = x.unsqueeze(1), [g.unsqueeze(1) for g in gradients]
        if module.bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
        rows[name] = Rows(x, gradients)
    return rows


def naive_factors(workload: Workload) -> dict[str, Factors]:
    """The factors straight from their definitions, in float64 arithmetic on float32 rows."""
    factors: dict[str, Factors] = {flavour: {} for flavour in FLAVOURS}
    for name, rows in naive_rows(workload).items():
        a, g = rows.inputs.double(), torch.stack(rows.gradients).double()
        flat_a, flat_g = a.flatten(0, 1), g.flatten(0, 2)
        mean_a, sum_g = a.mean(1), g.sum(2).flatten(0, 1)
        factors["expand"][name] = (flat_a.T @ flat_a / len(flat_a), flat_g.T @ flat_g)
        factors["reduce"][name] = (mean_a.T @ mean_a / len(mean_a), sum_g.T @ sum_g)
    return factors


def worst_difference(factors: dict[str, Factors], reference: dict[str, Factors]) -> dict[str, float]:
    """The largest relative Frobenius difference of `kron(B, A)` over layers, for each flavour.

    From inner products of the factors: `<kron(B, A), kron(B', A')> = <B, B'> <A, A'>`, which loses half the
    digits, hence nothing below 1e-7 is told apart from zero. Layers whose reference is zero to rounding, as the
    reduce factors of key rows are, stand in the comparison with the scale of the larger of the two.
    """
    worst = dict.fromkeys(FLAVOURS, 0.0)
    for flavour in FLAVOURS:
        for name, (A, B) in reference[flavour].items():
            a, b = (factor.double() for factor in factors[flavour][name])
            A, B = A.double(), B.double()
            difference = (a - A).norm() * B.norm() + a.norm() * (b - B).norm()
            scale = max(float(A.norm() * B.norm()), float(a.norm() * b.norm()))
            worst[flavour] = max(worst[flavour], float(difference) / scale)
    return worst
