"""What the values of options may be: each function is an argparse type."""

import argparse
import math
from pathlib import Path

from config import DEFAULT_EPOCHS


def data(text: str) -> str:
    """A built-in set or a directory of image files."""
    parts = [Path(text) / part for part in ("train", "val")]
    if text not in DEFAULT_EPOCHS and not all(part.is_dir() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{', '.join(DEFAULT_EPOCHS)} or a directory with train/ and val/, not {text!r}"
        )
    return text


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    return _int_from(0, text)


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _int_from(1, text)


def batch_size(text: str) -> int:
    """An integer of at least 2: batch statistics need more than one value per channel."""
    return _int_from(2, text)


def _int_from(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"an integer of at least {least}, not {text!r}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a positive number, not {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = _float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of at least 0, not {text!r}")
    return value


def fraction(text: str) -> float:
    """From 0 to below 1."""
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to below 1, not {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
