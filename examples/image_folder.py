"""Image files: ``train/`` and ``val/``, each with a folder per class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vision
from config import Config, Stop
from data import Batch, Dataset, Images
from torch import Tensor
from torch.utils.data import default_collate

#: Mean and deviation of ImageNet's colours, by which it is customary to normalise.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
#: For testing, the shorter side becomes this much longer than the square cut out of the middle.
TEST_MARGIN = 256 / 224


class FolderImages(Images):
    """The files of one part, transformed when they are asked for.

    Args:
        folder: a ``torchvision.datasets.ImageFolder``.
        transform: from a PIL image to a tensor; may draw from torch's generator.
        seed: of what it draws.
    """

    def __init__(self, folder: Any, transform: Callable[[Any], Tensor], seed: int) -> None:
        self._samples = folder.samples
        self._load = folder.loader
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        epoch, indices = key
        images, labels = default_collate([self._sample(epoch, i) for i in indices.tolist()])
        return images, labels

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, int]:
        path, label = self._samples[index]
        try:
            image = self._load(path)
        except OSError as error:
            raise OSError(f"cannot read the image {path}: {error}") from None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_sample_seed(self._seed, epoch, index))
            return self._transform(image), label


def load(config: Config) -> Dataset:
    """Training images with random crops and flips, test images as they are, both normalised."""
    transforms = vision.torchvision().transforms
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    size = config.image_size
    augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    cut = [transforms.Resize(round(TEST_MARGIN * size)), transforms.CenterCrop(size)]
    train, test = (_folder(Path(config.data) / part) for part in ("train", "val"))
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise Stop(f"--data: train/ and val/ differ in the classes {differing}", exit_code=2)
    return Dataset(
        FolderImages(train, transforms.Compose(augment + finish), config.seed),
        FolderImages(test, transforms.Compose(cut + finish), config.seed),
        channels=3,
        image_size=size,
        classes=len(train.classes),
    )


def _folder(path: Path) -> Any:
    try:
        return vision.torchvision().datasets.ImageFolder(path)
    except OSError as error:
        raise Stop(f"--data: {error}".splitlines()[0], exit_code=2) from None


def _sample_seed(seed: int, epoch: int, index: int) -> int:
    """Well mixed, so that neighbours draw independently, whichever process loads them."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])
