"""Many batches give what one batch of all their examples gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.errors import BatchError, CurvscopeError, LossError
from curvscope.extract import choose
from curvscope.extract.passes import Passes
from curvscope.extract.pieces import Pieces
from curvscope.graph.export import export_model
from curvscope.load.loss import named_loss
from curvscope.load.problem import Inputs
from tests.many import Tokens, cut, tokens, worst

INPUTS = torch.linspace(-1, 1, 35).view(7, 5)


def analyze(model: Any, batch: Any, loss: Any, **options: Any) -> Any:
    return curvscope.analyze(model, batch, loss=loss, **{"dtype": "float64", "fisher": "exact", **options})


@lru_cache
def mlp() -> Any:
    """Exported once: that takes longer than all the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    return export_model(model, Inputs((INPUTS,)), {}).program


def cnn() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    net(torch.randn(32, 2, 4, 4))
    return net.eval()


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum(1).mean()


def squares_added(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25])
CLASSES = torch.tensor([0, 3, 1, 2, 2, 0, 3])
SOFT = torch.softmax(torch.arange(28.0).view(7, 4).cos(), -1)
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "cross_entropy": ("cross_entropy", CLASSES),
    "sum": ("cross_entropy:reduction=sum", CLASSES),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS), CLASSES),
    "weights, smoothing, ignored": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=2, label_smoothing=0.2), CLASSES),
    "weights, sum": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=3, reduction="sum"), CLASSES),
    "probabilities": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), SOFT),
    "mse": ("mse", SOFT),
    "mse sum": ("mse:reduction=sum", SOFT),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), SOFT),
    "bce sum": (nn.BCEWithLogitsLoss(weight=WEIGHTS, reduction="sum"), SOFT),
    "callable mean": (squares, SOFT),
    "callable sum": (squares_added, SOFT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name: str) -> None:
    torch.manual_seed(0)
    loss, targets = LOSSES[name]
    model, batch = mlp(), (torch.randn(7, 5, dtype=torch.float64), targets)
    whole = analyze(model, batch, loss)
    assert worst(whole, analyze(model, cut(batch, [3, 3, 1]), loss)) < 1e-10
    if not name.startswith("callable"):
        whole = analyze(model, batch, loss, fisher="empirical")
        assert worst(whole, analyze(model, cut(batch, [1, 4, 2]), loss, fisher="empirical")) < 1e-10


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_convolutions_groups_and_batch_norm(fisher: str) -> None:
    torch.manual_seed(0)
    model, batch = cnn(), (torch.randn(7, 2, 4, 4), CLASSES)
    whole = analyze(model, batch, "cross_entropy", fisher=fisher)
    assert worst(whole, analyze(model, cut(batch, [3, 3, 1]), "cross_entropy", fisher=fisher)) < 1e-10


TOKEN_LOSSES = ["cross_entropy:class_axis=last", "cross_entropy:class_axis=last,reduction=sum", "causal_lm"]


@cache
def whole_tokens(loss: str) -> Any:
    torch.manual_seed(0)
    return analyze(Tokens(), tokens(), loss)


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [*((loss, sizes) for loss in TOKEN_LOSSES for sizes in ([3, 3], [1, 2, 3])), (TOKEN_LOSSES[-1], [1] * 6)],
    ids=str,
)
def test_token_losses_and_padding(loss: str, sizes: list[int]) -> None:
    """Padding shows only in the comparison of examples, which batches of one example can't make alone."""
    torch.manual_seed(0)
    model, batch = Tokens(), tokens()
    whole = whole_tokens(loss)
    assert whole.layers["qkv"].row.padded > 0
    assert worst(whole, analyze(model, cut(batch, sizes), loss)) < 1e-10


def test_what_all_examples_leave_idle_is_no_padding() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(x))[:, 0])

    torch.manual_seed(0)
    model, batch = First(), (torch.randn(7, 3, 5), CLASSES)
    whole = analyze(model, batch, "cross_entropy")
    assert whole.layers["mix"].row.padded == 0
    for sizes in ([3, 3, 1], [1] * 7):
        assert worst(whole, analyze(model, cut(batch, sizes), "cross_entropy")) < 1e-10


def test_other_lengths_in_other_batches() -> None:
    """Trimmed to the longest of each batch the numbers are those of padding to one length."""
    torch.manual_seed(0)
    model, batch = Tokens(), tokens()
    whole = analyze(model, batch, "cross_entropy:class_axis=last")
    pairs = cut(batch, [1, 3, 2])
    inputs, targets = pairs[1]
    longest = int(inputs["mask"].sum(1).max())
    pairs[1] = {name: value[:, :longest] for name, value in inputs.items()}, targets[:, :longest]
    trimmed = analyze(model, pairs, "cross_entropy:class_axis=last")
    for name, layer in whole.layers.items():
        for approximation, row in layer.errors.items():
            if "not unique" not in row.reason and row.status == "ok":
                got = trimmed.layers[name].errors[approximation]
                assert got.rel_frobenius == pytest.approx(row.rel_frobenius, rel=1e-10), (name, approximation)


def test_a_batch_in_which_no_target_counts_adds_nothing_but_its_inputs() -> None:
    torch.manual_seed(0)
    model, targets = mlp(), CLASSES.clone()
    targets[:3] = -100
    batch = (torch.randn(7, 5), targets)
    whole = analyze(model, batch, "cross_entropy")
    assert worst(whole, analyze(model, cut(batch, [3, 4]), "cross_entropy")) < 1e-10
    with pytest.raises(BatchError, match="No batch has a target"):
        analyze(model, cut((batch[0], torch.full((7,), -100)), [3, 4]), "cross_entropy")


@pytest.mark.parametrize("fisher", ["probe", "mc"])
def test_estimates_of_many_batches(fisher: str) -> None:
    """Draws of different batches are independent; the estimates agree with the exact numbers by their own errors."""
    torch.manual_seed(0)
    model, batch = mlp(), (torch.randn(40, 5), torch.randint(4, (40,)))
    exact = analyze(model, batch, "cross_entropy")
    found = analyze(model, cut(batch, [16, 16, 8]), "cross_entropy", fisher=fisher, samples=24)
    for name, layer in exact.layers.items():
        for approximation in ("kfac_expand", "diag"):
            row, got = layer.errors[approximation], found.layers[name].errors[approximation]
            assert got.status == "estimated"
            assert abs(got.trace_ratio - row.trace_ratio) < 4 * got.trace_ratio_stderr + 1e-12
            assert abs(got.rel_frobenius - row.rel_frobenius) < 4 * got.rel_frobenius_stderr
    assert worst(found, analyze(model, cut(batch, [16, 16, 8]), "cross_entropy", fisher=fisher, samples=24)) == 0.0


def test_columns_of_all_batches_can_be_dumped() -> None:
    torch.manual_seed(0)
    model, batch = mlp(), (torch.randn(7, 5), CLASSES)
    whole = analyze(model, batch, "cross_entropy", dump=("columns",))
    many = analyze(model, cut(batch, [3, 4]), "cross_entropy", dump=("columns",))
    for name, layer in whole.layers.items():
        assert torch.allclose(torch.tensor(layer.columns()), torch.tensor(many.layers[name].columns()), rtol=1e-12)


class Loader:
    """Yields batches anew, as a DataLoader does; `change` is applied to each, with the number of the reading."""

    def __init__(
        self, pairs: list[Any], change: Callable[[int, int, Any], Any] = lambda reading, i, pair: pair
    ) -> None:
        self.pairs, self.change, self.readings = pairs, change, 0

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        for i, pair in enumerate(self.pairs):
            changed = self.change(self.readings, i, pair)
            if changed is not None:
                yield changed


def test_every_kind_of_source(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, batch = mlp(), (torch.randn(7, 5), CLASSES)
    pairs = cut(batch, [3, 3, 1])
    for i, (inputs, targets) in enumerate(pairs):
        torch.save({"inputs": inputs, "targets": targets}, tmp_path / f"{i}.pt")
    (tmp_path / ".hidden").write_text("left alone")
    whole = analyze(model, batch, "cross_entropy")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=3, shuffle=True)
    state = torch.random.get_rng_state()
    sources = {
        "list": pairs,
        "tuple": tuple(pairs),
        "loader": Loader(pairs),
        "generator function": lambda: (pair for pair in pairs),
        "function": lambda: pairs,
        "function of a pair": lambda: batch,
        "folder": tmp_path,
        "folder as text": str(tmp_path),
        "shuffling loader": data,
    }
    for name, source in sources.items():
        assert worst(whole, analyze(model, source, "cross_entropy")) < 1e-10, name
    assert torch.equal(state, torch.random.get_rng_state())


PAIRS = cut((INPUTS, CLASSES), [3, 3, 1])


def changed(reading: int, i: int, pair: Any) -> Any:
    return (pair[0] + reading, pair[1]) if i == 1 else pair


def shorter(reading: int, i: int, pair: Any) -> Any:
    return None if reading > 2 and i == 2 else pair


def spoilt(place: int, inputs: Callable[[Tensor], Any], targets: Callable[[Tensor], Any] = lambda t: t) -> list[Any]:
    pairs = [*PAIRS]
    pairs[place] = inputs(pairs[place][0]), targets(pairs[place][1])
    return pairs


def fails() -> Iterator[Any]:
    yield PAIRS[0]
    raise ValueError("disk on fire")


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "yields nothing": (lambda: iter(()), ("no batch", "nothing")),
    "generator": ((pair for pair in PAIRS), ("only once",)),
    "other width": (spoilt(1, lambda x: x[:, :3]), ("batch 2", "[3, 3]")),
    "other dtype": (spoilt(2, lambda x: x.long()), ("batch 3", "int64")),
    "other arguments": (spoilt(1, lambda x: (x, x)), ("batch 2", "not built like")),
    "not finite": (spoilt(2, lambda x: x * torch.nan), ("batch 3", "NaN")),
    "no pair": ([*PAIRS, PAIRS[0][:1] * 3], ("list of 4",)),
    "targets of another length": (spoilt(1, lambda x: x, lambda t: t[:2]), ("batch 2", "[3]", "[2]")),
    "class out of range": (spoilt(2, lambda x: x, lambda t: t + 9), ("batch 3", "between 0 and 3")),
    "changes": (Loader(PAIRS, changed), ("batch 2", "change between readings")),
    "gets shorter": (Loader(PAIRS, shorter), ("2 batches", "had 3")),
    "raises": (fails, ("batch 2", "disk on fire")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    source, words = BAD[name]
    with pytest.raises(BatchError) as caught:
        analyze(mlp(), source, "cross_entropy")
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy


def test_bad_folders(tmp_path: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BatchError, match="empty"):
        analyze(mlp(), empty, "cross_entropy")
    stray = tmp_path / "stray"
    stray.mkdir()
    torch.save({"inputs": INPUTS, "targets": CLASSES}, stray / "0.pt")
    (stray / "notes.txt").write_text("not a batch")
    with pytest.raises(BatchError, match=r"notes\.txt"):
        analyze(mlp(), stray, "cross_entropy")
    (stray / "notes.txt").unlink()
    (stray / "older").mkdir()
    with pytest.raises(BatchError, match="older"):
        analyze(mlp(), stray, "cross_entropy")


def test_a_loss_whose_parts_do_not_make_the_whole_is_refused() -> None:
    def over_terms(outputs: Tensor, targets: Tensor) -> Tensor:
        """A mean over what counts, which differs between batches."""
        counts = targets > 0.2
        return (((outputs - targets) ** 2) * counts).sum() / counts.sum()

    torch.manual_seed(0)
    with pytest.raises(LossError, match="neither their sum nor their mean"):
        analyze(mlp(), cut((INPUTS, SOFT), [3, 4]), over_terms)


def test_overflow_in_a_late_batch_names_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    pairs = [*PAIRS]
    pairs[2] = torch.full_like(pairs[2][0], 3e38), pairs[2][1]
    model[0].weight.data.fill_(1.0)
    with pytest.raises(CurvscopeError) as caught:
        analyze(model, pairs, "cross_entropy", dtype="float32")
    assert "batch 3" in str(caught.value)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """Between two pieces nothing is held but sums: here the whole state of a sweep, counted in bytes."""
    torch.manual_seed(0)
    model = mlp()
    held = []
    for count in (3, 12):
        sizes: list[int] = []

        def spy(self: Pieces, original: Any = Pieces.__iter__, sizes: list[int] = sizes) -> Iterator[Any]:
            for piece in original(self):
                sizes.append(sum(tensor.numel() for tensor in piece.tensors))
                yield piece

        batches = [(torch.randn(8, 5), torch.randint(4, (8,))) for _ in range(count)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pieces, "__iter__", spy)
            merged = []
            original = Passes.sweep

            def keep(self: Passes, *args: Any, original: Any = original, merged: list[Any] = merged, **kw: Any) -> Any:
                merged.append(original(self, *args, **kw))
                return merged[-1]

            patch.setattr(Passes, "sweep", keep)
            analyze(model, lambda batches=batches: iter(batches), "cross_entropy")
        columns = [extract.columns for extract in merged[0].values()]
        assert all(each.form == "formed" for each in columns)
        held.append((max(sizes), sum(each.block.numel() for each in columns)))
        assert len(sizes) >= count
    assert held[0] == held[1]


def test_class_axis_is_settled_for_all_batches() -> None:
    torch.manual_seed(0)
    model, batch = Tokens(), tokens()
    run = analyze(model, cut(batch, [3, 3]), named_loss("cross_entropy", {"class_axis": "last"}))
    assert "class_axis=last" in run.model.loss_name
    assert run.model.outputs == "[6, 6, 4]"


@pytest.mark.parametrize("sizes", [None, [3, 3, 1]], ids=["one batch", "many"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_what_a_second_sweep_gives_without_columns(
    fisher: str, sizes: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trace ratios and EKFAC's eigenvalues are those of the columns, where these are too many to be kept."""
    torch.manual_seed(0)
    model, batch = Tokens(), tokens()
    whole = analyze(model, batch, "cross_entropy:class_axis=last", fisher=fisher)
    original = choose.plan_layer
    monkeypatch.setattr(choose, "plan_layer", lambda *args, **kw: original(*args, **{**kw, "limit": 1}))
    data = batch if sizes is None else cut(batch, [3, 2, 1])
    second = analyze(model, data, "cross_entropy:class_axis=last", fisher=fisher)
    for name in ("qkv", "out", "head"):
        layer, again = whole.layers[name], second.layers[name]
        assert again.row.status == "not_assessed"
        assert again.spectra["ggn"].trace == pytest.approx(layer.spectra["ggn"].trace, rel=1e-10)
        for approximation in ("kfac_expand", "kfac_reduce", "ekfac_expand", "ekfac_reduce", "diag"):
            row, got = layer.errors[approximation], again.errors[approximation]
            assert got.status == "not_assessed"
            assert torch.tensor(got.rel_frobenius).isnan()
            assert got.trace_ratio == pytest.approx(row.trace_ratio, rel=1e-10)
            if "not unique" not in row.reason:
                top = again.spectra[approximation].lambda_max
                assert top == pytest.approx(layer.spectra[approximation].lambda_max, rel=1e-9), (name, approximation)
