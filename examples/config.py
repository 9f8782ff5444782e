"""What defines one training and how it is run, and how a run is stopped with a message."""

from dataclasses import dataclass
from pathlib import Path

#: Parameter dtypes and how they train: bfloat16 means float32 parameters under autocast.
#: Two trainings in them can be compared.
DTYPES = ("float32", "float64", "bfloat16")
#: float16 (autocast as well) needs loss scaling, which skips steps on overflow, and two trainings
#: that skip different steps cannot be compared.
SINGLE_DTYPES = ("float16",)
LAYOUTS = ("contiguous", "channels_last")
VARIANTS = ("reference", "fused")
SMALL = "small"
#: Constructors of torchvision.models whose blocks are bottlenecks.
MODELS = (
    SMALL,
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
#: The sets that come inside Python packages, and how often to pass over them.
DEFAULT_EPOCHS = {"mnist": 1, "digits": 10}
FOLDER_EPOCHS = 90


class Stop(Exception):
    """Ends the run with one line for the user and an exit code (1: result, 2: usage).

    Attributes:
        everywhere: whether all processes of the run stop with it, so that one of them can speak
            for all.
    """

    def __init__(self, message: str, exit_code: int, everywhere: bool = True) -> None:
        super().__init__(message, exit_code, everywhere)  # what pickle makes it from
        self.exit_code = exit_code
        self.everywhere = everywhere

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Config:
    """Everything that the trained weights depend on; stored in checkpoints and results.json.

    ``batch_size`` counts the images of a step in all processes together. ``channels``, ``classes``
    and ``train_images`` are those of the data; ``data.describe`` fills them in.
    """

    data: str
    epochs: int
    width: int = 48
    blocks_per_stage: tuple[int, ...] = (2, 1)
    batch_size: int = 32
    lr: float = 0.05
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    layout: str = "channels_last"
    variants: tuple[str, ...] = VARIANTS
    model: str = SMALL
    image_size: int = 224
    warmup_epochs: float | None = None
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    sync_bn: bool = False
    channels: int = 1
    classes: int = 10
    train_images: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether the data are image files, and not one of the sets inside Python packages."""
        return self.data not in DEFAULT_EPOCHS

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training images."""
        return self.train_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def warmup_steps(self, total_steps: int) -> int:
        """Steps until the peak learning rate; a tenth of all if ``warmup_epochs`` is None."""
        if self.warmup_epochs is None:
            return max(1, round(0.1 * total_steps))
        return round(total_steps * self.warmup_epochs / self.epochs)


@dataclass(frozen=True)
class RunOptions:
    """How a training is run; the trained weights do not depend on it.

    Attributes:
        output: directory of everything that is written; made if needed.
        resume: None: start again; "required": continue from the newest checkpoint; "auto":
            continue from the newest intact one, or start if there is none.
        stop_after: stop with a checkpoint when this many steps are done; None means never.
        checkpoint_every: steps between checkpoints; there is one after every epoch, too.
        keep_checkpoints: how many of the newest are kept.
        workers: processes that load images, for each process that trains; 0: it does so itself.
        tensorboard: write scalars for TensorBoard.
    """

    output: Path
    resume: str | None
    stop_after: int | None
    checkpoint_every: int
    keep_checkpoints: int
    workers: int
    tensorboard: bool

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.output / "checkpoint.pt"
