"""Trains the samples and leaves each as a curvscope bundle: `python -m sample_models.train [NAME...]`.

The same machine and torch give the same weights to the bit: one thread, fixed seeds, deterministic kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import curvscope
from sample_models import data, models

FOLDER = Path(__file__).parent


class Data(Protocol):
    """What a sample learns from: batches without end, and how good a model is on what was held back."""

    def batches(self, size: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs (a tensor, or a dict of keyword arguments) and targets."""
        ...

    def score(self, model: nn.Module) -> str:
        """The figure on held-back data, in words; the model is in eval mode."""
        ...


def next_character(outputs: Tensor, targets: Tensor) -> Tensor:
    """What `causal_lm` is: each position's cross-entropy with the next character."""
    return functional.cross_entropy(outputs[:, :-1].transpose(1, 2), targets[:, 1:])


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
    "causal_lm": next_character,
}


@dataclass(frozen=True)
class Recipe:
    """How one sample is trained: its network, data and loss, its optimizer, the number of steps and the batch size.

    The learning rate is constant, so that the captured optimizer state is that of a run in progress.
    """

    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    data: Callable[[], Data] = data.load_digits
    loss: str = "cross_entropy"
    steps: int = 460
    batch_size: int = 64
    seed: int = 0
    example_index: str | None = None


RECIPES = {
    "digits_mlp": Recipe(models.digits_mlp, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
    "digits_cnn": Recipe(models.digits_cnn, lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2)),
    "digits_vit": Recipe(models.digits_vit, lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=1e-2)),
    "digits_autoencoder": Recipe(
        models.digits_autoencoder,
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True),
        data=data.load_pixels,
        loss="bce_with_logits",
        steps=3000,
        batch_size=32,
    ),
    "text_gpt": Recipe(
        models.text_gpt,
        lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2),
        data=data.load_text,
        loss="causal_lm",
        steps=6000,
        batch_size=8,
    ),
    "graph_gnn": Recipe(
        models.graph_gnn,
        lambda p: torch.optim.Adam(p, lr=5e-3, weight_decay=5e-4),
        data=data.load_neighbourhoods,
        steps=50,
        batch_size=12,
        example_index="batch",
    ),
}


@dataclass(frozen=True)
class Trained:
    """What one training left: the model in training mode, its optimizer, the batch that would come next."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Any
    targets: Tensor
    step: int
    loss: float
    score: str


def scored(model: nn.Module, given: Data) -> str:
    """The model's score in eval mode; its mode is put back."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return given.score(model)
    finally:
        model.train(mode)


def train(recipe: Recipe, given: Data, steps: int | None = None) -> Trained:
    """One network trained for `steps` steps (the recipe's own number by default)."""
    total = recipe.steps if steps is None else steps
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = recipe.model().train()
        optimizer = recipe.optimizer(model.parameters())
        batches = given.batches(recipe.batch_size, recipe.seed)
        loss = torch.tensor(float("nan"))
        for _ in range(total):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            loss = LOSSES[recipe.loss](outputs, targets)
            loss.backward()
            optimizer.step()
        inputs, targets = next(batches)
        return Trained(model, optimizer, inputs, targets, total, loss.item(), scored(model, given))
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)


def make(name: str, given: Data, folder: Path = FOLDER, steps: int | None = None) -> tuple[Path, Trained]:
    """The bundle `folder/name.pt` of one freshly trained sample, and what was trained."""
    recipe = RECIPES[name]
    trained = train(recipe, given, steps)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    curvscope.capture(
        path,
        trained.model,
        (trained.inputs, trained.targets),
        loss=recipe.loss,
        optimizer=trained.optimizer,
        step=trained.step,
        example_index=recipe.example_index,
    )
    return path, trained


def main(arguments: list[str] | None = None) -> int:
    """Trains the named samples (all by default) and prints one line for each."""
    parser = argparse.ArgumentParser(prog="python -m sample_models.train", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)} (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the bundles go (default: here)")
    parser.add_argument("--steps", type=int, default=None, help="steps instead of the recipe's own number")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(RECIPES))
    if unknown:
        parser.error(f"no sample is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        try:
            given = RECIPES[name].data()
        except ModuleNotFoundError as error:
            print(f"{error}: the data of {name} come with it.\nRun: pip install '.[samples]'", file=sys.stderr)
            return 2
        if isinstance(given, data.Text) and not data.text_is_known():
            print(
                f"{name}: this Python's own texts differ from those of {data.TEXT_PYTHON}, on which the committed "
                "sample was trained; its figures will, too.",
                file=sys.stderr,
            )
        path, trained = make(name, given, options.folder, options.steps)
        print(
            f"{name}: step {trained.step}, training loss {trained.loss:.3f}, "
            f"{trained.score}, {path} ({path.stat().st_size / 1024:.0f} KiB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
