"""What the samples learn from: scikit-learn's digits, texts that come with Python, a graph that comes with networkx."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IMAGE_SIZE = 16
CLASSES = 10
TEST_EXAMPLES = 360
SPLIT_SEED = 0

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0.,:;'\"()[]_-=*"
CONTEXT = 16
TEXT_SHA256 = "20edb769dc9528d4d604d2a63103086a412764cac5120f3bde477f2eb2bffdf6"
TEXT_PYTHON = "3.11"

TEST_NODES = 10


@dataclass(frozen=True)
class Digits:
    """The digits in two parts: images float32 [n, 1, 16, 16], labels int64 [n]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches, a new permutation each epoch, the incomplete last batch left out."""
        for chosen in _chosen(len(self.train_labels), size, seed):
            yield self.train_images[chosen], self.train_labels[chosen]

    def score(self, model: nn.Module) -> str:
        """The share of test images that get their label."""
        right = (model(self.test_images).argmax(dim=1) == self.test_labels).double().mean().item()
        return f"test accuracy {right:.1%}"


@dataclass(frozen=True)
class Pixels:
    """Digits as an autoencoder sees them: ink [n, 64] from 0 to 1, which is input and target at once."""

    train: Tensor
    test: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches, as those of `Digits`."""
        for chosen in _chosen(len(self.train), size, seed):
            yield self.train[chosen], self.train[chosen]

    def score(self, model: nn.Module) -> str:
        """The test images' squared reconstruction error, as a share of their variance."""
        gap = (torch.sigmoid(model(self.test)) - self.test).square().mean()
        return f"test error {gap.item() / (self.test - self.train.mean(0)).square().mean().item():.1%} of the variance"


@dataclass(frozen=True)
class Tumours:
    """Scikit-learn's breast cancer data: 30 measures of a tumour, standardised, float32 [n, 30]; labels 0 and 1."""

    train_images: Tensor
    train_labels: Tensor


@dataclass(frozen=True)
class Text:
    """A text as numbers of `ALPHABET`, int64: the first nine tenths to train on, the rest to test."""

    train: Tensor
    test: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless windows [size, CONTEXT] from anywhere in the text; each is its own target, shifted by the loss."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - CONTEXT, (size, 1), generator=generator)
            windows = self.train[starts + torch.arange(CONTEXT)]
            yield windows, windows

    def score(self, model: nn.Module) -> str:
        """Bits a character of the test text, in windows side by side."""
        windows = self.test[: len(self.test) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        logits = model(windows)[:, :-1]
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
        return f"test {nats / torch.log(torch.tensor(2.0)).item():.2f} bits a character"


@dataclass(frozen=True)
class Neighbourhoods:
    """Every member of a club with those around them, each such graph an example: the label is the member's.

    `members` [m] of one graph, with its `edges` [2, e] and their `weights` [e]. `test` are members whose label is not
    trained on; they stand in other members' graphs all the same.
    """

    graphs: tuple[tuple[Tensor, Tensor, Tensor], ...]
    labels: Tensor
    train: Tensor
    test: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Endless batches of graphs side by side, a new permutation each epoch."""
        for chosen in _chosen(len(self.train), size, seed):
            yield self.join(self.train[chosen]), self.labels[self.train[chosen]]

    def score(self, model: nn.Module) -> str:
        """The share of test members that get their label."""
        right = model(**self.join(self.test)).argmax(dim=1) == self.labels[self.test]
        return f"test accuracy {right.double().mean().item():.1%}"

    def join(self, chosen: Tensor) -> dict[str, Tensor]:
        """The chosen graphs as one, nodes and edges one graph after the other, with the batch vector."""
        graphs = [self.graphs[int(i)] for i in chosen]
        sizes = torch.tensor([len(members) for members, _, _ in graphs])
        starts = (sizes.cumsum(0) - sizes).tolist()
        return {
            "member": torch.cat([members for members, _, _ in graphs]),
            "edge_index": torch.cat([edges + start for (_, edges, _), start in zip(graphs, starts, strict=True)], 1),
            "edge_weight": torch.cat([weights for _, _, weights in graphs]),
            "batch": torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        }


def load_tumours() -> Tumours:
    """All 569 of them, in an order of `SPLIT_SEED`."""
    from sklearn.datasets import load_breast_cancer

    measures, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = torch.as_tensor(measures)[order]
    return Tumours(((rows - rows.mean(0)) / rows.std(0)).float(), torch.as_tensor(labels)[order].long())


def load_digits() -> Digits:
    """The 1797 digits, upsampled bilinearly from 8x8, split once into 1437 and 360 by a fixed permutation.

    Pixels are scaled to [0, 1], then shifted and scaled by the mean and deviation of the training pixels.

    Raises:
        ModuleNotFoundError: scikit-learn, which brings the images, is not installed.
    """
    pixels, labels, train, test = _digits()
    images = torch.nn.functional.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Digits(images[train], labels[train], images[test], labels[test])


def load_pixels() -> Pixels:
    """The same digits and the same split, 8x8 as they come.

    Raises:
        ModuleNotFoundError: scikit-learn, which brings the images, is not installed.
    """
    pixels, _, train, test = _digits()
    return Pixels(pixels[train].flatten(1), pixels[test].flatten(1))


def load_text() -> Text:
    """The pages that Python's `help()` shows on its topics, in small letters, digits as 0, other signs as *.

    Every Python of one version has the same; the sample was trained on that of `TEXT_PYTHON`, see `text_is_known`.
    """
    letters = _letters()
    place = {letter: number for number, letter in enumerate(ALPHABET)}
    numbers = torch.tensor([place[letter] for letter in letters])
    cut = len(numbers) * 9 // 10
    return Text(numbers[:cut], numbers[cut:])


def text_is_known() -> bool:
    """Whether this Python brings the very text that the sample was trained on."""
    return hashlib.sha256(_letters().encode()).hexdigest() == TEXT_SHA256


def _letters() -> str:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    return "".join("0" if c.isdigit() else c if c in ALPHABET else "*" for c in text)


def load_neighbourhoods() -> Neighbourhoods:
    """Zachary's karate club: around each of the 34 members those who know that member.

    Labels are the two clubs that it split into. Edges go both ways; their weights count what two members did together.

    Raises:
        ModuleNotFoundError: networkx, which brings the graph, is not installed.
    """
    from networkx import ego_graph, karate_club_graph

    club = karate_club_graph()
    graphs = []
    for member in club:
        around = ego_graph(club, member, radius=1)
        members = sorted(around)
        place = {other: number for number, other in enumerate(members)}
        pairs = [(a, b, float(w)) for a, b, w in around.edges(data="weight")]
        edges = torch.tensor([[place[a], place[b]] for a, b, _ in pairs] + [[place[b], place[a]] for a, b, _ in pairs])
        weights = torch.tensor([w for _, _, w in pairs] * 2)
        graphs.append((torch.tensor(members), edges.T.contiguous(), weights))
    labels = torch.tensor([int(club.nodes[member]["club"] == "Officer") for member in club])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return Neighbourhoods(tuple(graphs), labels, order[TEST_NODES:], order[:TEST_NODES])


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels [1797, 1, 8, 8] from 0 to 1, labels, and which are for training and for testing."""
    from sklearn.datasets import load_digits as load_from_sklearn

    bunch = load_from_sklearn()
    pixels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return pixels, labels, order[TEST_EXAMPLES:], order[:TEST_EXAMPLES]


def _chosen(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless choices of `size` of `count`, a new permutation each epoch, the incomplete last one left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
