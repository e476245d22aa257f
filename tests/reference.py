"""The oracle: every quantity of a layer by naive float64 autograd, one output at a time.

It imports nothing from curvscope and shares no method with it: no graph, no BackPACK, no roots of the loss
Hessian. Shapes are [N, R, d] for rows, [N, D, ...] for outputs flattened to D numbers an example, and vec is
row-major over [d_out, d_in(+1)] with the bias last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
LossFunction = Callable[[Tensor, Any], Tensor]
ToRows = Callable[[Tensor], Tensor]

# Where the input and the weight stand among the arguments of each operation that can apply a weight.
INPUT_AND_WEIGHT = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "mm": (0, 1),
    "addmm": (1, 2),
    "conv1d": (0, 1),
    "conv2d": (0, 1),
    "conv3d": (0, 1),
}


def call(model: nn.Module, inputs: Inputs, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's output tensor, with some of its parameters replaced: the first of a tuple, or `logits`."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    result = torch.func.functional_call(model, dict(parameters or {}), args, kwargs)
    if isinstance(result, Mapping):
        return result["logits"]
    return result[0] if isinstance(result, tuple) else result


def examples_first(rows: Tensor) -> Tensor:
    """[N, ..., d] -> [N, R, d]."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


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
    G = sum(
        (J_n.T @ H_n @ J_n for J_n, H_n in zip(J, H, strict=True)), torch.zeros(J.shape[2], J.shape[2]).to(J)
    )
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


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """What a convolution sees at every output position: [N, C, *size] -> [N, positions, C * prod(kernel)]."""
    x = functional.pad(x, [side for pair in reversed(padding) for side in pair])
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    starts = [range(0, n - r + 1, s) for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    rows = []
    for corner in product(*starts):
        window = x
        for axis, (i, r, d) in enumerate(zip(corner, reach, dilation, strict=True), start=2):
            window = window.index_select(axis, torch.arange(i, i + r, d))
        rows.append(window.flatten(1))
    return torch.stack(rows, dim=1)


@dataclass(frozen=True)
class Use:
    """One application of a weight: its input rows and its output, with the function that makes rows of it."""

    input_rows: Tensor
    output: Tensor
    output_rows: ToRows


def _convolution_use(
    x: Tensor, weight: Tensor, output: Tensor, settings: dict[str, Any], to_rows: ToRows
) -> Use:
    if settings["groups"] != 1:
        raise NotImplementedError("grouped convolutions")
    dims, kernel = weight.dim() - 2, tuple(weight.shape[2:])

    def per_dimension(value: int | tuple[int, ...]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    dilation = per_dimension(settings["dilation"])
    padding: tuple[tuple[int, int], ...]
    if settings["padding"] == "valid":
        padding = ((0, 0),) * dims
    elif settings["padding"] == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((p, p) for p in per_dimension(settings["padding"]))
    rows = patches(x.detach(), kernel, per_dimension(settings["stride"]), padding, dilation)
    return Use(to_rows(rows), output, lambda s: to_rows(s.flatten(2).mT))


class _Recorder(TorchFunctionMode):
    """Keeps every use of one parameter while a model runs."""

    def __init__(self, parameter: nn.Parameter, to_rows: ToRows) -> None:
        super().__init__()
        self.parameter = parameter
        self.to_rows = to_rows
        self.uses: list[Use] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            # Inside a Python-level function the mode is off; switch it on again for the projections.
            with self, mock.patch.object(functional, "has_torch_function", return_value=False):
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in INPUT_AND_WEIGHT:
            return output
        x, weight = (args[i] for i in INPUT_AND_WEIGHT[name])
        if weight is not self.parameter and weight._base is not self.parameter:
            return output
        if name.startswith("conv"):
            defaults = (None, None, None, 1, 0, 1, 1)
            order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            settings = dict(zip(order, args + defaults[len(args) :], strict=True)) | kwargs
            self.uses.append(_convolution_use(x, weight, output, settings, self.to_rows))
        else:
            self.uses.append(Use(self.to_rows(x.detach().clone()), output, self.to_rows))
        # What follows may work in place on the layer's output: it gets a copy.
        return output.clone()


@dataclass(frozen=True)
class LayerIO:
    """What goes into a layer and how the outputs depend on what comes out of it.

    a: [N, R, d_in(+1)], a constant 1 last where the layer has a bias; jacobian: d f[n, j] / d s[n, r, o] as
    [N, D, R, d_out]. Several uses of the weight are further positions.
    """

    a: Tensor
    jacobian: Tensor


def layer_io(
    model: nn.Module,
    inputs: Inputs,
    weight_name: str,
    bias_name: str | None = None,
    to_rows: ToRows = examples_first,
) -> LayerIO:
    """Rows and output Jacobians of one layer.

    `to_rows` maps a tensor laid out as the layer's input or output (for convolutions [batch, positions,
    d]) to [N, R, d]. Raises ValueError if by that layout an example depends on the rows of another.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    recorder = _Recorder(dict(model.named_parameters())[weight_name], to_rows)
    with recorder:
        outputs = call(model, inputs)
    if not recorder.uses:
        raise ValueError(f"the model applies {weight_name} by no operation that the oracle knows")
    flat = outputs.reshape(outputs.shape[0], -1)
    N, D = flat.shape
    jacobian = []
    for n, j in product(range(N), range(D)):
        gradients = torch.autograd.grad(
            flat[n, j], [use.output for use in recorder.uses], retain_graph=True, materialize_grads=True
        )
        rows = [use.output_rows(g) for use, g in zip(recorder.uses, gradients, strict=True)]
        jacobian.append(torch.cat(rows, dim=1))
    everything = torch.stack(jacobian).reshape(N, D, *jacobian[0].shape)
    own = torch.stack([everything[n, :, n] for n in range(N)])
    foreign = everything.clone()
    for n in range(N):
        foreign[n, :, n] = 0
    if foreign.abs().max() > 1e-12 * own.abs().max():
        raise ValueError(f"{weight_name}: an example's outputs depend on rows of another example")
    a = torch.cat([use.input_rows for use in recorder.uses], dim=1)
    if bias_name is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=2)
    return LayerIO(a, own)


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
