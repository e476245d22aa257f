from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from curvscope.errors import EXIT_BAD_INPUT, BatchError, LossError
from curvscope.load.loss import load_loss
from curvscope.load.targets import check_targets
from tests.torchvision_schemas import torchvision_models

generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 3, generator=generator)
SEQUENCE = torch.randn(5, 3, 7, generator=generator)
SQUARE = SEQUENCE[..., :3]
CLASSES = torch.tensor([0, 1, 2, 1, 0])
SOFT = torch.softmax(torch.randn(5, 3, generator=generator), 1)
WEIGHT = torch.tensor([0.5, 1.0, 2.0])

AGREE: dict[str, tuple[Any, nn.Module, torch.Tensor, torch.Tensor]] = {
    "default": ("cross_entropy", nn.CrossEntropyLoss(), LOGITS, CLASSES),
    "settings": (
        "cross_entropy:label_smoothing=0.1,reduction=sum,ignore_index=1,weight=0.5:1:2",
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, reduction="sum", ignore_index=1),
        LOGITS,
        CLASSES,
    ),
    "probabilities": ("cross_entropy", nn.CrossEntropyLoss(), LOGITS, SOFT),
    "sequence": ("cross_entropy", nn.CrossEntropyLoss(), SEQUENCE, torch.zeros(5, 7, dtype=torch.long)),
    "mse": ("mse", nn.MSELoss(), LOGITS, SOFT),
    "mse sum": ("mse:reduction=sum", nn.MSELoss(reduction="sum"), LOGITS, SOFT),
    "bce": (
        "bce_with_logits:pos_weight=0.5:1:2,weight=2",
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT, weight=torch.tensor([2.0])),
        LOGITS,
        SOFT,
    ),
}


@pytest.mark.parametrize("name", AGREE)
@pytest.mark.parametrize("given", ["text", "module"])
def test_value_is_torchs_own(name: str, given: str) -> None:
    text, module, outputs, targets = AGREE[name]
    loss = load_loss(text if given == "text" else module)
    check_targets(loss, outputs, targets)
    assert loss.name == text.split(":")[0]
    assert torch.equal(loss(outputs, targets), module(outputs, targets))
    assert loss(outputs.double(), targets).dtype == torch.float64


def test_settings_and_label() -> None:
    loss = load_loss("cross_entropy:label_smoothing=0.1,reduction=sum")
    assert loss.label == "cross_entropy(reduction=sum, label_smoothing=0.1)"
    assert loss.settings["ignore_index"] == -100
    assert load_loss("mse").label == "mse"


TOKENS = torch.tensor([[0, 6, -100], [3, 3, 2], [-100] * 3, [1, 5, 0], [4, -100, 4]])
SEQUENCE_WEIGHT = torch.tensor([0.5, 1, 2, 0, 1, 1, 3])

# given, outputs, targets, label once settled, the same loss by torch on [terms, C]
SEQUENCES: dict[str, tuple[str, torch.Tensor, torch.Tensor, str, Any]] = {
    "last": ("cross_entropy", SEQUENCE, TOKENS, "cross_entropy(class_axis=last)", {}),
    "last, said": ("cross_entropy:class_axis=last", SEQUENCE, TOKENS, "cross_entropy(class_axis=last)", {}),
    "last, settings": (
        "cross_entropy:weight=0.5:1:2:0:1:1:3,label_smoothing=0.2",
        SEQUENCE,
        TOKENS,
        "cross_entropy(weight=[7 values], label_smoothing=0.2, class_axis=last)",
        {"weight": SEQUENCE_WEIGHT, "label_smoothing": 0.2},
    ),
    "last, sum": (
        "cross_entropy:reduction=sum,ignore_index=3",
        SEQUENCE,
        TOKENS.clamp(min=0),
        "cross_entropy(reduction=sum, ignore_index=3, class_axis=last)",
        {"reduction": "sum", "ignore_index": 3},
    ),
    "last, probabilities": (
        "cross_entropy:label_smoothing=0.1",
        SEQUENCE,
        torch.softmax(SEQUENCE.flip(0), -1),
        "cross_entropy(label_smoothing=0.1, class_axis=last)",
        {"label_smoothing": 0.1},
    ),
    "square": (
        "cross_entropy:class_axis=last",
        SQUARE,
        TOKENS.clamp(max=2),
        "cross_entropy(class_axis=last)",
        {},
    ),
    "four axes": (
        "cross_entropy",
        torch.stack([SEQUENCE, SEQUENCE.flip(0)], 1),
        torch.stack([TOKENS, TOKENS.flip(0)], 1),
        "cross_entropy(class_axis=last)",
        {},
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_classes_on_the_last_axis(name: str) -> None:
    given, outputs, targets, label, settings = SEQUENCES[name]
    loss = load_loss(given)
    settled = check_targets(loss, outputs, targets)
    terms = targets.flatten(0, -2) if targets.is_floating_point() else targets.flatten()
    want = nn.CrossEntropyLoss(**settings)(outputs.flatten(0, -2), terms)
    assert settled.label == label
    for each in (loss, settled, check_targets(settled, outputs, targets)):
        assert torch.equal(each(outputs, targets), want)


def test_the_label_says_the_axis_only_where_there_are_several() -> None:
    assert check_targets(load_loss("cross_entropy"), LOGITS, CLASSES).label == "cross_entropy"
    targets = torch.zeros(5, 7, dtype=torch.long)
    for given in ("cross_entropy", nn.CrossEntropyLoss(), "cross_entropy:class_axis=second"):
        assert check_targets(load_loss(given), SEQUENCE, targets).label == "cross_entropy(class_axis=second)"


@pytest.mark.parametrize("given", ["causal_lm", "causal_lm:ignore_index=3", "causal_lm:reduction=sum"])
def test_causal_lm_is_transformers_own(given: str) -> None:
    torchvision_models()  # transformers' losses import torchvision
    from transformers.loss.loss_utils import ForCausalLMLoss

    loss = load_loss(given)
    ignored = loss.settings["ignore_index"]
    labels = TOKENS if ignored == -100 else TOKENS.clamp(min=0)
    one = torch.tensor(1) if loss.settings["reduction"] == "sum" else None
    want = ForCausalLMLoss(SEQUENCE, labels, vocab_size=7, num_items_in_batch=one, ignore_index=ignored)
    settled = check_targets(loss, SEQUENCE, labels)
    assert torch.equal(settled(SEQUENCE, labels), want)
    assert settled.label == given.replace(":", "(") + ")" * (":" in given)
    assert torch.equal(loss(SEQUENCE, labels.clamp(0).byte()), loss(SEQUENCE, labels.clamp(0)))


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((outputs - targets) ** 2).sum()


class Smoothed(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (squares, "squares"),
        (nn.HuberLoss(), "HuberLoss"),
        (Smoothed(), "Smoothed"),
        (functional.mse_loss, "mse_loss"),
    ],
)
def test_callables(given: Any, label: str) -> None:
    loss = load_loss(given)
    assert (loss.name, loss.label) == ("callable", label)
    check_targets(loss, LOGITS, CLASSES if label == "Smoothed" else SOFT)


def test_callable_by_name(factories: str) -> None:
    loss = load_loss(f"{factories}:squares")
    assert (loss.name, loss.label) == ("callable", f"{factories}:squares")
    assert torch.equal(loss(LOGITS, SOFT), squares(LOGITS, SOFT))


def test_torch_module_by_name() -> None:
    loss = load_loss('torch.nn:CrossEntropyLoss(reduction="sum")')
    assert (loss.name, loss.settings["reduction"]) == ("cross_entropy", "sum")


BAD_LOSSES = {
    "none": (None, ("No loss", "cross_entropy", "mse", "bce_with_logits")),
    "unknown": ("hinge", ("'hinge'", "cross_entropy", "mse")),
    "unknown with settings": ("hinge:a=1", ("'hinge'",)),
    "unknown setting": ("mse:weight=1", ("'weight'", "reduction")),
    "no value": ("cross_entropy:reduction", ("no value",)),
    "no number": ("cross_entropy:label_smoothing=a", ("label_smoothing",)),
    "smoothing": ("cross_entropy:label_smoothing=2", ("between 0 and 1",)),
    "negative weight": ("cross_entropy:weight=1:-1:1", ("weight", "convex")),
    "reduction none": ("cross_entropy:reduction=none", ("reduction", "mean")),
    "module, none": (nn.MSELoss(reduction="none"), ("reduction", "mean")),
    "unknown class axis": ("cross_entropy:class_axis=1", ("'1'", "second", "last")),
    "class axis of a causal_lm": ("causal_lm:class_axis=last", ("class_axis", "ignore_index")),
    "unknown reduction": ("mse:reduction=max", ("'max'",)),
    "no module": ("no_such_module_here:loss", ("can't be imported",)),
    "a number": (3, ("int",)),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_losses(name: str) -> None:
    given, words = BAD_LOSSES[name]
    with pytest.raises(LossError) as caught:
        load_loss(given)
    error = caught.value
    assert error.exit_code == EXIT_BAD_INPUT
    assert error.what
    assert error.where
    assert error.remedy
    for word in words:
        assert word in str(error)


def vector(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum(1)


def fails(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    raise ValueError("bad shapes")


def infinite(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum() / 0


def number(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return 1.0


BAD_TARGETS: dict[str, tuple[Any, torch.Tensor, Any, type, tuple[str, ...]]] = {
    "too large": ("cross_entropy", LOGITS, CLASSES + 1, BatchError, ("0 and 2", "3 at index [2]", "1 of 5")),
    "negative": ("cross_entropy", LOGITS, CLASSES - 1, BatchError, ("-1 at index [0]",)),
    "all ignored": (
        "cross_entropy",
        LOGITS,
        torch.full((5,), -100),
        BatchError,
        ("ignore_index",),
    ),
    "int32": ("cross_entropy", LOGITS, CLASSES.int(), BatchError, ("int64", "int32")),
    "short": ("cross_entropy", LOGITS, CLASSES[:4], BatchError, ("[5]", "[4]")),
    "float classes": ("cross_entropy", LOGITS, CLASSES.float(), BatchError, ("float32", "[5, 3]")),
    "no class axis": (
        "cross_entropy",
        SEQUENCE,
        torch.zeros(5, 4, dtype=torch.long),
        BatchError,
        ("[5, 7] (classes on axis 1)", "[5, 3] (classes on axis 2)", "[5, 4]"),
    ),
    "the other class axis": (
        "cross_entropy:class_axis=second",
        SEQUENCE,
        torch.zeros(5, 3, dtype=torch.long),
        BatchError,
        ("class_axis=second", "[5, 7]", "[5, 3]", "fit the other axis", "class_axis=last"),
    ),
    "two class axes": (
        "cross_entropy",
        SQUARE,
        torch.zeros(5, 3, dtype=torch.long),
        LossError,
        ("fit both", "class_axis=last", "class_axis=second"),
    ),
    "two class axes, module": (
        nn.CrossEntropyLoss(),
        SQUARE,
        torch.zeros(5, 3, dtype=torch.long),
        LossError,
        ("fit both", "class_axis=last"),
    ),
    "probabilities of both axes": (
        "cross_entropy",
        SQUARE,
        torch.full((5, 3, 3), 1 / 3),
        LossError,
        ("fit both", "class_axis=last"),
    ),
    "probabilities of no axis": (
        "cross_entropy",
        SEQUENCE,
        torch.zeros(5, 3, 7),
        LossError,
        ("neither over axis 1", "class_axis=last"),
    ),
    "probabilities of the other axis": (
        "cross_entropy:class_axis=second",
        SEQUENCE,
        torch.softmax(SEQUENCE, -1),
        LossError,
        ("sum to 1 over axis 2, not over axis 1", "class_axis=last"),
    ),
    "weight of the other axis": (
        "cross_entropy:weight=1:2:3",
        SEQUENCE,
        torch.zeros(5, 3, dtype=torch.long),
        LossError,
        ("[7]", "[3]"),
    ),
    "weightless": (
        "cross_entropy:weight=0:0:1,ignore_index=2",
        LOGITS,
        CLASSES,
        LossError,
        ("class weight 0", "reduction=sum"),
    ),
    "causal_lm, two axes": ("causal_lm", LOGITS, CLASSES, LossError, ("[N, T, V]", "[5, 3]", "cross_entropy")),
    "causal_lm, shifted": (
        "causal_lm",
        SEQUENCE,
        torch.zeros(5, 2, dtype=torch.long),
        BatchError,
        ("[5, 3]", "[5, 2]", "unshifted"),
    ),
    "causal_lm, one token": (
        "causal_lm",
        SEQUENCE[:, :1],
        torch.zeros(5, 1, dtype=torch.long),
        BatchError,
        ("two tokens",),
    ),
    "causal_lm, range": (
        "causal_lm",
        SEQUENCE,
        torch.tensor([[9, 0, 1], [0, 7, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]),
        BatchError,
        ("0 and 6", "7 at index [1, 1]", "1 of 10", "causal_lm:ignore_index"),
    ),
    "causal_lm, all ignored": (
        "causal_lm:ignore_index=3",
        SEQUENCE,
        torch.tensor([[1, 3, 3]] * 5),
        BatchError,
        ("ignore_index (3)",),
    ),
    "causal_lm, probabilities": ("causal_lm", SEQUENCE, torch.zeros(5, 3), BatchError, ("int64", "float32")),
    "negative probability": ("cross_entropy", LOGITS, SOFT - 1, BatchError, ("negative",)),
    "one output": ("cross_entropy", LOGITS[:, 0], CLASSES, LossError, ("[N, C, ...]", "[5]")),
    "weight": ("cross_entropy:weight=1:2", LOGITS, CLASSES, LossError, ("[3]", "[2]")),
    "ignored probabilities": ("cross_entropy:ignore_index=0", LOGITS, SOFT, LossError, ("ignore_index",)),
    "mse shape": ("mse", LOGITS, SOFT[:, 0], BatchError, ("[5, 3]", "[5]")),
    "bce integer": ("bce_with_logits", LOGITS, SOFT.long(), BatchError, ("int64", "float")),
    "bce range": ("bce_with_logits", LOGITS, SOFT + 1, BatchError, ("0 and 1", "index [0, 0]")),
    "bce weight": ("bce_with_logits:pos_weight=1:2", LOGITS, SOFT, LossError, ("[2]", "[5, 3]")),
    "no tensor": ("mse", LOGITS, {"a": SOFT}, BatchError, ("dict",)),
    "vector": (vector, LOGITS, SOFT, LossError, ("scalar", "[5]")),
    "float": (number, LOGITS, SOFT, LossError, ("scalar", "float")),
    "fails": (fails, LOGITS, SOFT, LossError, ("bad shapes",)),
    "infinite": (infinite, LOGITS, SOFT, LossError, ("inf",)),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_targets_that_do_not_suit(name: str) -> None:
    given, outputs, targets, kind, words = BAD_TARGETS[name]
    with pytest.raises(kind) as caught:
        check_targets(load_loss(given), outputs, targets)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy
