"""The committed samples are what they are said to be, and the script that makes them runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from sample_models.data import CLASSES, IMAGE_SIZE, Digits
from sample_models.train import FOLDER, RECIPES, main, train

OPTIMIZERS = {"digits_mlp": "SGD", "digits_cnn": "AdamW", "digits_vit": "AdamW"}
SIZE_LIMIT = 1_000_000
BATCH_ACCURACY = 0.95

every_sample = pytest.mark.parametrize("name", list(RECIPES))


def read(name: str) -> dict[str, Any]:
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def noise(examples: int = 80) -> Digits:
    """Random images in the place of the digits, so that the training loop is tested without scikit-learn."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(examples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(CLASSES, (examples,), generator=generator)
    return Digits(images, labels, images, labels)


@every_sample
def test_bundle_is_small(name: str) -> None:
    assert 0 < (FOLDER / f"{name}.pt").stat().st_size < SIZE_LIMIT


@every_sample
def test_bundle_holds_batch_loss_and_optimizer(name: str) -> None:
    recipe, bundle = RECIPES[name], read(name)
    assert (bundle["format"], bundle["version"]) == ("curvscope-bundle", 1)
    assert bundle["step"] == recipe.steps
    assert bundle["loss"]["name"] == "cross_entropy"
    assert bundle["batch"]["targets"].shape == (recipe.batch_size,)

    expected = [parameter for parameter, _ in recipe.model().named_parameters()]
    optimizer = bundle["optimizer"]
    assert optimizer["class"].rpartition(".")[2] == OPTIMIZERS[name]
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
    (images,) = bundle["batch"]["inputs"]["args"]
    with torch.no_grad():
        outputs = graph(images)
    assert outputs.shape == (len(images), CLASSES)
    accuracy = (outputs.argmax(dim=1) == bundle["batch"]["targets"]).double().mean().item()
    assert accuracy >= BATCH_ACCURACY


@every_sample
def test_training_repeats_to_the_bit(name: str) -> None:
    torch.manual_seed(5)
    first = train(RECIPES[name], noise(), steps=2)
    torch.manual_seed(6)
    second = train(RECIPES[name], noise(), steps=2)
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    assert torch.equal(first.inputs, second.inputs)


def test_training_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(RECIPES["digits_vit"], noise(), steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@every_sample
def test_script_writes_a_bundle(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the images; it comes with the extra 'samples'")
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
