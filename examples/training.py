"""One network in training, and several in lockstep on the same batches."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import distributed
import torch
from config import Config, Stop
from data import Batch
from model import build
from schedule import learning_rate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

#: Variants take turns of this many steps, so whatever else the machine does hits them equally, and
#: a device is waited for, and processes compare notes, only once a turn.
CHUNK = 4
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Training:
    """Model, optimiser and history of one variant.

    Attributes:
        model: the network, the same in all processes but for running statistics.
        ema: an exponential moving average of it; None without ``config.ema_decay``.
        losses: training loss of every step so far, the mean over the processes.
        seconds: wall time of every step so far (forward, backward, update), as a mean over its
            turn.
        accuracies: test accuracy of the model, and of its average if there is one, every epoch.
    """

    def __init__(self, config: Config, variant: str, total_steps: int) -> None:
        self.config = config
        self.variant = variant
        self.total_steps = total_steps
        self.model = build(config, variant)
        self.ema = _averaged(self.model, config.ema_decay)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
        device = torch.device(config.device).type
        self.scaler = torch.amp.GradScaler(device, enabled=config.dtype == "float16")
        self.steps = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracies: list[list[float]] = []
        self._parallel = distributed.data_parallel(self.model, config.sync_bn)

    def take_turn(self, batches: Sequence[Batch]) -> None:
        """A step with each batch; raises ``Stop`` in all processes if a loss is not finite."""
        start = time.perf_counter()
        losses = distributed.mean(torch.stack([self.step(*batch) for batch in batches]))
        self.losses += losses.tolist()  # waits for the device
        self.seconds += [(time.perf_counter() - start) / len(batches)] * len(batches)
        for step, loss in enumerate(self.losses[-len(batches) :], self.steps - len(batches) + 1):
            if not math.isfinite(loss):
                raise Stop(
                    f"the loss of the {self.variant} training is {loss} at step {step}: try a "
                    f"lower --lr than {self.config.lr}; the last checkpoint is left as it is",
                    exit_code=1,
                )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update from a batch ``[N, C, H, W]``, ``[N]`` that lies on the device.

        Returns the loss, which the device may still be computing.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.steps, self.total_steps, config.lr, config.warmup_steps(self.total_steps)
            )
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        self.scaler.scale(loss).backward()
        if config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.steps += 1
        return loss.detach()

    def leave_group(self) -> None:
        """Let go of the other processes, before the process group is destroyed.

        If DistributedDataParallel is the last to hold a gloo group, it waits for the group's
        threads with the GIL, for which they may wait themselves (torch 2.13).
        """
        self._parallel = self.model

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of a batch, computed from logits in the parameters' dtype."""
        logits = self._logits(self._parallel, images)
        return nn.functional.cross_entropy(
            logits, labels, label_smoothing=self.config.label_smoothing
        )

    @torch.no_grad()
    def test(self, batches: Iterable[Batch]) -> None:
        """Note the fractions of all processes' images that are classified correctly in eval mode,
        by the model, and by its average if there is one."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for model in models:
            distributed.share_buffers(model)
            model.eval()
        counts = torch.zeros(len(models) + 1, dtype=torch.int64, device=self.config.device)
        for images, labels in batches:
            correct = [(self._logits(m, images).argmax(1) == labels).sum() for m in models]
            counts += torch.stack([*correct, correct[0].new_tensor(len(labels))])
        self.model.train()
        *right, count = distributed.total(counts).tolist()
        self.accuracies.append([number / count for number in right])

    @property
    def accuracy(self) -> float:
        """Test accuracy of the model after the last epoch."""
        return self.accuracies[-1][0]

    @property
    def ema_accuracy(self) -> float | None:
        """That of its average; None without one."""
        return None if self.ema is None else self.accuracies[-1][1]

    @property
    def best_accuracy(self) -> float:
        """The best of all epochs: of the average if there is one, else of the model."""
        return max(epoch[-1] for epoch in self.accuracies)

    @property
    def is_best(self) -> bool:
        """Whether the last epoch is better than all before it."""
        return all(self.accuracies[-1][-1] > epoch[-1] for epoch in self.accuracies[:-1])

    @property
    def images_per_second(self) -> float:
        """From the median step, which the first, slow steps do not move."""
        return self.config.batch_size / statistics.median(self.seconds)

    @property
    def recent_images_per_second(self) -> float:
        """The same of the last few steps, for a progress display."""
        return self.config.batch_size / statistics.median(self.seconds[-CHUNK:])

    def weights(self) -> dict[str, Tensor]:
        """What to use after training: the average's ``state_dict`` if there is one."""
        return (self.model if self.ema is None else self.ema.module).state_dict()

    def check_finite(self) -> None:
        """Raise ``Stop`` if a weight or a statistic is not: the loss shows it a step too late."""
        tensors = [*self.model.state_dict().values(), *self.weights().values()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise Stop(
                f"the weights of the {self.variant} training are not finite after step "
                f"{self.steps}: try a lower --lr than {self.config.lr}; the last checkpoint is "
                "left as it is",
                exit_code=1,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the history.

        The schedule and the order of the images depend on the number of steps alone, which is that
        of the losses.
        """
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "accuracies": self.accuracies,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.losses = list(state["losses"])
        self.seconds = list(state["seconds"])
        self.accuracies = list(state["accuracies"])
        self.steps = len(self.losses)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        dtype = _AUTOCAST.get(self.config.dtype)
        if dtype is None:
            return model(images)
        with torch.autocast(images.device.type, dtype):
            return model(images).float()


def train_in_lockstep(
    trainings: Sequence[Training],
    batches: Iterator[Batch],
    stop: int,
    on_turn: Callable[[Training], None],
) -> None:
    """Bring all trainings to step ``stop``.

    The trainings take turns of ``CHUNK`` steps on the same batches. Who goes first changes every
    turn, so that a machine that slows down or speeds up favours nobody.
    """
    while (done := trainings[0].steps) < stop:
        turn = list(islice(batches, min(CHUNK, stop - done)))
        order = trainings if done // CHUNK % 2 == 0 else trainings[::-1]
        for training in order:
            training.take_turn(turn)
            on_turn(training)


def _averaged(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.eval()
