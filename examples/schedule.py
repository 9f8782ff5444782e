"""The learning rate."""

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to ``peak``, then a cosine to zero.

    The values of ``SequentialLR`` over ``LinearLR`` and ``CosineAnnealingLR``, as a function of the
    step alone: nothing to save, and nothing that a step skipped by loss scaling could confuse.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
