"""Block sizes: an analytical default for each stage and shape, and what tuning may try instead.

A stage's product is ``[m, k] x [k, n]``. Which configuration it gets: the tuned one of this GPU and
shape if there is one (tuned.py), else the default of its architecture, which compiles without
spills for sm_80, sm_90 and sm_100 (tests/test_triton_compile.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from .tuned import Config, Problem, table

# Compute capabilities by their major number. The consumer GPUs of Blackwell (12) have neither the
# tensor memory of 10 and 11 nor Hopper's products: their blocks are those of sm_80.
HOPPER, BLACKWELL = 9, (10, 11)
# Shared memory of a program: what every GPU since sm_80 has (sm_86, 89 and 120 have no more).
SHARED_MEMORY = 101_376


def blocks(size: int, block: int) -> int:
    """How many blocks cover size."""
    return -(-size // block)


# Combining a channel's statistics: parts per step; the elementwise kernels.
REDUCE = Config(block_m=1024, block_n=0, block_k=0, num_warps=4, num_stages=1)
POINTWISE = Config(block_m=64, block_n=64, block_k=0, num_warps=4, num_stages=1)

# The algebra of the folded units, in exact float32: rows of the weight; blocks of its products with
# the covariance and with itself; the shift.
FOLD = Config(block_m=16, block_n=128, block_k=0, num_warps=4, num_stages=2)
FOLD_PRODUCT = Config(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)
FOLD_SHIFT = Config(block_m=0, block_n=32, block_k=128, num_warps=4, num_stages=2)

# Combining products over pixels: elements in flight in a program, parts of them at most.
_COMBINED, _MOST_PARTS = 2048, 32


def combining(parts: int) -> Config:
    """Parts per step (block_m) and elements of a program (block_n) that adds up partial products:
    many parts at a time as long as there are many, then many elements."""
    lanes = min(_MOST_PARTS, max(4, 1 << (parts - 1).bit_length()))
    return Config(lanes, _COMBINED // lanes, block_k=0, num_warps=4, num_stages=1)


_forced: Config | None = None
_overrides: dict[Problem, Config] = {}
_asked: list[Problem] | None = None


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Every stage with this configuration, whatever its sizes: for tests."""
    global _forced
    previous, _forced = _forced, config
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def overridden(problem: Problem, config: Config) -> Iterator[None]:
    """This configuration for one problem: for tuning."""
    _overrides[problem] = config
    try:
        yield
    finally:
        del _overrides[problem]


@contextmanager
def asked() -> Iterator[list[Problem]]:
    """List the problems that configurations are asked for inside."""
    global _asked
    previous, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = previous


def is_even(*sizes: tuple[int, int]) -> bool:
    """The constant EVEN of a kernel: whether blocks divide all channels, given as (channels,
    block), so that no element is to be masked for its channel (prologues.below)."""
    return all(size % block == 0 for size, block in sizes)


# The end of a stage's name where it computes a convolution's operand on load.
ON_LOAD = "_on_load"


def choose(stage: str, m: int, n: int, k: int, like: Tensor, is_computed: bool = False) -> Config:
    """The configuration of a stage for its product's sizes, on like's device in its dtype.

    is_computed: whether a convolution's operand is computed on load (rules.writes_operand).
    """
    if _forced is not None:
        return _forced
    if is_computed:
        stage += ON_LOAD
    problem = Problem(stage, m, n, k, like.dtype)
    if _asked is not None:
        _asked.append(problem)
    if problem in _overrides:
        return _overrides[problem]
    tuned = table(like.device).get(problem) if like.device.type == "cuda" else None
    return tuned or default(problem, _architecture(like.device))


_assumed = (HOPPER, 0)


@contextmanager
def assumed_architecture(capability: tuple[int, int]) -> Iterator[None]:
    """The architecture of tensors that are on no GPU: of kernels interpreted, or listed."""
    global _assumed
    previous, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = previous


def _architecture(device: torch.device) -> tuple[int, int]:
    return _capability(device) if device.type == "cuda" else _assumed


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def product_constants(
    precision: str, like: Tensor, is_computed: bool = True
) -> dict[str, str | bool]:
    """The constants of a kernel's products on like's device, in its dtype (see prologues.product).

    is_computed: whether an operand is made in registers. On Hopper alone such products are to be
    awaited: older GPUs' are synchronous, newer ones read no operand from registers, and exact
    float32 takes none of these instructions. The interpreter (like is on the CPU) takes no
    assembly.
    """
    is_hopper = like.device.type != "cpu" and _architecture(like.device)[0] == HOPPER
    is_tensor_core = like.dtype != torch.float32 or precision == "tf32"
    return {"INPUT_PRECISION": precision, "AWAIT": is_computed and is_hopper and is_tensor_core}


# Pixels of one partial result, at most: float32 accumulates over them, and the partials are added
# in float64. A covariance feeds a variance that may be small against it, so that its are shorter;
# where a partial is large (many channels) it must not be written too often.
_MOST_ROWS = {
    "gram": 2048,
    "tail_wgrad": 4096,
    "tail_wgrad_downsample": 4096,
    "conv_wgrad_pointwise": 9216,
    "conv_wgrad_taps": 9216,
}
_LEAST_ROWS = 512
# Multiprocessors of the largest GPU of an architecture, by its major number.
_MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}
_WARPS_AT_ONCE = 8  # of a product over pixels on a multiprocessor: registers allow no more
_TAPS = 9  # of a 3x3 convolution
_SMALL_GRAM = 256


@lru_cache(maxsize=4096)
def default(problem: Problem, architecture: tuple[int, int]) -> Config:
    """The analytical default: see ``_blocks``; over pixels, as many rows as fill the GPU."""
    config = _blocks(problem, architecture)
    if problem.stage.removesuffix(ON_LOAD) not in _MOST_ROWS:
        return config
    return _with_rows(problem, config, _MULTIPROCESSORS.get(architecture[0], 132))


def _with_rows(problem: Problem, config: Config, multiprocessors: int) -> Config:
    """The configuration with the pixels per partial result.

    As many parts as fill the GPU in whole rounds of programs: one program more would be another
    round. Of the fewest rounds that keep to the longest part, and up to two more, those in which
    the least is idle; more parts only write more partial results (at 7x7 those of dW2 weigh more
    than its operands).
    """
    stage, (m, n, k) = problem.stage.removesuffix(ON_LOAD), problem[1:4]
    most = _MOST_ROWS[stage]
    if stage == "gram" and m <= _SMALL_GRAM:
        most //= 2
    tiles = blocks(m, config.block_m) * blocks(n, config.block_n)
    if stage == "gram":  # those on and above the diagonal
        tiles = (tiles + blocks(m, config.block_m)) // 2
    if stage == "conv_wgrad_taps":
        tiles *= _TAPS // config.taps
    slots = multiprocessors * max(1, _WARPS_AT_ONCE // config.num_warps)
    fewest = blocks(blocks(k, most) * tiles, slots)
    parts = {rounds: max(1, rounds * slots // tiles) for rounds in range(fewest, fewest + 3)}
    best = min(parts, key=lambda rounds: rounds / parts[rounds])
    rows = max(_LEAST_ROWS, blocks(k, parts[best]))
    return replace(config, rows=blocks(rows, config.block_k) * config.block_k)


def _blocks(problem: Problem, architecture: tuple[int, int]) -> Config:
    """Blocks without spills; with 4 warps, two programs or more fit a multiprocessor, so that one's
    epilogue hides behind another's loads; with 8, where a block's reuse is worth more, mostly one.
    """
    stage, m, n, _, dtype = problem
    major = architecture[0]
    if dtype == torch.float32:
        return _float32_blocks(stage, major)
    if major == HOPPER and stage in _PLAIN_ON_HOPPER:
        few, many = _PLAIN_ON_HOPPER[stage]
        return many if (m if stage == "conv_wgrad_taps" else n) > 64 else few
    if major == HOPPER and stage == "conv_wgrad_pointwise" and min(m, n) > 64:
        return Config(128, 128, 64, 8, 3)
    stage = stage.removesuffix(ON_LOAD)
    narrow = n <= (128 if stage == "tail_wgrad_downsample" else 64)  # that has two operands
    if stage == "gram":
        return Config(64, 64, 64, 4, 3) if narrow else Config(128, 128, 32, 8, 4)
    if stage in ("tail_wgrad", "tail_wgrad_downsample") and major in BLACKWELL and narrow:
        return Config(64, 64, 32, 4, 4)
    if stage == "tail_wgrad_downsample" and major in BLACKWELL:
        return Config(64, 128, 64, 4, 3)
    if stage in ("tail_wgrad", "tail_wgrad_downsample"):
        return Config(128, 64, 64, 8, 3) if narrow else Config(128, 128, 32, 8, 4)
    is_datacenter = major == HOPPER or major in BLACKWELL
    if stage == "conv_wgrad_taps":
        return Config(64, 64, 32, 4, 3, taps=3) if is_datacenter else Config(64, 64, 64, 4, 3)
    if stage == "input_dgrad_downsample" and not is_datacenter:
        return Config(64, 64, 64, 4, 3)
    if stage == "conv1x1_forward":
        return Config(128, 64, 64, 4, 3) if narrow else Config(128, 128, 64, 8, 3)
    if stage == "tail_dgrad" and not narrow:
        return Config(128, 128, 64, 8, 3)
    if stage == "conv2d_forward" and narrow:
        return Config(128, 64, 32, 4, 4)
    return Config(64, 64, 64, 4, 3) if narrow else Config(64, 128, 64, 4, 3)


# Hopper's blocks of convolutions with plain operands, for few channels (64) and for more: both come
# from shared memory, so that registers are there for larger blocks. Warp instructions issued a
# cycle of the product units, by machine code (tests/test_triton_compile.py has a limit), few
# and many: 0.7, 0.5; 0.7, 0.6 (its epilogue needs the registers); 1.0, 0.9.
_PLAIN_ON_HOPPER = {
    "conv2d_forward": (Config(128, 64, 64, 4, 3), Config(128, 128, 64, 8, 3)),
    "conv2d_dgrad": (Config(128, 64, 64, 4, 3), Config(64, 128, 64, 4, 3)),
    "conv_wgrad_taps": (Config(64, 64, 64, 4, 3, taps=3), Config(128, 64, 32, 8, 4, taps=3)),
}


def _float32_blocks(stage: str, major: int) -> Config:
    """Exact float32 products run on ordinary registers and want small blocks; tf32 shares them."""
    if stage == "gram":
        return Config(32, 32, 32, 4, 3) if major in BLACKWELL else Config(64, 64, 16, 8, 3)
    if stage in ("tail_wgrad", "tail_wgrad_downsample"):
        return Config(64, 64, 32, 8, 2)
    if stage.removesuffix(ON_LOAD) == "input_dgrad_downsample":
        return Config(64, 64, 32, 8, 2)
    is_datacenter = major == HOPPER or major in BLACKWELL
    by_pixels = ("conv1x1_forward", "conv2d_forward", "tail_dgrad")
    if stage.removesuffix(ON_LOAD) in by_pixels and not is_datacenter:
        return Config(64, 64, 32, 8, 3)
    return Config(64, 64, 32, 4, 3)


# What tuning tries: accumulators per thread between these, as more spill and fewer leave the
# product units waiting.
_ACCUMULATORS = range(16, 129)
_DEVICE_SHARED = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}


def candidates(problem: Problem, architecture: tuple[int, int]) -> list[Config]:
    """Configurations worth trying, the default first.

    All blocks of 64 or 128 by 64, 128 or 256 by 32 or 64 with 4 or 8 warps and 2 to 4 stages,
    without those that reach far beyond the problem, hold too many or too few accumulators, or
    need more shared memory than there is. Which of them compile, the GPU says.
    """
    first = default(problem, architecture)
    tried = [first]
    shared = _DEVICE_SHARED.get(architecture, SHARED_MEMORY)
    for m, n, k, warps, stages in product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
        config = replace(first, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        if _is_sensible(problem, config, shared):
            tried.append(config)
    return list(dict.fromkeys(tried))


def _is_sensible(problem: Problem, config: Config, shared: int) -> bool:
    stage, m, n, _, dtype = problem
    accumulators = config.block_m * config.block_n * config.taps // (32 * config.num_warps)
    staged = (config.block_m + config.block_n * config.taps) * config.block_k
    fits = staged * dtype.itemsize * (config.num_stages - 1) <= shared
    reaches = config.block_n >= 2 * max(n, 64) or config.block_m >= 2 * max(m, 64)
    square = stage != "gram" or config.block_m == config.block_n
    return fits and square and not reaches and accumulators in _ACCUMULATORS
