"""How a training is going: a progress bar, and curves for TensorBoard."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import launch
from config import Stop
from tqdm import tqdm
from training import Training


class Progress:
    """Shows the trainings from where they are; only the main process does.

    Args:
        trainings: what to show.
        last_step: where they will be in the end.
        tensorboard: directory of the curves; None for no curves.
    """

    def __init__(
        self, trainings: Sequence[Training], last_step: int, tensorboard: Path | None
    ) -> None:
        self._trainings = trainings
        self._shown = {training.variant: training.steps for training in trainings}
        done = trainings[0].steps
        self._writer = None
        if tensorboard is not None and launch.is_main():
            self._writer = _summary_writer(tensorboard, done)
        self._bar = tqdm(
            total=last_step * len(trainings),
            initial=done * len(trainings),
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not launch.is_main(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def after_turn(self, training: Training) -> None:
        """Loss of every step of the turn, learning rate and speed."""
        shown = self._shown[training.variant]
        self._shown[training.variant] = training.steps
        states = ", ".join(_state(t) for t in self._trainings if t.losses)
        self._bar.set_postfix_str(states, refresh=False)
        self._bar.update(training.steps - shown)
        for step, loss in enumerate(training.losses[shown:], shown + 1):
            self._write(f"loss/{training.variant}", loss, step)
        rate = training.optimizer.param_groups[0]["lr"]
        self._write(f"learning_rate/{training.variant}", rate, training.steps)
        speed = training.recent_images_per_second
        self._write(f"images_per_second/{training.variant}", speed, training.steps)

    def after_test(self, training: Training) -> None:
        """Test accuracy, of the averaged weights too."""
        self._write(f"accuracy/{training.variant}", training.accuracy, training.steps)
        if training.ema_accuracy is not None:
            self._write(f"accuracy_ema/{training.variant}", training.ema_accuracy, training.steps)

    def _write(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)


def _summary_writer(directory: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Stop("--tensorboard: pip install tensorboard", exit_code=2) from None
    # What a training that was killed wrote of later steps than its checkpoint's is void.
    return SummaryWriter(str(directory), purge_step=done + 1)


def _state(training: Training) -> str:
    speed = training.recent_images_per_second
    return f"{training.variant}: loss {training.losses[-1]:.3f} {speed:.0f} img/s"
