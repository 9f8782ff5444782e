"""Which way each unit of the tail goes, and what of its output is kept: by shapes alone.

Forward, backward and the fake of forward each make the plans of a block, and find the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import algebra
from .operands import pixels
from .rules import images_to_keep, uses_gram


class TailPlan(NamedTuple):
    """The way of one tail unit, conv3+bn3 or the downsample.

    gram: statistics from the covariance of its operand, the gram way. folded: its normalisation is
    folded into its weight: in the gram way and with fixed statistics, not in the product way.
    centred: whether its operand has a centre: where it is folded, and in 16 bits, so that what is
    rounded is the deviation from it. shared: statistics over several ranks. images: of how many
    images the product way keeps the output.
    """

    gram: bool
    folded: bool
    centred: bool
    shared: bool
    images: int

    @property
    def state_length(self) -> int:
        """How many tensors of a ``TailState`` there are."""
        if self.gram:
            return 7 if self.shared else 5
        if self.folded:
            return 3
        return 4 if self.centred else 3


def tail_plans(
    weights: Sequence[Tensor],
    batch: Sequence[bool],
    x: Tensor,
    y1: Tensor,
    y2: Tensor,
    group: str | None,
) -> list[TailPlan]:
    """The plans of the tail units with those weights and, if batch, statistics of the batch.

    With statistics over several ranks they go the gram way: ranks of unequal batches must go one
    way. Otherwise ``rules.uses_gram`` chooses, the last unit first: it has the more channels, so
    that to keep an image of its output saves more.

    x: the block's input; y1, y2: the outputs of its first convolutions. Only shapes matter.
    """
    block = _Block(weights, x, y1, y2)
    grams = list(batch)
    images = [0 for _ in weights]
    if group is None:
        grams = [own and block.uses_gram(w, 0) for w, own in zip(weights, batch, strict=True)]
        for i in reversed(range(len(weights))):
            if batch[i]:
                grams[i], images[i] = block.choose(i, grams, images)
    return [
        TailPlan(gram, gram or not own, _is_centred(y2, gram or not own), group is not None, kept)
        for gram, own, kept in zip(grams, batch, images, strict=True)
    ]


def _is_centred(y2: Tensor, folded: bool) -> bool:
    return folded or y2.dtype.itemsize == 2


class _Block(NamedTuple):
    """The sizes that decide."""

    weights: Sequence[Tensor]
    x: Tensor
    y1: Tensor
    y2: Tensor

    def uses_gram(self, weight: Tensor, kept: float) -> bool:
        """Of a unit with batch statistics, were that part of its output kept in the product way."""
        width, channels = weight.shape[:2]
        y2 = self.y2
        return uses_gram(y2.device.type, y2.dtype, pixels(y2), channels, width, kept)

    def choose(self, i: int, grams: Sequence[bool], images: Sequence[int]) -> tuple[bool, int]:
        """Whether the i-th unit goes the gram way, and if not how many images are kept; images: of
        the other units."""
        others = [gram and j != i for j, gram in enumerate(grams)]
        count = self.y2.shape[0]
        kept = self._kept_bytes(others) + sum(images) * self._image_bytes()
        room = images_to_keep(count, self._image_bytes(), kept, self._plain_bytes())
        gram = self.uses_gram(self.weights[i], room / max(1, count))
        return gram, 0 if gram else room

    def _image_bytes(self) -> int:
        """Of an image of an output."""
        _, _, h, w = self.y2.shape
        return self.y2.dtype.itemsize * self.weights[0].shape[0] * h * w

    def _plain_bytes(self) -> int:
        """What the plain block keeps."""
        wide = (len(self.weights) + 1) * pixels(self.y2) * self.weights[0].shape[0]
        return self.y2.dtype.itemsize * (
            self.x.numel() + 2 * (self.y1.numel() + self.y2.numel()) + wide
        )

    def _kept_bytes(self, grams: Sequence[bool]) -> int:
        """What this one does, without images of an output."""
        y1, y2, width = self.y1, self.y2, self.weights[0].shape[0]
        tensors = y2.dtype.itemsize * (self.x.numel() + y1.numel() + y2.numel())
        vectors = 2 * (y1.shape[1] + y2.shape[1])
        vectors += sum(2 * (w.shape[0] + w.shape[1]) for w in self.weights)
        matrices = sum(
            w.shape[0] * w.shape[1] for w, gram in zip(self.weights, grams, strict=True) if gram
        )
        coefficients = algebra.accumulation_dtype(y2.dtype).itemsize * (vectors + matrices)
        return tensors + pixels(y2) * width // 8 + coefficients
