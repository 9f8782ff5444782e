"""What defines one run of the demo, and how a run is stopped with a message."""

from dataclasses import dataclass

#: Parameter dtypes and how they train: bfloat16 means float32 parameters under autocast.
#: float16 is left out on purpose: it needs loss scaling, which skips steps on overflow, and two
#: trainings that skip different steps cannot be compared.
DTYPES = ("float32", "float64", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")
VARIANTS = ("reference", "fused")
DEFAULT_EPOCHS = {"mnist": 1, "digits": 10}


class Stop(Exception):
    """Ends the run with one line for the user and an exit code (1: result, 2: usage)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Config:
    """Everything that the trained weights depend on; stored in checkpoints and results.json."""

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
