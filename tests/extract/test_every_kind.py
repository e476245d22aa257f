"""Every kind of layer under every form of loss: factors, exact block and gradient against float64 autograd, to 1e-9.

One network holds many kinds, and each is exported once; then every loss is taken on its outputs [N, T, C]. The oracle
takes one backward pass for every single output, so that losses differ in their Hessian only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.extract import ready
from curvscope.extract.collector import Columns, Extract
from curvscope.extract.sweep import no_progress
from curvscope.graph.prepare import Prepared, prepare
from curvscope.load import load_problem
from curvscope.load.loss import load_loss, named_loss
from curvscope.measure.series import kept_bytes
from curvscope.settings import Settings
from tests import reference
from tests.case_parts import CausalLM, ClassesLast
from tests.kinds import CLASSES, EXAMPLES, KINDS, TOKENS, WIDTH, WORDS, Call, Network, Weight

TOLERANCE = 1e-9
CPU, DTYPE = torch.device("cpu"), torch.float64
# Networks in which what comes after the last term of an example is padding.
CAUSAL = ("tokens", "recurrent")
SETTINGS = Settings(fisher="exact", device="cpu", dtype="float64", memory_bytes=2**30)
DRAWN = torch.Generator().manual_seed(5)
OF_CLASSES = torch.tensor([0.5, 2.0, 1.3], dtype=DTYPE)
OF_TOKENS = torch.tensor([0.5, 2.0, 1.3, 0.9], dtype=DTYPE)
LAST = torch.randint(CLASSES, (EXAMPLES, TOKENS), generator=DRAWN)
SECOND = torch.randint(TOKENS, (EXAMPLES, CLASSES), generator=DRAWN)
NUMBERS = torch.randn(EXAMPLES, TOKENS, CLASSES, generator=DRAWN, dtype=DTYPE)
LENGTHS = torch.arange(TOKENS) < torch.tensor([4, 2, 3])[:, None]
UNEQUAL = LAST.where(LENGTHS, -100)


def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    """Convex, and couples all outputs of an example."""
    gap = (outputs - targets).flatten(1)
    return (gap.cosh().log().sum(1) + 0.1 * gap.sum(1) ** 2).sum()


def coupled_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return coupled(outputs, targets) / len(outputs)


@dataclass(frozen=True)
class Form:
    """A form of loss: as curvscope is given it, as torch has it, the targets, and K."""

    given: Any
    fn: Callable[[Tensor, Any], Tensor]
    targets: Tensor
    columns: int


def entropy(given: Any, fn: type, targets: Tensor, columns: int, **settings: Any) -> Form:
    return Form((given, settings), fn(**{k: v for k, v in settings.items() if k != "class_axis"}), targets, columns)


LAST_K, SECOND_K = TOKENS * (CLASSES - 1), CLASSES * (TOKENS - 1)
FORMS: dict[str, Form] = {
    "last": entropy("cross_entropy", ClassesLast, LAST, LAST_K),
    "last, sum": entropy("cross_entropy", ClassesLast, LAST, LAST_K, reduction="sum"),
    "second": entropy("cross_entropy", torch.nn.CrossEntropyLoss, SECOND, SECOND_K),
    "second, sum": entropy("cross_entropy", torch.nn.CrossEntropyLoss, SECOND, SECOND_K, reduction="sum"),
    "unequal lengths": entropy("cross_entropy", ClassesLast, UNEQUAL, LAST_K),
    "unequal lengths, sum": entropy("cross_entropy", ClassesLast, UNEQUAL, LAST_K, reduction="sum"),
    "ignore_index": entropy("cross_entropy", ClassesLast, LAST, LAST_K - CLASSES + 1, ignore_index=1),
    "ignore_index, second, sum": entropy(
        "cross_entropy", torch.nn.CrossEntropyLoss, SECOND, SECOND_K, ignore_index=2, reduction="sum"
    ),
    "weights": entropy("cross_entropy", ClassesLast, UNEQUAL, LAST_K, weight=OF_CLASSES),
    "weights, second, sum": entropy(
        "cross_entropy", torch.nn.CrossEntropyLoss, SECOND, SECOND_K, weight=OF_TOKENS, reduction="sum"
    ),
    "smoothing": entropy("cross_entropy", ClassesLast, UNEQUAL, LAST_K, label_smoothing=0.1),
    "smoothing, weights, second": entropy(
        "cross_entropy", torch.nn.CrossEntropyLoss, SECOND, SECOND_K, label_smoothing=0.2, weight=OF_TOKENS
    ),
    "smoothing, sum": entropy("cross_entropy", ClassesLast, LAST, LAST_K, label_smoothing=0.1, reduction="sum"),
    "probabilities": entropy("cross_entropy", ClassesLast, NUMBERS.softmax(-1), LAST_K, weight=OF_CLASSES),
    "probabilities, second, sum": entropy(
        "cross_entropy", torch.nn.CrossEntropyLoss, NUMBERS.softmax(1), SECOND_K, reduction="sum"
    ),
    "causal_lm": entropy("causal_lm", CausalLM, LAST, LAST_K - CLASSES + 1),
    "causal_lm, unequal, sum": entropy("causal_lm", CausalLM, UNEQUAL, LAST_K - CLASSES + 1, reduction="sum"),
    "mse": entropy("mse", torch.nn.MSELoss, NUMBERS, TOKENS * CLASSES),
    "mse, sum": entropy("mse", torch.nn.MSELoss, NUMBERS, TOKENS * CLASSES, reduction="sum"),
    "bce": entropy(
        "bce_with_logits", torch.nn.BCEWithLogitsLoss, NUMBERS.sigmoid(), TOKENS * CLASSES, pos_weight=OF_CLASSES
    ),
    "bce, sum": entropy(
        "bce_with_logits",
        torch.nn.BCEWithLogitsLoss,
        (NUMBERS > 0).to(DTYPE),
        TOKENS * CLASSES,
        weight=OF_CLASSES,
        reduction="sum",
    ),
    "callable": Form(coupled_mean, coupled_mean, NUMBERS, TOKENS * CLASSES),
    "callable, sum": Form(coupled, coupled, NUMBERS, TOKENS * CLASSES),
}
PAIRS = [(network, form) for network in KINDS for form in FORMS]


@cache
def problem(name: str) -> tuple[Network, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Network(KINDS[name], causal=name in CAUSAL).double().eval()
        ids = torch.randint(WORDS - 1, (EXAMPLES, TOKENS))  # one word never occurs
        return network, torch.randn(EXAMPLES, TOKENS, WIDTH, dtype=DTYPE), ids


@cache
def exported(name: str) -> Prepared:
    network, x, ids = problem(name)
    found = prepare(load_problem(network, ((x, ids), NUMBERS), "mse"), SETTINGS, CPU, DTYPE)
    assert not found.notes, found.notes
    return found


@cache
def extracts(name: str, form: str) -> dict[str, Extract]:
    """What the passes find of every layer, by its weight (or by its first member, without a Kronecker form)."""
    network, x, ids = problem(name)
    given, loss = FORMS[form].given, FORMS[form]
    asked = named_loss(*given) if isinstance(given, tuple) else load_loss(given)
    whole = load_problem(network, ((x, ids), loss.targets), asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready, "prepare", lambda *_: exported(name))
        found = ready.get_ready(whole, SETTINGS, CPU, no_progress, {}, kept_bytes)
    assert not found.passes.shared
    assert found.passes.columns == loss.columns
    forms = {key: layer.form for key, layer in found.plan.layers.items()}
    swept = found.passes.sweep(forms, first=True)
    specs = [each.spec for each in swept.values()]
    keys = [next(iter(spec.members)) if spec.exact_only else spec.weight for spec in specs]
    return dict(zip(keys, swept.values(), strict=True))


@dataclass(frozen=True)
class Naive:
    """Of one network: outputs [N, T, C], and derivatives of every single output.

    jacobians: parameter -> [N, D, *shape]; calls: weight -> each call with d f[n, j] / d its output, [N, D, R, d_out].
    """

    outputs: Tensor
    jacobians: Mapping[str, Tensor]
    calls: Mapping[str, list[tuple[Call, Tensor]]]


@cache
def naive(name: str) -> Naive:
    network, x, ids = problem(name)
    network = network.requires_grad_(True)
    output, calls = network.told(x, ids)
    flat = output.flatten()
    parameters = dict(network.named_parameters())
    noted = [(weight, call) for weight, each in calls.items() for call in each]
    watched = [*parameters.values(), *(call.output for _, call in noted)]
    found = torch.autograd.grad(
        flat, watched, torch.eye(len(flat), dtype=DTYPE), is_grads_batched=True, materialize_grads=True
    )
    D = TOKENS * CLASSES
    jacobians = {key: J.unflatten(0, (EXAMPLES, D)) for key, J in zip(parameters, found, strict=False)}
    of_calls: dict[str, list[tuple[Call, Tensor]]] = {}
    for (weight, call), J in zip(noted, found[len(parameters) :], strict=True):
        rows = torch.stack([call.output_rows(each) for each in J]).unflatten(0, (EXAMPLES, D))  # [N, D, N, R, d_out]
        own = torch.stack([rows[n, :, n] for n in range(EXAMPLES)])
        assert float(rows.abs().sum()) == pytest.approx(float(own.abs().sum()))  # no example sees another
        of_calls.setdefault(weight, []).append((call, own))
    return Naive(output.detach(), jacobians, of_calls)


@cache
def hessian(name: str, form: str) -> Tensor:
    return reference.output_hessian(FORMS[form].fn, naive(name).outputs, FORMS[form].targets)


@cache
def gradients(name: str, form: str) -> dict[str, Tensor]:
    network, x, ids = problem(name)
    parameters = dict(network.requires_grad_(True).named_parameters())
    found = torch.autograd.grad(FORMS[form].fn(network(x, ids), FORMS[form].targets), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def real_rows(name: str, form: str) -> Tensor | None:
    """Which tokens [N, T] any output with curvature depends on through a layer; None: all."""
    if name not in CAUSAL:
        return None
    counts = hessian(name, form).abs().sum(2) > 0  # [N, D]
    alive = torch.zeros(EXAMPLES, TOKENS, dtype=torch.bool)
    for calls in naive(name).calls.values():
        every = torch.cat([J for _, J in calls], 2).unflatten(2, (-1, TOKENS)).sum(2)  # over calls for all tokens
        alive |= ((every.abs().sum(3) > 0) & counts[:, :, None]).any(1)
    return None if bool((alive == alive[:1]).all()) else alive


def weights_of(name: str) -> dict[str, Weight]:
    return {f"bodies.{body}.{key}": w for body, kind in KINDS[name].items() for key, w in kind.weights.items()}


def close(got: Any, want: Tensor, what: str, scale: float | None = None) -> None:
    scale = float(want.abs().max()) if scale is None else scale
    got = np.asarray(got)
    assert got.shape == tuple(want.shape), (what, got.shape, want.shape)
    worst = float(np.abs(got - want.numpy()).max())
    assert worst <= TOLERANCE * scale, f"{what}: {worst / scale}"


def block_of(columns: Columns | list[Columns] | None, found: Extract) -> Tensor:
    """G, of groups one after the other."""
    assert columns is not None
    if isinstance(columns, list):
        return torch.block_diag(*(block_of(each, found) for each in columns))
    if columns.block is not None:
        return columns.block * found.unit**-2
    d_out = found.spec.d_out // found.spec.groups
    V = torch.cat([v for _, _, v in Block(columns, d_out, found.width).slices()], 1)
    return V.T @ V * found.unit**-2


def as_matrix(weight: Weight, value: Tensor, bias: Tensor | None) -> Tensor:
    """[groups, d_out, d_in(+1)]."""
    matrix = weight.matrix(value)
    matrix = matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)
    return matrix.unflatten(0, (weight.groups, -1))


def jacobian_of(weight: Weight, values: Tensor, biases: Tensor | None) -> Tensor:
    """[N, D, groups, d_out, d_in(+1)] from those of the parameters."""
    each = values.flatten(0, 1)
    of_bias = [None] * len(each) if biases is None else biases.flatten(0, 1)
    matrices = [as_matrix(weight, w, b) for w, b in zip(each, of_bias, strict=True)]
    return torch.stack(matrices).unflatten(0, values.shape[:2])


def naive_block(J: Tensor, H: Tensor) -> Tensor:
    return torch.einsum("njp,njk,nkq->pq", J, H, J)


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_blocks_and_gradients(name: str, form: str) -> None:
    found, H, grads, known = extracts(name, form), hessian(name, form), gradients(name, form), naive(name)
    weights = weights_of(name)
    assert {key for key, each in found.items() if not each.spec.exact_only} == set(weights)
    for key, weight in weights.items():
        got = found[key]
        bias = f"{key.rpartition('.')[0]}.{weight.bias.rpartition('.')[2]}" if weight.bias else ""
        assert got.spec.bias == (bias or None)
        J = jacobian_of(weight, known.jacobians[key], known.jacobians.get(bias))
        gradient = as_matrix(weight, grads[key], grads[bias] if bias else None)
        if got.tokens is not None and not weight.roles:
            J, gradient = J[..., got.tokens], gradient[..., got.tokens]
        G = torch.block_diag(*(naive_block(J[:, :, g].flatten(2), H) for g in range(weight.groups)))
        close(block_of(got.columns, got), G, f"{key} G")
        assert got.gradient is not None
        close(got.gradient, gradient.flatten(0, 1), f"{key} gradient")


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_blocks_without_a_kronecker_form(name: str, form: str) -> None:
    found, H, grads, known = extracts(name, form), hessian(name, form), gradients(name, form), naive(name)
    exact = [each for each in found.values() if each.spec.exact_only]
    members = {member for each in exact for member in each.spec.members}
    assert members == {f"bodies.{body}.{key}" for body, kind in KINDS[name].items() for key in kind.exact}
    for got in exact:
        J = torch.cat([known.jacobians[member].flatten(2) for member in got.spec.members], -1)
        close(block_of(got.columns, got), naive_block(J, H), f"{got.spec.name} G")
        assert got.gradient is not None
        gradient = torch.cat([grads[member].flatten() for member in got.spec.members])
        close(got.gradient.flatten(), gradient, f"{got.spec.name} gradient")


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_factors(name: str, form: str) -> None:
    found, H, known, mask = extracts(name, form), hessian(name, form), naive(name), real_rows(name, form)
    for key, weight in weights_of(name).items():
        for role in weight.roles or ("",):
            got = found[key].roles[role] if role else found[key]
            calls = [pair for pair in known.calls[key] if pair[0].role == role]
            a, J = zip(*(placed(call, J, got) for call, J in calls), strict=True)
            io = reference.LayerIO(torch.cat(a, 1), torch.cat(J, 2))
            rows = None if mask is None else mask.repeat(1, io.a.shape[1] // TOKENS)
            for flavour in ("expand", "reduce"):
                want = [reference.factors(of_group(io, g, got), H, rows)[flavour] for g in range(weight.groups)]
                A, B = (torch.stack(each) if weight.groups > 1 else each[0] for each in zip(*want, strict=True))
                if got.tokens is not None:
                    A = A.diagonal() if flavour == "expand" else A[got.tokens][:, got.tokens]
                close(got.factors[flavour][0], A, f"{key} {role} {flavour} A")
                scale = float(B.abs().max()) if flavour == "expand" else scale
                close(got.factors[flavour][1] * got.unit**-2, B, f"{key} {role} {flavour} B", scale)


def placed(call: Call, J: Tensor, found: Extract) -> tuple[Tensor, Tensor]:
    """Rows and Jacobian of a call over all inputs and outputs of the layer, a constant 1 last with a bias."""
    spec = found.spec
    d_in = spec.d_in * spec.groups
    a = call.rows.new_zeros(*call.rows.shape[:-1], d_in)
    a[..., list(call.into or range(d_in))] = call.rows
    wide = J.new_zeros(*J.shape[:-1], spec.d_out)
    wide[..., list(call.out or range(spec.d_out))] = J
    return a, wide


def of_group(io: reference.LayerIO, group: int, found: Extract) -> reference.LayerIO:
    groups = found.spec.groups
    a, J = (each.unflatten(-1, (groups, -1))[..., group, :] for each in (io.a, io.jacobian))
    if found.spec.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return reference.LayerIO(a, J)
