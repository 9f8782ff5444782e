"""Tuned configurations on disk: one file per GPU model and versions, one entry per problem.

In ``$FUSED_BOTTLENECK_CACHE``, else ``$XDG_CACHE_HOME/fused_bottleneck``, else
``~/.cache/fused_bottleneck``. Read once per process and device; written whole and then renamed, so
that a reader never sees half of it.
"""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

CACHE_VARIABLE = "FUSED_BOTTLENECK_CACHE"
FORMAT = 2  # goes up when a kernel changes what a configuration means


@dataclass(frozen=True)
class Config:
    """A kernel's blocks, in the terms of its product ``[m, k] x [k, n]``.

    Products with a row per pixel have pixels on m; products over pixels have channels on m and n,
    pixels on k, and ``rows`` pixels per partial result. taps: how many of a row of a convolution's
    taps one program of its weight gradient takes, at most.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    rows: int = 0
    taps: int = 1


class Problem(NamedTuple):
    """What a configuration is chosen for: a stage, the sizes of its product, the element type."""

    stage: str
    m: int
    n: int
    k: int
    dtype: torch.dtype

    def key(self) -> str:
        """The problem as the cache file spells it."""
        return f"{self.stage} {self.m} {self.n} {self.k} {str(self.dtype).removeprefix('torch.')}"


def cache_directory() -> Path:
    """Where tuned configurations are kept."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fused_bottleneck"


def cache_file(gpu: str) -> Path:
    """The file of a GPU model under the running versions of torch and triton."""
    import triton

    name = f"{gpu} torch {torch.__version__} triton {triton.__version__} format {FORMAT}"
    return cache_directory() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


@lru_cache
def table(device: torch.device) -> Mapping[Problem, Config]:
    """The tuned configurations of a CUDA device, read at the first call."""
    return read(cache_file(torch.cuda.get_device_name(device)))


def read(path: Path) -> dict[Problem, Config]:
    """The configurations of a file; none, with a warning, if it is not what ``write`` wrote."""
    try:
        entries = json.loads(path.read_text())
        return {_problem(key): _config(value) for key, value in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"ignoring the tuned configurations in {path}: {error}", RuntimeWarning, stacklevel=2
        )
        return {}


def _problem(key: str) -> Problem:
    stage, *sizes, dtype = key.split(" ")
    m, n, k = map(int, sizes)
    element = getattr(torch, dtype)
    if not isinstance(element, torch.dtype):
        raise ValueError(f"{dtype} is not a dtype")
    return Problem(stage, m, n, k, element)


def _config(fields: dict[str, Any]) -> Config:
    if not all(type(value) is int for value in fields.values()):
        raise ValueError(f"not a configuration: {fields}")
    return Config(**fields)


def write(path: Path, entries: Mapping[Problem, Config]) -> None:
    """Write a file that ``read`` reads, replacing what is there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({p.key(): asdict(c) for p, c in entries.items()}, indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
