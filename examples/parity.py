"""Did two trainings learn the same? The bounds, the reasons for them, and the comparison."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Bounds(NamedTuple):
    """How far apart two trainings may be.

    Attributes:
        early: largest absolute difference of the loss at the first, second, ... step.
        final: largest absolute difference of the final losses (see ``final_loss``).
        accuracy: largest absolute difference of the test accuracies, as fractions.
    """

    early: tuple[float, ...]
    final: float
    accuracy: float


# Training amplifies rounding. A pre-activation that is zero but for rounding lies on different
# sides of a ReLU in two trainings, and in all pixels of a constant background at once. The plain
# network alone, trained in channels_last and in contiguous layout from ten seeds in float32, parts
# from itself by up to 1e-5, 7e-5 and 2e-4 in the losses of the first three steps, and by 1e-2 after
# ten. In float64 the same stays below 1e-15, so it is rounding and nothing else.
#
# The first loss checks the forward pass, the second every gradient at once: so the first three
# steps are held to a few times those figures (float64: far above rounding, far below any mistake).
# A gradient of conv3 a tenth too small, planted to see, moves the second loss by 4e-4, is caught
# there, and nowhere later.
# After them only averages can be compared. Those of two correct trainings differ by chance: the
# final loss by a few hundredths; the accuracy by a few of the test images (20 of 1000 are two
# standard deviations of the difference of two independent classifiers that are right in 95 %).
BOUNDS = {
    "float64": Bounds(early=(1e-12, 1e-11, 1e-10), final=0.05, accuracy=0.02),
    "float32": Bounds(early=(5e-5, 3e-4, 2e-3), final=0.05, accuracy=0.02),
    "bfloat16": Bounds(early=(1e-2, 2e-2, 4e-2), final=0.10, accuracy=0.03),
}

FINAL_FRACTION = 0.1


class Outcome(NamedTuple):
    """What is compared of one training: all losses, and the test accuracy as a fraction."""

    losses: Sequence[float]
    accuracy: float


class Check(NamedTuple):
    """One comparison; ``passed`` is false for a difference that is not a number, too."""

    name: str
    difference: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound


def compare(reference: Outcome, other: Outcome, bounds: Bounds) -> list[Check]:
    """The checks of ``other`` against ``reference``, trainings of equal length."""
    if len(reference.losses) != len(other.losses):
        raise ValueError(
            f"trainings of {len(reference.losses)} and {len(other.losses)} steps cannot be compared"
        )
    gaps = [abs(a - b) for a, b in zip(reference.losses, other.losses, strict=True)]
    return [
        *(
            Check(f"loss at step {step}", gap, bound)
            for step, (gap, bound) in enumerate(zip(gaps, bounds.early, strict=False), start=1)
        ),
        Check(
            "final loss",
            abs(final_loss(reference.losses) - final_loss(other.losses)),
            bounds.final,
        ),
        Check("test accuracy", abs(reference.accuracy - other.accuracy), bounds.accuracy),
    ]


def final_loss(losses: Sequence[float]) -> float:
    """Mean loss of the last tenth of the steps: single batches are noisy."""
    return statistics.fmean(losses[-max(1, round(FINAL_FRACTION * len(losses))) :])
