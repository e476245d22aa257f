"""scikit-learn's handwritten digits, upsampled to 16x16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 16
CLASSES = 10
TEST_EXAMPLES = 360
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """The digits in two parts: images float32 [n, 1, 16, 16], labels int64 [n]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1797 digits, upsampled bilinearly from 8x8, split once into 1437 and 360 by a fixed permutation.

    Pixels are scaled to [0, 1], then shifted and scaled by the mean and deviation of the training pixels.

    Raises:
        ModuleNotFoundError: scikit-learn, which brings the images, is not installed.
    """
    from sklearn.datasets import load_digits as load_from_sklearn

    bunch = load_from_sklearn()
    pixels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    images = torch.nn.functional.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    labels = torch.tensor(bunch.target, dtype=torch.int64)

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:TEST_EXAMPLES], order[TEST_EXAMPLES:]
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Digits(images[train], labels[train], images[test], labels[test])
