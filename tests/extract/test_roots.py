"""Roots of sequence losses: columns against autograd's Hessian, draws, what they cost, and why tokens can't share."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import curvscope
from curvscope.errors import LossError
from curvscope.extract.roots import Root, exact_columns, make_root
from curvscope.graph.layout import Layout
from curvscope.load.loss import load_loss, named_loss
from tests import models, reference

generator = torch.Generator().manual_seed(0)
# [N, T, C], no class so rare that 2,000 draws miss it
OUTPUTS = 0.5 * torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
# examples with 2, 0, 3 and 1 terms; as the token ids of a causal_lm with 1, 0, 2 and 1
LABELS = torch.tensor([[3, -100, 1], [-100, -100, -100], [0, 4, 2], [-100, 1, -100]])
SOFT = torch.softmax(torch.randn(4, 3, 5, generator=generator, dtype=torch.float64), -1)
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.3, 0.9], dtype=torch.float64)
PLAIN = Layout(0)

# loss, outputs, targets, layout of the outputs, K
ROOTS: dict[str, tuple[Any, Tensor, Tensor, Layout, int]] = {
    "last": ("cross_entropy", OUTPUTS, LABELS, PLAIN, 12),
    "second": ("cross_entropy", OUTPUTS.mT, LABELS, PLAIN, 12),
    "flat": ("cross_entropy", OUTPUTS.flatten(0, 1), LABELS.flatten(), Layout(0, 1, 3), 12),
    "flat, examples fastest": (
        "cross_entropy",
        OUTPUTS.transpose(0, 1).flatten(0, 1),
        LABELS.T.flatten(),
        Layout(0, 3, 1),
        12,
    ),
    "examples second": ("cross_entropy", OUTPUTS.transpose(0, 1), LABELS.T, Layout(1), 12),
    "examples after the classes": ("cross_entropy", OUTPUTS.permute(1, 2, 0), LABELS.T, Layout(2), 12),
    "images": ("cross_entropy", OUTPUTS.mT.unsqueeze(3).contiguous(), LABELS.unsqueeze(2), PLAIN, 12),
    # a class of weight 0 has no columns either
    "weights": (("cross_entropy", {"weight": WEIGHT}), OUTPUTS, LABELS, PLAIN, 8),
    "weights, smoothing": (
        ("cross_entropy", {"weight": WEIGHT, "label_smoothing": 0.1}),
        OUTPUTS,
        LABELS,
        PLAIN,
        12,
    ),
    "sum": ("cross_entropy:reduction=sum,ignore_index=0", OUTPUTS, LABELS.clamp(min=0), PLAIN, 8),
    "probabilities": (("cross_entropy", {"weight": WEIGHT, "label_smoothing": 0.1}), OUTPUTS, SOFT, PLAIN, 12),
    "one class": ("cross_entropy", OUTPUTS[:, :, :2], LABELS.clamp(max=1), PLAIN, 3),
    "causal_lm": ("causal_lm", OUTPUTS, LABELS, PLAIN, 8),
    "causal_lm, full": ("causal_lm", OUTPUTS, LABELS.clamp(min=0), PLAIN, 8),
    "causal_lm, one term": (
        "causal_lm:reduction=sum,ignore_index=2",
        OUTPUTS[:, :2],
        SOFT[..., 0].long()[:, :2],
        PLAIN,
        4,
    ),
    "mse": ("mse", OUTPUTS, SOFT, PLAIN, 15),
    "bce": ("bce_with_logits", OUTPUTS.transpose(0, 1), SOFT.transpose(0, 1), Layout(1), 15),
}


def root_of(name: str, fisher: str = "exact", samples: int = 1, seed: int = 0) -> Root:
    given, outputs, targets, layout, _ = ROOTS[name]
    return make_root(loss_of(given), outputs, targets, layout, fisher=fisher, samples=samples, seed=seed)


def loss_of(given: Any) -> Any:
    return named_loss(*given) if isinstance(given, tuple) else load_loss(given)


@cache
def hessian(name: str) -> Tensor:
    """[N, D, D] by double backward."""
    given, outputs, targets, layout, _ = ROOTS[name]
    examples_first = layout.flat(outputs)

    def loss(flat: Tensor, targets: Tensor) -> Tensor:
        return loss_of(given)(layout.unflat(flat, outputs), targets)

    return reference.output_hessian(loss, examples_first, targets)


def columns(root: Root, layout: Layout) -> Tensor:
    """[N, K, D]."""
    return torch.stack([layout.flat(root.column(k)) for k in range(root.columns)], 1)


@pytest.mark.parametrize("name", ROOTS)
def test_columns_are_a_root_of_the_hessian(name: str) -> None:
    given, outputs, targets, layout, K = ROOTS[name]
    root = root_of(name)
    S = columns(root, layout)
    assert root.columns == K == exact_columns(loss_of(given), outputs, layout, targets)
    assert exact_columns(loss_of(given), outputs, layout) >= K
    assert root.outputs == layout.flat(outputs).shape[1]
    assert torch.isfinite(S).all()
    gap = S.mT @ S - hessian(name)
    assert gap.abs().max() <= 1e-14 * hessian(name).abs().max()


@pytest.mark.parametrize("fisher", ["probe", "mc"])
@pytest.mark.parametrize("name", ROOTS)
def test_draws_have_the_hessian_as_mean(name: str, fisher: str) -> None:
    count = 2000
    S = columns(root_of(name, fisher, count), ROOTS[name][3]) * count**0.5
    products = S.unsqueeze(2) * S.unsqueeze(3)
    stderr = products.std(1) / count**0.5
    assert ((products.mean(1) - hessian(name)).abs() <= 5 * stderr + 1e-12).all()


@pytest.mark.parametrize("fisher", ["probe", "mc"])
@pytest.mark.parametrize("name", ["last", "mse", "bce"])
def test_a_draw_is_the_same_whenever_it_is_asked_for(name: str, fisher: str) -> None:
    root = root_of(name, fisher, 3)
    first = [root.column(k) for k in (0, 1, 2)]
    again = {k: root.column(k) for k in (2, 0, 1)}
    assert all(torch.equal(each, again[k]) for k, each in enumerate(first))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], root_of(name, fisher, 3, seed=1).column(0))


@pytest.mark.parametrize("name", ["last", "second", "flat, examples fastest", "causal_lm", "sum"])
def test_empirical_is_each_term_at_its_true_label(name: str) -> None:
    given, outputs, targets, _, _ = ROOTS[name]
    causal = str(given).startswith("causal")
    labels = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], -100)], 1) if causal else targets
    axis = 1 if name == "second" else outputs.ndim - 1
    kept = labels != loss_of(given).settings["ignore_index"]
    weight = kept.double() / (1 if "sum" in name else kept.sum())
    onehot = functional.one_hot(labels.clamp(min=0), 5).movedim(-1, axis)
    want = (torch.softmax(outputs, axis) - onehot) * weight.sqrt().unsqueeze(axis)
    got = root_of(name, "empirical")
    assert got.columns == 1
    torch.testing.assert_close(got.column(0), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fisher", ["exact", "probe", "mc", "empirical"])
@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("cross_entropy", torch.full((4, 3), -100)),
        ("cross_entropy:ignore_index=2", torch.full((4, 3), 2)),
        (("cross_entropy", {"weight": WEIGHT}), torch.full((4, 3), 2)),
        ("causal_lm", torch.tensor([[1, -100, -100]] * 4)),
    ],
)
def test_no_term_at_all_is_said_in_words(given: Any, targets: Tensor, fisher: str) -> None:
    with pytest.raises(LossError, match="No term of the loss counts"):
        make_root(loss_of(given), OUTPUTS, targets, PLAIN, fisher=fisher, samples=1, seed=0)


def test_no_term_under_a_sum_has_no_curvature() -> None:
    with pytest.raises(LossError, match="no curvature in the outputs"):
        make_root(
            load_loss("cross_entropy:reduction=sum"),
            OUTPUTS,
            torch.full((4, 3), -100),
            PLAIN,
            fisher="exact",
            samples=1,
            seed=0,
        )


@pytest.mark.parametrize(
    ("given", "layout", "words"), [("cross_entropy", Layout(2), "classes"), ("causal_lm", Layout(1), "tokens")]
)
def test_examples_along_another_axis_are_refused(given: str, layout: Layout, words: str) -> None:
    with pytest.raises(LossError, match=f"has its {words}"):
        make_root(load_loss(given), OUTPUTS, LABELS, layout, fisher="exact", samples=1, seed=0)


class Largest(TorchDispatchMode):
    """The most bytes of one float64 or int64 tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.float64, torch.int64):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("fisher", ["exact", "probe", "mc", "empirical"])
def test_nothing_in_float64_is_as_large_as_the_outputs(fisher: str) -> None:
    outputs = torch.randn(2, 64, 30_000)
    targets = torch.randint(30_000, (2, 64))
    with Largest() as largest:
        root = make_root(load_loss("causal_lm"), outputs, targets, PLAIN, fisher=fisher, samples=2, seed=0)
        root.column(0)
        root.column(root.columns - 1)
    assert 0 < largest.bytes <= outputs.numel() * 8 / 3


def test_tokens_do_not_share_a_backward_pass() -> None:
    """Where attention mixes tokens, one pass for all of them would give the values' B several times too large."""
    torch.manual_seed(0)
    model = models.TokenModel(classes=4).double()
    inputs, targets = torch.randn(3, 1, 3).double() + 0.1 * torch.randn(3, 6, 3).double(), torch.randint(4, (3, 6))
    values = model.v.register_forward_hook(lambda module, args, output: seen.append(output))
    seen: list[Tensor] = []
    outputs = model(inputs)
    values.remove()
    root = make_root(load_loss("cross_entropy"), outputs.detach(), targets, PLAIN, fisher="exact", samples=1, seed=0)
    assert root.columns == 6 * 3

    def B(cotangents: list[Tensor]) -> Tensor:
        gradients = [torch.autograd.grad(outputs, seen, c, retain_graph=True)[0].flatten(0, 1) for c in cotangents]
        return torch.cat(gradients).T @ torch.cat(gradients)

    each = [root.column(k) for k in range(root.columns)]
    shared = B([sum(each[j::3], torch.zeros_like(outputs)) for j in range(3)])
    own = B(each)
    run = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="exact")
    got = torch.as_tensor(run.layers["v"].factors["expand"].B)
    assert shared.trace() > 4 * own.trace()
    torch.testing.assert_close(got, own, rtol=1e-9, atol=1e-15)
    oracle = reference.layer_reference(
        model, inputs, targets, lambda o, t: functional.cross_entropy(o.mT, t), "v.weight", "v.bias"
    )
    torch.testing.assert_close(got, oracle.factors["expand"][1], rtol=1e-9, atol=1e-15)
