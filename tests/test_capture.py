from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvscope
from curvscope.capturing import capture
from curvscope.errors import BatchError, CurvscopeError, LossError, ModelError, OutputError, UsageError
from curvscope.load import load_problem
from curvscope.load.archive import read_archive
from curvscope.load.bundle import FORMAT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(72, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"logits": self.head((self.embed(ids) * mask[:, :, None]).sum(0)) * scale}


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.conv.bias.requires_grad_(False)
    return net


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pair: Any) -> None:
    nn.functional.cross_entropy(model(pair[0]), pair[1]).backward()
    optimizer.step()


def graph_of(problem: Any) -> Any:
    return problem.model.module(check_guards=False)


def test_round_trip(model: Net, pair: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([{"params": model.head.parameters()}, {"params": model.conv.weight}], lr=0.01)
    step(model, optimizer, pair)
    path = tmp_path / "bundle.pt"
    capture(path, model, pair, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer=optimizer, step=7)
    problem = load_problem(path)
    model.eval()
    assert torch.equal(graph_of(problem)(*problem.inputs.args), model(pair[0]))
    for n in (1, 3, 11):
        x = torch.randn(n, 1, 8, 8)
        torch.testing.assert_close(graph_of(problem)(x), model(x))
    assert torch.equal(problem.targets, pair[1])
    assert problem.loss.label == "cross_entropy(label_smoothing=0.1)"
    assert (problem.name, problem.source, problem.step) == ("Net", "bundle.pt", 7)
    assert problem.optimizer.class_name == "AdamW"
    assert problem.optimizer.param_names == ("head.weight", "head.bias", "conv.weight")
    moments = problem.optimizer.state_dict["state"][2]["exp_avg"]
    assert torch.equal(moments, optimizer.state[model.conv.weight]["exp_avg"])
    stored = problem.model.state_dict
    assert {n: p.requires_grad for n, p in stored.items() if isinstance(p, nn.Parameter)} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_the_file_is_plain_and_holds_the_weights_once(model: Net, pair: Any, tmp_path: Path) -> None:
    capture(tmp_path / "b.pt", model, (pair[0][:2], pair[1][:2]), "cross_entropy")
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    assert content["format"] == FORMAT
    assert content["version"] == 1
    assert set(content["batch"]) == {"inputs", "targets"}
    assert content["example_axes"] == {"0": 0}
    # a slice is stored as such, without the rest of the data set it was cut from
    assert content["batch"]["inputs"]["args"][0].untyped_storage().nbytes() == 2 * 64 * 4
    members = read_archive(content["graph"].numpy().tobytes()).members
    assert members["data/sample_inputs/model.pt"] == b""
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    assert sum(len(m) for n, m in members.items() if "/weight_" in n) == weights
    assert str(Path(__file__).parent).encode() not in (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool, model: Net, pair: Any, tmp_path: Path) -> None:
    model.train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, pair)
    model.head.register_forward_hook(lambda *_: None)

    def snapshot() -> Any:
        return (
            {n: (t.clone(), id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()},
            {n: (p.requires_grad, p.grad.clone() if p.grad is not None else None) for n, p in model.named_parameters()},
            copy.deepcopy(optimizer.state_dict()),
            torch.get_rng_state(),
        )

    def structure() -> Any:
        return [(m.training, list(m._forward_hooks), sorted(vars(m))) for m in model.modules()]

    before, structure_before = snapshot(), structure()
    capture(tmp_path / "out.pt", model, pair, lambda o, t: o.square().sum() + 0 * t.sum(), optimizer=optimizer)
    (tmp_path / "out.pt").unlink()
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
    assert structure() == structure_before


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum()


@pytest.mark.parametrize("loss", [squares, nn.HuberLoss()], ids=["function", "module"])
def test_a_callable_loss_is_kept_as_a_graph(loss: Any, model: Net, pair: Any, tmp_path: Path) -> None:
    targets = torch.randn(6, 3)
    capture(tmp_path / "b.pt", model, (pair[0], targets), loss)
    problem = load_problem(tmp_path / "b.pt")
    assert problem.loss.name == "callable"
    for n in (1, 4, 6):
        outputs = torch.randn(n, 3)
        torch.testing.assert_close(problem.loss(outputs, targets[:n]), loss(outputs, targets[:n]))
    assert torch.func.hessian(lambda o: problem.loss(o, targets[:1]))(torch.randn(1, 3)).shape == (1, 3, 1, 3)


def picky(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum() if float(outputs.sum()) > 0 else -outputs.sum()


def test_a_loss_that_is_no_graph_must_be_given_again(model: Net, pair: Any, tmp_path: Path) -> None:
    capture(tmp_path / "b.pt", model, pair, picky)
    with pytest.raises(LossError, match="--loss"):
        load_problem(tmp_path / "b.pt")
    assert load_problem(tmp_path / "b.pt", loss=picky).loss.label == "picky"


def test_keywords_and_another_example_axis(tmp_path: Path) -> None:
    model = Keywords()
    inputs = {"ids": torch.randint(0, 7, (5, 3)), "mask": torch.rand(5, 3), "scale": 2.0}
    axes = {"ids": 1, "mask": 1}
    capture(tmp_path / "b.pt", model, (inputs, torch.tensor([0, 1, 0])), "cross_entropy", example_axes=axes)
    problem = load_problem(tmp_path / "b.pt")
    assert problem.example_axes == {"0": 1, "1": 1}
    torch.testing.assert_close(graph_of(problem)(*problem.inputs.args), model(**inputs)["logits"])
    other = {"mask": torch.rand(5, 2), "ids": torch.randint(0, 7, (5, 2))}
    problem = load_problem(tmp_path / "b.pt", (other, torch.tensor([0, 1])))
    assert torch.equal(problem.inputs.args[0], other["ids"])
    problem = load_problem(tmp_path / "b.pt", factory=Keywords)
    assert set(problem.inputs.kwargs) == {"ids", "mask", "scale"}
    assert problem.example_axes == axes
    torch.testing.assert_close(problem.model(**problem.inputs.kwargs)["logits"], model(**inputs)["logits"])


def test_single_example(model: Net, pair: Any, tmp_path: Path) -> None:
    capture(tmp_path / "b.pt", model, (pair[0][:1], pair[1][:1]), "cross_entropy")
    torch.testing.assert_close(graph_of(load_problem(tmp_path / "b.pt"))(pair[0]), model.eval()(pair[0]))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)


X, Y = torch.ones(2, 4), torch.tensor([0, 1])
ODD = torch.optim.SGD(nn.Linear(4, 3).parameters(), lr=0.1)
LINEAR = nn.Linear(4, 3)
BAD: dict[str, tuple[nn.Module, Any, Any, dict[str, Any], type[CurvscopeError], str]] = {
    "no graph": (Branches(), (X, Y), "cross_entropy", {}, ModelError, "torch.export"),
    "batch": (LINEAR, X, "cross_entropy", {}, BatchError, "pair"),
    "targets": (LINEAR, (X, Y + 3), "cross_entropy", {}, BatchError, "between 0 and 2"),
    "loss": (LINEAR, (X, Y), "hinge", {}, LossError, "hinge"),
    "vector loss": (LINEAR, (X, Y), lambda o, t: o.sum(1), {}, LossError, "scalar"),
    "optimizer": (LINEAR, (X, Y), "cross_entropy", {"optimizer": ODD}, UsageError, "belongs to this model"),
    "axis": (LINEAR, (X, Y), "cross_entropy", {"example_axes": {"q": 1}}, BatchError, "'q'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_captured(name: str, tmp_path: Path) -> None:
    model, batch, loss, options, kind, word = BAD[name]
    with pytest.raises(kind, match=word):
        capture(tmp_path / "b.pt", model, batch, loss, **options)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_target_leaves_nothing(model: Net, pair: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written") as caught:
        capture(tmp_path / "absent" / "b.pt", model, pair, "cross_entropy")
    assert caught.value.where == str(tmp_path / "absent")
    assert "tmp" not in caught.value.what
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="can't be written"):
        capture(tmp_path / "folder", model, pair, "cross_entropy")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_failed_write_keeps_the_old_file(
    model: Net, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(tmp_path / "b.pt", model, pair, "cross_entropy")
    old = (tmp_path / "b.pt").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        capture(tmp_path / "b.pt", model, pair, "cross_entropy")
    assert (tmp_path / "b.pt").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_bundles_replace_bundles_only(model: Net, pair: Any, tmp_path: Path) -> None:
    weights, bundle, link = tmp_path / "mine.pt", tmp_path / "b.pt", tmp_path / "link.pt"
    torch.save(model.state_dict(), weights)
    (tmp_path / "notes.txt").write_text("mine")
    before = weights.read_bytes()
    link.symlink_to(weights)
    for path in (weights, link, tmp_path / "notes.txt"):
        with pytest.raises(OutputError, match="is no bundle has that name") as caught:
            capture(path, model, pair, "cross_entropy")
        assert caught.value.where
        assert caught.value.remedy
    assert weights.read_bytes() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    bundle.touch()
    for step in (1, 2):
        capture(bundle, model, pair, "cross_entropy", step=step)
    assert torch.load(bundle, weights_only=True)["step"] == 2


def test_what_eval_mode_hides_is_remembered(model: Net, pair: Any, tmp_path: Path) -> None:
    """The graph has no dropout any more, and the bundle must say that there was some."""
    capture(tmp_path / "b.pt", model, pair, "cross_entropy")
    words = ("BatchNorm uses its running statistics", "dropout is off")
    assert load_problem(tmp_path / "b.pt").hidden_by_eval == words
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    assert content["mode"] == {"batch_norm": True, "batch_statistics": False, "dropout": True}
    del content["mode"]
    torch.save(content, tmp_path / "old.pt")
    assert load_problem(tmp_path / "old.pt").hidden_by_eval == words[:1]


def test_a_weight_that_is_a_slice_takes_no_more_than_itself(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.randn(1000, 4)[10:13])
    capture(tmp_path / "b.pt", layer, (torch.ones(2, 4), torch.tensor([0, 1])), "cross_entropy")
    assert len(torch.load(tmp_path / "b.pt", weights_only=True)["graph"]) < 16000
    torch.testing.assert_close(graph_of(load_problem(tmp_path / "b.pt"))(torch.eye(4)), layer(torch.eye(4)))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such table")


REFUSED: dict[str, tuple[nn.Module, torch.Tensor, str]] = {
    "dtype": (nn.Linear(4, 3), torch.ones(2, 4).double(), "float64"),
    "half model": (nn.Linear(4, 3).half(), torch.ones(2, 4), "float32"),
    "shape": (nn.Linear(4, 3), torch.ones(2, 5), r"\[2, 5\]"),
    "raises": (Raises(), torch.ones(2, 4), "no such table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_that_the_model_refuses(name: str, tmp_path: Path) -> None:
    model, x, words = REFUSED[name]
    before = torch.get_rng_state()
    with pytest.raises(BatchError, match=words) as caught:
        capture(tmp_path / "b.pt", model, (x, torch.tensor([0, 1])), "cross_entropy")
    assert "refuses the batch" in caught.value.what
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


def test_an_example_axis_by_number(tmp_path: Path) -> None:
    capture(tmp_path / "b.pt", nn.Linear(4, 3), (torch.ones(2, 4), Y), "cross_entropy", example_axes={0: 0})
    assert load_problem(tmp_path / "b.pt").example_axes == {}


def test_schedule_and_bound_travel_in_the_bundle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5.0, total_steps=20, cycle_momentum=False)
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    kept = {"optimizer": optimizer, "scheduler": scheduler, "clip_norm": 1e-3}
    curvscope.capture(tmp_path / "c.pt", model, batch, "cross_entropy", **kept)
    live = curvscope.analyze(model, batch, loss="cross_entropy", **kept)
    stored = curvscope.analyze(tmp_path / "c.pt")
    for run in (live, stored):
        rows = {row.quantity: row for row in run.tables["stability"] if row.scope == "network"}
        assert rows["scheduled_peak_lr"].value == 5.0
        assert rows["scheduled_peak_lr"].reason.startswith("OneCycleLR: in 5 scheduler steps")
        assert rows["clip_scale"].value < 0.01
        assert "gradient norm clipped at 0.001" in run.model.optimizer
    own = curvscope.analyze(tmp_path / "c.pt", optimizer="lr=0.1", clip_norm=0)
    assert not {"clip_scale", "scheduled_peak_lr"} & {row.quantity for row in own.tables["stability"]}
    with pytest.raises(UsageError, match="comes with its optimizer"):
        curvscope.capture(tmp_path / "d.pt", model, batch, "cross_entropy", scheduler=scheduler)
    with pytest.raises(UsageError, match="positive number"):
        curvscope.capture(tmp_path / "d.pt", model, batch, "cross_entropy", optimizer=optimizer, clip_norm=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_classes_in_any_integer_dtype(dtype: torch.dtype, model: Net, pair: Any, tmp_path: Path) -> None:
    capture(tmp_path / "bundle.pt", model, (pair[0], pair[1].to(dtype)), "cross_entropy")
    targets = load_problem(tmp_path / "bundle.pt").targets
    assert targets.dtype == torch.int64
    assert torch.equal(targets, pair[1])
