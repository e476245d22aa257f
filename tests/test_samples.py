"""The committed samples are what they are said to be, and the script that makes them runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import curvscope
from sample_models import data
from sample_models.data import ALPHABET, CLASSES, CONTEXT, IMAGE_SIZE, Digits, Neighbourhoods, Pixels, Text
from sample_models.train import FOLDER, LOSSES, RECIPES, Data, main, train

SIZE_LIMIT = 1_000_000


@dataclass(frozen=True)
class Said:
    """What is said of a sample: its optimizer, the shape of its outputs, and the most that its loss may be."""

    optimizer: str
    outputs: tuple[int, ...]
    loss: float
    needs: str = "sklearn"


SAID = {
    "digits_mlp": Said("SGD", (64, CLASSES), 0.15),
    "digits_cnn": Said("AdamW", (64, CLASSES), 0.15),
    "digits_vit": Said("AdamW", (64, CLASSES), 0.15),
    "digits_autoencoder": Said("SGD", (32, 64), 0.3),
    "text_gpt": Said("AdamW", (8, CONTEXT, len(ALPHABET)), 2.0, needs=""),
    "graph_gnn": Said("Adam", (12, 2), 0.2, needs="networkx"),
}

every_sample = pytest.mark.parametrize("name", list(RECIPES))


def read(name: str) -> dict[str, Any]:
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def digits(examples: int = 80) -> Digits:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(examples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(CLASSES, (examples,), generator=generator)
    return Digits(images, labels, images, labels)


def text() -> Text:
    numbers = torch.randint(len(ALPHABET), (400,), generator=torch.Generator().manual_seed(1))
    return Text(numbers, numbers)


def neighbourhoods() -> Neighbourhoods:
    rings = []
    for size in range(2, 22):
        i = torch.arange(size)
        rings.append((i, torch.stack([i, (i + 1) % size]), torch.ones(size)))
    return Neighbourhoods(tuple(rings), torch.arange(20) % 2, torch.arange(16), torch.arange(16, 20))


NOISE: dict[Callable[[], Data], Callable[[], Data]] = {
    data.load_digits: digits,
    data.load_pixels: lambda: Pixels(digits().train_images[:, 0, :8, :8].flatten(1).sigmoid(), torch.rand(8, 64)),
    data.load_text: text,
    data.load_neighbourhoods: neighbourhoods,
}


def noise(name: str) -> Data:
    """Random data in the place of the sample's own, so that the training loop is tested without other packages."""
    return NOISE[RECIPES[name].data]()


@every_sample
def test_bundle_is_small(name: str) -> None:
    assert 0 < (FOLDER / f"{name}.pt").stat().st_size < SIZE_LIMIT


@every_sample
def test_bundle_holds_batch_loss_and_optimizer(name: str) -> None:
    recipe, bundle = RECIPES[name], read(name)
    assert (bundle["format"], bundle["version"]) == ("curvscope-bundle", 1)
    assert bundle["step"] == recipe.steps
    assert bundle["loss"]["name"] == recipe.loss
    assert len(bundle["batch"]["targets"]) == recipe.batch_size
    assert bundle.get("example_index") == recipe.example_index

    expected = [parameter for parameter, _ in recipe.model().named_parameters()]
    optimizer = bundle["optimizer"]
    assert optimizer["class"].rpartition(".")[2] == SAID[name].optimizer
    assert list(optimizer["param_names"]) == expected
    assert len(optimizer["state_dict"]["state"]) == len(expected)


@every_sample
def test_bundle_names_no_path_of_this_machine(name: str) -> None:
    content = bytes(read(name)["graph"].numpy())
    assert str(FOLDER).encode() not in content
    assert b"site-packages" not in content


@every_sample
def test_captured_graph_knows_its_batch(name: str) -> None:
    bundle = read(name)
    graph = torch.export.load(io.BytesIO(bytes(bundle["graph"].numpy()))).module()
    inputs = bundle["batch"]["inputs"]
    with torch.no_grad():
        outputs = graph(*inputs["args"], *inputs["kwargs"].values())
    assert tuple(outputs.shape) == SAID[name].outputs
    assert LOSSES[RECIPES[name].loss](outputs, bundle["batch"]["targets"]).item() < SAID[name].loss


@every_sample
def test_training_repeats_to_the_bit(name: str) -> None:
    torch.manual_seed(5)
    given = noise(name)
    first = train(RECIPES[name], given, steps=2)
    torch.manual_seed(6)
    second = train(RECIPES[name], given, steps=2)
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    assert torch.equal(first.targets, second.targets)
    assert first.score == second.score


def test_training_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(RECIPES["digits_vit"], digits(), steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@every_sample
def test_script_writes_a_bundle(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if SAID[name].needs:
        pytest.importorskip(SAID[name].needs, reason="it brings the data; it comes with the extra 'samples'")
    assert main([name, "--steps", "2", "--folder", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.pt"]
    assert capsys.readouterr().out.startswith(f"{name}: step 2,")
    assert torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"] == 2


def test_script_lists_the_samples_when_a_name_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["digits_gan"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "digits_gan" in error
    assert all(name in error for name in RECIPES)


def test_another_text_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "_letters", lambda: "another text, of another python" * 20)
    assert not data.text_is_known()
    assert main(["text_gpt", "--steps", "1", "--folder", str(tmp_path)]) == 0
    assert "texts differ" in capsys.readouterr().err
    loaded = data.load_text()
    assert len(loaded.train) == 558
    assert "".join(ALPHABET[i] for i in loaded.train[:12]) == "another text"


def test_signs_outside_the_alphabet_are_told_apart_from_letters() -> None:
    assert set(data._letters()) <= set(ALPHABET)


def test_windows_are_targets_of_their_own() -> None:
    inputs, targets = next(text().batches(5, seed=0))
    assert inputs.shape == (5, CONTEXT)
    assert torch.equal(inputs, targets)


def test_neighbourhoods_are_joined_without_edges_between_them() -> None:
    inputs, labels = next(neighbourhoods().batches(6, seed=0))
    source, target = inputs["edge_index"]
    assert torch.equal(inputs["batch"][source], inputs["batch"][target])
    assert len(labels) == 6 == int(inputs["batch"].max()) + 1
    sizes: Tensor = inputs["batch"].bincount()
    for graph, size in enumerate(sizes.tolist()):
        assert inputs["member"][inputs["batch"] == graph].tolist() == list(range(size))


def test_the_club_is_the_one_that_split() -> None:
    pytest.importorskip("networkx", reason="it brings the graph; it comes with the extra 'samples'")
    club = data.load_neighbourhoods()
    assert len(club.graphs) == 34
    assert sum(edges.shape[1] for _, edges, _ in club.graphs) == 2 * (2 * 78 + 3 * 45)  # own edges, then triangles
    assert int(club.labels.sum()) == 17


def test_the_graph_sample_is_a_batch_of_unequal_graphs() -> None:
    run = curvscope.analyze(FOLDER / "graph_gnn.pt", dtype="float64")
    assert run.model.examples == 12
    assert run.coverage == 1.0
    vector = read("graph_gnn")["batch"]["inputs"]["kwargs"]["batch"]
    assert run.layers["conv1.linear"].row.positions == pytest.approx(len(vector) / 12)
    assert run.layers["head"].row.positions == 1
