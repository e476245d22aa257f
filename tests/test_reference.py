"""The oracle itself: against BackPACK, torch's unfold and Hessians, a second route to G, and the theorems."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, DiagGGNExact, SqrtGGNExact
from torch import Tensor, nn
from torch.nn import functional

from tests import reference
from tests.case_parts import Case, conv_case, oracle
from tests.cases import CASE_LAYERS, CASES, DEGENERATE, expected
from tests.rows import patches
from tests.theorems import THEOREMS

# Cases that are nn.Sequential with one row an example (or convolutions), which BackPACK's own rules cover.
BACKPACK_MLP = ["ce_mean", "ce_sum", "ce_two_classes", "mse_mean", "mse_sum", "one_example", "no_bias"]
BACKPACK_CONV = [
    "conv2d",
    "conv2d_stride",
    "conv2d_uneven",
    "conv2d_leftover",
    "conv1d",
    "conv1d_small",
    "conv3d",
]


def close(actual: Tensor, wanted: Tensor, rtol: float = 1e-12) -> bool:
    return actual.shape == wanted.shape and bool((actual - wanted).norm() <= rtol * wanted.norm())


def backpack_parameters(case: Case, extension: Any) -> dict[str, Any]:
    """The parameters of a case after BackPACK's extension has left its result on them."""
    model, inputs, targets = case.build()
    assert isinstance(inputs, Tensor)
    loss = extend(case.loss_fn)(extend(model)(inputs.requires_grad_()), targets)
    with backpack(extension):
        loss.backward()
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", [*BACKPACK_MLP, *BACKPACK_CONV])
def test_block_is_backpacks(name: str) -> None:
    case = CASES[name]
    parameters = backpack_parameters(case, SqrtGGNExact())
    for layer_name, layer in case.layers.items():
        roots = [parameters[layer.weight].sqrt_ggn_exact.flatten(3)]
        if layer.bias is not None:
            roots.append(parameters[layer.bias].sqrt_ggn_exact.unsqueeze(-1))
        columns = torch.cat(roots, dim=-1).flatten(2).flatten(0, 1)
        assert close(columns.T @ columns, expected(name, layer_name).G), layer_name


@pytest.mark.parametrize("name", BACKPACK_CONV)
def test_diag_is_backpacks(name: str) -> None:
    case = CASES[name]
    parameters = backpack_parameters(case, DiagGGNExact())
    for layer_name, layer in case.layers.items():
        diagonals = [parameters[layer.weight].diag_ggn_exact.flatten(1)]
        if layer.bias is not None:
            diagonals.append(parameters[layer.bias].diag_ggn_exact.unsqueeze(-1))
        found = expected(name, layer_name).approximations["diag"].diag()
        assert close(torch.cat(diagonals, dim=-1).flatten(), found), layer_name


@pytest.mark.parametrize("name", BACKPACK_MLP)
def test_kfac_is_backpacks_kflr(name: str) -> None:
    case = CASES[name]
    parameters = backpack_parameters(case, KFLR())
    for layer_name, layer in case.layers.items():
        found = expected(name, layer_name)
        B, A_without_bias = parameters[layer.weight].kflr
        d_in = len(A_without_bias)
        for flavour in ("expand", "reduce"):
            A, mine = found.factors[flavour]
            assert close(torch.kron(mine, A[:d_in, :d_in].contiguous()), torch.kron(B, A_without_bias)), flavour
            assert close(mine, B), flavour


@pytest.mark.parametrize(("name", "layer_name"), CASE_LAYERS)
def test_two_routes_to_the_block_agree(name: str, layer_name: str) -> None:
    found = expected(name, layer_name)
    assert close(reference.columns_block(found.io, found.H), found.G)


@pytest.mark.parametrize(("name", "layer_name"), CASE_LAYERS)
def test_identities(name: str, layer_name: str) -> None:
    """The trace ratio of EKFAC and diag, and which approximation can't lose to which."""
    found = expected(name, layer_name)
    wrong = {k: v["rel_frobenius"] for k, v in found.errors.items()}
    slack = 1e-9
    for flavour in ("expand", "reduce"):
        assert found.errors[f"ekfac_{flavour}"]["trace_ratio"] == pytest.approx(1, abs=slack)
        assert wrong[f"ekfac_{flavour}"] <= wrong[f"kfac_{flavour}"] + slack
        assert wrong["kron_best"] <= wrong[f"kfac_{flavour}"] + slack
    assert found.errors["diag"]["trace_ratio"] == pytest.approx(1, abs=slack)
    # The norm formulas of MATH section 2, which nothing in the oracle uses.
    A, B = found.factors["expand"]
    U_A, U_B = (torch.linalg.eigh(M).eigenvectors for M in (A, B))
    Lambda = torch.diag(torch.kron(U_B, U_A).T @ found.G @ torch.kron(U_B, U_A))
    squared = 1 - float((Lambda.norm() / found.G.norm()) ** 2)
    assert squared == pytest.approx(wrong["ekfac_expand"] ** 2, abs=slack)


@pytest.mark.parametrize("name", [*CASES, *DEGENERATE])
def test_parameter_jacobians_by_plain_loops(name: str) -> None:
    """jacrev through functional_call against torch.autograd.grad of one output at a time."""
    case = (CASES | DEGENERATE)[name]
    model, inputs, _ = case.build()
    flat = reference.call(model, inputs).flatten(1)
    N, D = flat.shape
    for layer in case.layers.values():
        parameters = [p for key, p in model.named_parameters() if key in (layer.weight, layer.bias)]
        rows = []
        for n, j in product(range(N), range(D)):
            found = torch.autograd.grad(flat[n, j], parameters, retain_graph=True)
            weight = found[0].T if layer.transposed else found[0].flatten(1)
            rows.append(torch.cat([weight, *(b.unsqueeze(1) for b in found[1:])], dim=1))
        J = reference.parameter_jacobians(model, inputs, layer.weight, layer.bias, transposed=layer.transposed)
        assert close(J.flatten(0, 1), torch.stack(rows)), layer.weight


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_what_backward_leaves(name: str) -> None:
    case = CASES[name]
    model, inputs, targets = case.build()
    case.loss_fn(reference.call(model, inputs), targets).backward()
    for layer_name, layer in case.layers.items():
        weight = model.get_parameter(layer.weight).grad
        assert weight is not None
        wanted = [weight.T if layer.transposed else weight.flatten(1)]
        if layer.bias is not None:
            bias = model.get_parameter(layer.bias).grad
            assert bias is not None
            wanted.append(bias.unsqueeze(1))
        assert close(expected(name, layer_name).gradient, torch.cat(wanted, dim=1)), layer_name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hessian is None])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_output_hessian(name: str) -> None:
    """Positive semidefinite, and the same by forward over reverse for each example on its own block."""
    case = CASES[name]
    model, inputs, targets = case.build()
    outputs = reference.call(model, inputs).detach()
    H = reference.output_hessian(case.loss_fn, outputs, targets)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert eigenvalues.min() >= -1e-14 * eigenvalues.max()
    for n in range(len(outputs)):

        def loss_of_one(f: Tensor, n: int = n) -> Tensor:
            others = outputs.clone()
            return case.loss_fn(torch.cat([others[:n], f.reshape(outputs[:1].shape), others[n + 1 :]]), targets)

        assert close(H[n], torch.func.hessian(loss_of_one)(outputs[n].flatten()), 1e-13) or H[n].norm() == 0


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda f, _: f.mean() ** 2,
        lambda f, _: f.logsumexp((0, 1)),
        lambda f, _: f[0].square().sum() * f[1].sum(),
    ],
)
def test_losses_that_couple_examples_are_refused(loss_fn: Callable[[Tensor, Any], Tensor]) -> None:
    with pytest.raises(ValueError, match="not a sum over examples"):
        reference.output_hessian(loss_fn, torch.randn(3, 2, dtype=torch.float64), None)


def test_closed_form_of_cross_entropy() -> None:
    logits = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3).sin()
    targets, weight = torch.tensor([0, 2, 1, 1]), torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    wanted = reference.output_hessian(loss, logits, targets)
    assert close(reference.cross_entropy_hessian(logits, weight[targets]), wanted, 1e-14)
    saturated = reference.cross_entropy_hessian(torch.tensor([[60.0, 0, 0]], dtype=torch.float64), torch.ones(1))
    assert float(saturated[0, 0, 0]) == pytest.approx(2 * math.exp(-60), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (0, 0), (1, 1)), ((2, 3), (2, 1), (1, 0), (1, 2)), ((1, 2), (3, 2), (0, 2), (2, 3))],
)
def test_patches_are_unfold(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    x = torch.arange(2 * 3 * 5 * 7, dtype=torch.float64).reshape(2, 3, 5, 7)
    wanted = functional.unfold(x, kernel, dilation, padding, stride).mT
    both_sides = tuple((p, p) for p in padding)
    assert torch.equal(patches(x, kernel, stride, both_sides, dilation), wanted)


@pytest.mark.parametrize(
    ("name", "layer_name"), [("batch_second", "inner"), ("flattened_minor", "inner"), ("attention", "attn")]
)
def test_a_wrong_layout_is_noticed(name: str, layer_name: str) -> None:
    case = CASES[name]
    model, inputs, _ = case.build()
    layer = case.layers[layer_name]

    def wrong(x: Tensor) -> Tensor:
        return x.reshape(4, -1, x.shape[-1])

    with pytest.raises(ValueError, match="rows of another example"):
        reference.layer_io(model, inputs, layer.weight, layer.bias, wrong)


@pytest.mark.parametrize(
    ("name", "layer_name", "shape"),
    [
        ("batch_second", "inner", (3, 4, 3)),
        ("batch_second_input", "inner", (3, 5, 3)),
        ("flattened", "inner", (12, 3)),
        ("flattened_minor", "inner", (12, 3)),
        ("windowed", "inner", (12, 4, 3)),
        ("framewise_conv", "conv", (6, 2, 4, 4)),
        ("mixer", "tokens", (5, 3, 4)),
    ],
)
def test_layers_see_the_layout_their_case_is_about(name: str, layer_name: str, shape: tuple[int, ...]) -> None:
    model, inputs, _ = CASES[name].build()
    seen: list[tuple[int, ...]] = []
    model.get_submodule(layer_name).register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    reference.call(model, inputs)
    assert seen == [shape]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_same_padding_of_an_even_kernel() -> None:
    """The one padding that is not symmetric; torch warns of it, so it is no case of the table."""
    found = oracle(conv_case(lambda: nn.Conv2d(2, 3, 2, padding="same"), (3, 4)), "0")
    assert close(reference.columns_block(found.io, found.H), found.G)


def test_layouts_of_one_model_agree() -> None:
    """The same function through three layouts of the same layer gives the same rows, factors and block."""
    found = [expected(name, "inner") for name in ("batch_second", "flattened", "flattened_minor")]
    for other in found[1:]:
        assert close(other.io.a, found[0].io.a)
        assert close(other.G, found[0].G)
        for flavour in ("expand", "reduce"):
            for mine, wanted in zip(other.factors[flavour], found[0].factors[flavour], strict=True):
                assert close(mine, wanted)


def test_padded_rows_count_nowhere() -> None:
    """Masked factors equal those of the real rows alone, one example at a time; and unmasked ones do not."""
    found = expected("padded_tokens", "inner")
    inputs = CASES["padded_tokens"].build()[1]
    assert isinstance(inputs, tuple)
    mask = inputs[1]
    R_n = mask.sum(1)
    padded = reference.factors(found.io, found.H)
    share = float(mask.sum()) / mask.numel()
    assert close(found.factors["expand"][1], padded["expand"][1])
    assert close(found.factors["reduce"][1], padded["reduce"][1])
    assert found.factors["expand"][0][-1, -1] == pytest.approx(1) == float(padded["expand"][0][-1, -1])
    # Padding here is zero in the input, so that only the bias sees it: the other entries scale by the share.
    assert close(padded["expand"][0][:-1, :-1], share * found.factors["expand"][0][:-1, :-1])
    means = [found.io.a[n, : int(R_n[n])].mean(0) for n in range(len(R_n))]
    assert close(found.factors["reduce"][0], torch.stack([torch.outer(m, m) for m in means]).mean(0))


def test_kron_best_finds_a_kronecker_product() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (2, 3))
    exact = torch.kron(left @ left.T, right @ right.T)
    assert close(reference.kron_best(exact, 2, 3), exact)


def test_ekfac_is_not_unique_on_a_repeated_eigenvalue() -> None:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    distinct = torch.diag(torch.arange(1, 4, dtype=torch.float64))
    assert reference.ekfac_is_unique(V @ V.T, distinct, distinct[:2, :2])
    assert not reference.ekfac_is_unique(V @ V.T, torch.eye(3, dtype=torch.float64), distinct[:2, :2])


def test_errors_by_hand() -> None:
    G, M = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([4.0, 3.0], [4.0, 0.0]))
    assert reference.errors(G, M) == pytest.approx(
        {"rel_frobenius": 3 / 5, "cosine": 4 / 5, "trace_ratio": 4 / 7, "rel_spectral": 3 / 4}
    )


def test_spectrum_numbers() -> None:
    numbers = reference.spectrum_numbers(torch.tensor([4.0, 2.0, 2.0, 1e-17, -1e-17], dtype=torch.float64), 5)
    assert numbers == pytest.approx(
        {
            "trace": 8,
            "lambda_max": 4,
            "lambda_min_positive": 2,
            "condition": 2,
            "stable_rank": 1.5,
            "effective_rank": 2**1.5,
        }
    )


@pytest.mark.parametrize("name", THEOREMS)
def test_theorems(name: str) -> None:
    theorem = THEOREMS[name]
    for layer in (*theorem.exact, *theorem.off):
        error = oracle(theorem.case, layer).errors[f"kfac_{theorem.flavour}"]["rel_frobenius"]
        assert error < 1e-10 if layer in theorem.exact else error > theorem.margin, layer


@pytest.mark.parametrize(("name", "layer"), [("dead_relu", "0"), ("zero_head", "0")])
def test_layers_without_curvature(name: str, layer: str) -> None:
    found = oracle(DEGENERATE[name], layer)
    assert found.G.norm() == 0
    assert found.factors["expand"][1].norm() == found.factors["reduce"][1].norm() == 0


@pytest.mark.parametrize("name", [*CASES, *DEGENERATE])
def test_cases_are_deterministic_and_leave_the_random_state(name: str) -> None:
    case = (CASES | DEGENERATE)[name]
    before = torch.random.get_rng_state()
    first, inputs, _ = case.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        second, again, _ = case.build()
    assert not first.training
    assert torch.equal(reference.call(first, inputs), reference.call(second, again))
    assert {p.dtype for p in first.parameters()} == {torch.float64}
