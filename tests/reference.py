"""The oracle: every quantity of a layer by naive float64 autograd, one output at a time.

It imports nothing from curvscope and shares no method with it: no graph, no BackPACK, no roots of the loss
Hessian. Shapes are [N, R, d] for rows, [N, D, ...] for outputs flattened to D numbers an example, and vec is
row-major over [d_out, d_in(+1)] with the bias last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.rows import Inputs, LayerIO, ToRows, call, examples_first, layer_io

__all__ = [
    "LayerIO",
    "LayerReference",
    "LossFunction",
    "approximations",
    "call",
    "columns_block",
    "cross_entropy_hessian",
    "ekfac",
    "ekfac_is_unique",
    "errors",
    "factors",
    "gradient",
    "kron_best",
    "layer_io",
    "layer_reference",
    "output_hessian",
    "parameter_block",
    "parameter_jacobians",
    "spectrum_numbers",
]

LossFunction = Callable[[Tensor, Any], Tensor]


def output_hessian(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """H_n = d^2 L / d f_n^2 as [N, D, D]; refuses a loss that couples examples."""
    outputs = outputs.detach()
    N, D = outputs.shape[0], outputs[0].numel()

    def loss_of_flat(flat: Tensor) -> Tensor:
        return loss_fn(flat.reshape(outputs.shape), targets)

    # Double backward: the forward mode of torch.func.hessian warns of deprecated scripting.
    full = torch.autograd.functional.hessian(loss_of_flat, outputs.reshape(-1)).reshape(N, D, N, D)
    blocks = torch.stack([full[n, :, n, :] for n in range(N)])
    coupling = full.clone()
    for n in range(N):
        coupling[n, :, n, :] = 0
    if coupling.abs().max() > 1e-12 * full.abs().max():
        raise ValueError("the loss is not a sum over examples: cross-example Hessian blocks do not vanish")
    return (blocks + blocks.mT) / 2


def cross_entropy_hessian(logits: Tensor, term_weights: Tensor) -> Tensor:
    """[N, C, C] for logits [N, C] in closed form, every entry to full relative accuracy.

    Autograd forms the diagonal as p - p^2, which is rounding noise once softmax saturates; here it is
    p_i times the sum of the other p_j.
    """
    p = torch.softmax(logits.detach(), dim=1)
    H = -p[:, :, None] * p[:, None, :]
    others = torch.stack([torch.cat([p[:, :i], p[:, i + 1 :]], 1).sum(1) for i in range(p.shape[1])], 1)
    H[:, range(p.shape[1]), range(p.shape[1])] = p * others
    return term_weights[:, None, None] * H


def _matrix(weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Weight [..., d_out, (d_in or C_in, kernel...)] and bias [..., d_out] as [..., d_out, d_in(+1)]."""
    matrix = weight.mT if transposed else weight
    return matrix if bias is None else torch.cat([matrix, bias.unsqueeze(-1)], dim=-1)


def parameter_jacobians(
    model: nn.Module,
    inputs: Inputs,
    weight_name: str,
    bias_name: str | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Jacobians of all outputs with respect to one layer's parameters, [N, D, d_out, d_in(+1)]."""
    names = [weight_name] if bias_name is None else [weight_name, bias_name]
    model = copy.deepcopy(model).requires_grad_(False)
    parameters = dict(model.named_parameters())

    def outputs(*values: Tensor) -> Tensor:
        result = call(model, inputs, dict(zip(names, values, strict=True)))
        return result.reshape(result.shape[0], -1)

    # chunk_size=1 runs one backward pass an output: no vmap, whose fallbacks warn for some operations.
    jacobian = torch.func.jacrev(outputs, argnums=tuple(range(len(names))), chunk_size=1)
    results = jacobian(*(parameters[name] for name in names))
    weight, bias = results[0], results[1] if bias_name is not None else None
    return _matrix(weight.flatten(3), bias, transposed)


def parameter_block(
    model: nn.Module,
    inputs: Inputs,
    targets: Any,
    loss_fn: LossFunction,
    weight_name: str,
    bias_name: str | None = None,
    *,
    transposed: bool = False,
    H: Tensor | None = None,
) -> Tensor:
    """The exact GGN block sum_n J_n^T H_n J_n, [P, P]; H [N, D, D] replaces the loss Hessian where given."""
    if H is None:
        H = output_hessian(loss_fn, call(model, inputs), targets)
    J = parameter_jacobians(model, inputs, weight_name, bias_name, transposed=transposed).flatten(2)
    G = sum((J_n.T @ H_n @ J_n for J_n, H_n in zip(J, H, strict=True)), torch.zeros(J.shape[2], J.shape[2]).to(J))
    return (G + G.T) / 2


def gradient(
    model: nn.Module,
    inputs: Inputs,
    targets: Any,
    loss_fn: LossFunction,
    weight_name: str,
    bias_name: str | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """The gradient of L with respect to one layer, [d_out, d_in(+1)]."""
    model = copy.deepcopy(model).requires_grad_(True)
    names = [weight_name] if bias_name is None else [weight_name, bias_name]
    parameters = [dict(model.named_parameters())[name] for name in names]
    results = torch.autograd.grad(loss_fn(call(model, inputs), targets), parameters)
    return _matrix(results[0].flatten(1), results[1] if bias_name is not None else None, transposed)


def columns_block(io: LayerIO, H: Tensor) -> Tensor:
    """The exact block once more: sum_n M_n^T H_n M_n with M_n = sum_r J[n,:,r] a[n,r]^T."""
    M = torch.einsum("njro,nri->njoi", io.jacobian, io.a).flatten(2)
    return torch.einsum("njp,njk,nkq->pq", M, H, M)


def factors(io: LayerIO, H: Tensor, row_mask: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of both flavours; `row_mask` [N, R] is False at padded rows, which then count nowhere.

    expand: A = sum_{n,r} a a^T / sum_n R_n, B = sum_{n,r} J[n,r]^T H_n J[n,r];
    reduce: A = (1/N) sum_n abar abar^T, B = sum_n Jsum_n^T H_n Jsum_n, with the mean of a and
    the sum of J over real rows.
    """
    N, R, _ = io.a.shape
    mask = torch.ones(N, R, dtype=torch.bool) if row_mask is None else row_mask
    A_expand, A_reduce = (torch.zeros(io.a.shape[2], io.a.shape[2]).to(io.a) for _ in range(2))
    B_expand, B_reduce = (torch.zeros(io.jacobian.shape[3], io.jacobian.shape[3]).to(io.a) for _ in range(2))
    for n in range(N):
        real = mask[n]
        for r in real.nonzero().flatten().tolist():
            A_expand += torch.outer(io.a[n, r], io.a[n, r])
            B_expand += io.jacobian[n, :, r].T @ H[n] @ io.jacobian[n, :, r]
        mean_input = io.a[n, real].mean(0)
        summed = io.jacobian[n][:, real].sum(1)
        A_reduce += torch.outer(mean_input, mean_input) / N
        B_reduce += summed.T @ H[n] @ summed
    return {"expand": (A_expand / mask.sum(), B_expand), "reduce": (A_reduce, B_reduce)}


def ekfac(G: Tensor, U_A: Tensor, U_B: Tensor) -> Tensor:
    """G with everything off the diagonal of the basis kron(U_B, U_A) dropped."""
    U = torch.kron(U_B, U_A)
    return U @ torch.diag(torch.diag(U.T @ G @ U)) @ U.T


def kron_best(G: Tensor, d_out: int, d_in: int) -> Tensor:
    """The nearest Kronecker product of [d_out, d_out] with [d_in, d_in] (Van Loan, Pitsianis 1993)."""
    rearranged = G.reshape(d_out, d_in, d_out, d_in).permute(0, 2, 1, 3).reshape(d_out**2, d_in**2)
    U, S, Vh = torch.linalg.svd(rearranged, full_matrices=False)
    return torch.kron((S[0] * U[:, 0]).reshape(d_out, d_out), Vh[0].reshape(d_in, d_in))


def approximations(
    G: Tensor, A_expand: Tensor, B_expand: Tensor, A_reduce: Tensor, B_reduce: Tensor
) -> dict[str, Tensor]:
    """All six approximations of G as dense [P, P] matrices."""

    def eigenbasis(M: Tensor) -> Tensor:
        return torch.linalg.eigh(M).eigenvectors

    return {
        "kfac_expand": torch.kron(B_expand, A_expand),
        "kfac_reduce": torch.kron(B_reduce, A_reduce),
        "ekfac_expand": ekfac(G, eigenbasis(A_expand), eigenbasis(B_expand)),
        "ekfac_reduce": ekfac(G, eigenbasis(A_reduce), eigenbasis(B_reduce)),
        "kron_best": kron_best(G, B_expand.shape[0], A_expand.shape[0]),
        "diag": torch.diag(torch.diag(G)),
    }


def ekfac_is_unique(G: Tensor, A: Tensor, B: Tensor) -> bool:
    """False where repeated eigenvalues of A or B leave a choice of basis that changes EKFAC."""
    generator = torch.Generator().manual_seed(0)

    def basis_and_rotated(M: Tensor) -> tuple[Tensor, Tensor]:
        eigenvalues, U = torch.linalg.eigh(M)
        rotated, start = U.clone(), 0
        scale = eigenvalues.abs().max()
        for end in range(1, len(eigenvalues) + 1):
            if end == len(eigenvalues) or eigenvalues[end] - eigenvalues[end - 1] > 1e-7 * scale:
                noise = torch.randn(end - start, end - start, generator=generator, dtype=M.dtype)
                rotated[:, start:end] = U[:, start:end] @ torch.linalg.qr(noise).Q
                start = end
        return U, rotated

    (U_A, rotated_A), (U_B, rotated_B) = basis_and_rotated(A), basis_and_rotated(B)
    change = ekfac(G, U_A, U_B) - ekfac(G, rotated_A, rotated_B)
    return bool(change.norm() <= 1e-10 * G.norm())


def errors(G: Tensor, M: Tensor) -> dict[str, float]:
    """rel_frobenius, cosine, trace_ratio and rel_spectral of an approximation M of G, from dense matrices."""
    return {
        "rel_frobenius": float((G - M).norm() / G.norm()),
        "cosine": float((G * M).sum() / (G.norm() * M.norm())),
        "trace_ratio": float(M.trace() / G.trace()),
        "rel_spectral": float(torch.linalg.matrix_norm(G - M, 2) / torch.linalg.matrix_norm(G, 2)),
    }


def spectrum_numbers(eigenvalues: Tensor, size: int) -> dict[str, float]:
    """The derived numbers of a spectrum; positive is what exceeds lambda_max * size * eps(float64).

    `size` is the larger of P and the number of GGN columns; what a zero matrix has not is NaN.
    """
    lambda_max = eigenvalues.max()
    positive = eigenvalues[eigenvalues > lambda_max * size * torch.finfo(torch.float64).eps]
    if not len(positive):
        nan = float("nan")
        undefined = dict.fromkeys(("lambda_min_positive", "condition", "stable_rank", "effective_rank"), nan)
        return {"trace": float(eigenvalues.sum()), "lambda_max": float(lambda_max)} | undefined
    shares = positive / positive.sum()
    return {
        "trace": float(eigenvalues.sum()),
        "lambda_max": float(lambda_max),
        "lambda_min_positive": float(positive.min()),
        "condition": float(lambda_max / positive.min()),
        "stable_rank": float(eigenvalues.square().sum() / lambda_max**2),
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
    }


@dataclass(frozen=True)
class LayerReference:
    """Everything the oracle knows of one layer."""

    io: LayerIO
    H: Tensor
    G: Tensor
    gradient: Tensor
    factors: dict[str, tuple[Tensor, Tensor]]
    approximations: dict[str, Tensor]
    errors: dict[str, dict[str, float]]

    def spectrum(self, name: str) -> Tensor:
        """All eigenvalues, descending, of the block ("ggn") or of an approximation."""
        matrix = self.G if name == "ggn" else self.approximations[name]
        return torch.linalg.eigvalsh(matrix).flip(0)


def layer_reference(
    model: nn.Module,
    inputs: Inputs,
    targets: Any,
    loss_fn: LossFunction,
    weight_name: str,
    bias_name: str | None = None,
    *,
    to_rows: ToRows = examples_first,
    transposed: bool = False,
    row_mask: Tensor | None = None,
    H: Tensor | None = None,
) -> LayerReference:
    """All of the above for one layer."""
    if H is None:
        H = output_hessian(loss_fn, call(model, inputs), targets)
    io = layer_io(model, inputs, weight_name, bias_name, to_rows)
    G = parameter_block(model, inputs, targets, loss_fn, weight_name, bias_name, transposed=transposed, H=H)
    both = factors(io, H, row_mask)
    dense = approximations(G, *both["expand"], *both["reduce"])
    return LayerReference(
        io=io,
        H=H,
        G=G,
        gradient=gradient(model, inputs, targets, loss_fn, weight_name, bias_name, transposed=transposed),
        factors=both,
        approximations=dense,
        errors={name: errors(G, M) for name, M in dense.items()},
    )
