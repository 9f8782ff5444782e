"""One network in training, and several in lockstep on the same batches."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from config import Config, Stop
from data import Dataset, batch_indices
from model import build, memory_format
from torch import Tensor, nn

#: Variants take turns of this many steps, so whatever else the machine does hits them equally.
CHUNK = 4
WARMUP_FRACTION = 0.1


class Training:
    """Model, optimiser and history of one variant.

    Attributes:
        losses: training loss of every step so far.
        seconds: wall time of every step so far: forward, backward and update.
    """

    def __init__(self, config: Config, variant: str, total_steps: int) -> None:
        self.config = config
        self.variant = variant
        self.total_steps = total_steps
        self.model = build(config, variant)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One update from a batch ``[N, 1, H, W]``, ``[N]`` that lies on the device."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(len(self.losses), self.total_steps, self.config.lr)
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        _synchronize(images.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise Stop(
                f"the loss of the {self.variant} training is {self.losses[-1]} at step "
                f"{len(self.losses)}: try a lower --lr than {self.config.lr}",
                exit_code=1,
            )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of a batch, computed from logits in the parameters' dtype."""
        return nn.functional.cross_entropy(self._logits(images), labels)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of ``images`` classified correctly in eval mode."""
        self.model.eval()
        size = 4 * self.config.batch_size
        correct = 0
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            correct += int((self._logits(x).argmax(1) == y).sum())
        self.model.train()
        return correct / len(images)

    @property
    def images_per_second(self) -> float:
        """From the median step, which the first, slow steps do not move."""
        return self.config.batch_size / statistics.median(self.seconds)

    @property
    def recent_images_per_second(self) -> float:
        """The same of the last few steps, for a progress display."""
        return self.config.batch_size / statistics.median(self.seconds[-CHUNK:])

    def state_dict(self) -> dict[str, object]:
        """Everything that the next step depends on, and the history."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.seconds = list(state["seconds"])

    def _logits(self, images: Tensor) -> Tensor:
        autocast = self.config.dtype == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            logits = self.model(images)
        return logits.float() if autocast else logits


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then a cosine to zero; a function of the step alone."""
    warmup = max(1, round(WARMUP_FRACTION * total_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def to_device(dataset: Dataset, config: Config) -> Dataset:
    """Images in the run's dtype and layout, everything on its device."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32

    def move(images: Tensor) -> Tensor:
        return images.to(config.device, dtype, memory_format=memory_format(config))

    return Dataset(
        move(dataset.train_images),
        dataset.train_labels.to(config.device),
        move(dataset.test_images),
        dataset.test_labels.to(config.device),
    )


def train_in_lockstep(
    trainings: Sequence[Training], dataset: Dataset, stop: int, on_step: Callable[[Training], None]
) -> Iterator[int]:
    """Bring all trainings to step ``stop``; yields the step reached whenever all are there.

    The trainings take turns of ``CHUNK`` steps on the same batches. Who goes first changes every
    turn, so that a machine that slows down or speeds up favours nobody.
    """
    config = trainings[0].config
    done = len(trainings[0].losses)
    order = list(trainings)
    while done < stop:
        end = min(done + CHUNK, stop)
        for training in order:
            for step in range(done, end):
                training.step(*_batch(dataset, config, step))
                on_step(training)
        order.reverse()
        done = end
        yield done


def _batch(dataset: Dataset, config: Config, step: int) -> tuple[Tensor, Tensor]:
    count = len(dataset.train_images)
    indices = batch_indices(count, config.batch_size, config.seed, step).to(config.device)
    images = dataset.train_images[indices].to(memory_format=memory_format(config))
    return images, dataset.train_labels[indices]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
