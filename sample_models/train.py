"""Trains the samples and leaves each as a curvscope bundle: `python -m sample_models.train [NAME...]`.

The same machine and torch give the same weights to the bit: one thread, fixed seeds, deterministic kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import curvscope
from sample_models.data import Digits, load_digits
from sample_models.models import digits_cnn, digits_mlp, digits_vit

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """How one sample is trained: its network, its optimizer, the number of steps and the batch size.

    The learning rate is constant, so that the captured optimizer state is that of a run in progress.
    """

    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int = 460
    batch_size: int = 64
    seed: int = 0


RECIPES = {
    "digits_mlp": Recipe(digits_mlp, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
    "digits_cnn": Recipe(digits_cnn, lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2)),
    "digits_vit": Recipe(digits_vit, lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-2)),
}


@dataclass(frozen=True)
class Trained:
    """What one training left: the model in training mode, its optimizer, the batch that would come next."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    step: int
    loss: float
    test_accuracy: float


def shuffled_batches(digits: Digits, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches, a new permutation each epoch, the incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield digits.train_images[chosen], digits.train_labels[chosen]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that get their label, in eval mode; the model's mode is put back."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return (model(images).argmax(dim=1) == labels).double().mean().item()
    finally:
        model.train(mode)


def train(recipe: Recipe, digits: Digits, steps: int | None = None) -> Trained:
    """One network trained on cross-entropy for `steps` steps (the recipe's own number by default)."""
    total = recipe.steps if steps is None else steps
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = recipe.model().train()
        optimizer = recipe.optimizer(model.parameters())
        batches = shuffled_batches(digits, recipe.batch_size, recipe.seed)
        loss = torch.tensor(float("nan"))
        for _ in range(total):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        inputs, targets = next(batches)
        test_accuracy = accuracy(model, digits.test_images, digits.test_labels)
        return Trained(model, optimizer, inputs, targets, total, loss.item(), test_accuracy)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)


def make(name: str, digits: Digits, folder: Path = FOLDER, steps: int | None = None) -> tuple[Path, Trained]:
    """The bundle `folder/name.pt` of one freshly trained sample, and what was trained."""
    trained = train(RECIPES[name], digits, steps)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    curvscope.capture(
        path,
        trained.model,
        (trained.inputs, trained.targets),
        loss="cross_entropy",
        optimizer=trained.optimizer,
        step=trained.step,
    )
    return path, trained


def main(arguments: list[str] | None = None) -> int:
    """Trains the named samples (all three by default) and prints one line for each."""
    parser = argparse.ArgumentParser(prog="python -m sample_models.train", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)} (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the bundles go (default: here)")
    parser.add_argument("--steps", type=int, default=None, help="steps instead of the recipe's own number")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(RECIPES))
    if unknown:
        parser.error(f"no sample is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    try:
        digits = load_digits()
    except ModuleNotFoundError as error:
        print(f"{error}: the images come with scikit-learn.\nRun: pip install '.[samples]'", file=sys.stderr)
        return 2
    for name in options.names or RECIPES:
        path, trained = make(name, digits, options.folder, options.steps)
        print(
            f"{name}: step {trained.step}, training loss {trained.loss:.3f}, "
            f"test accuracy {trained.test_accuracy:.1%}, {path} ({path.stat().st_size / 1024:.0f} KiB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
