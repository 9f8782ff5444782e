"""What every test runs under: fixed seeds, one thread, and NaN in memory nobody has written."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
from helpers import IMPLEMENTATIONS
from ranks import Pool

from fused_bottleneck import cpu, cpu_block, extension, tail_plan

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_caches: list[str] = []


def pytest_configure() -> None:
    """A cache of compiled graphs for this run alone: the key of a graph has the names of its custom
    ops, not what they return in this version."""
    if _CACHE not in os.environ:  # else of the process that started this one, or the user's wish
        _caches.append(tempfile.mkdtemp(prefix="inductor"))
        os.environ[_CACHE] = _caches[0]


def pytest_unconfigure() -> None:
    for path in _caches:
        shutil.rmtree(path, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One seed, and one thread: for tensors this small a second costs more than it does, a hundred
    times more where another process wants its core (OpenMP threads spin while they wait)."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu_block.block_of.cache_clear()  # whose rules a test may replace
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(reproducible: None) -> Iterator[None]:
    """torch.empty gives NaN: a result that depends on memory nobody has written is not finite."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads(reproducible: None) -> None:
    """For tests of what threads share; `reproducible` restores the number."""
    torch.set_num_threads(2)


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the C++ passes or with plain torch, and with one of the tail's two ways forced.

    Which way a tail takes, and in how many pieces, depends on sizes that tests do not reach.
    """
    if name == "torch":
        monkeypatch.setattr(extension, "loaded", lambda: False)
        return
    if not extension.load():
        pytest.skip(extension.reason())
    if name in ("gram", "product"):
        monkeypatch.setattr(tail_plan, "uses_gram", lambda *sizes: name == "gram")
        one_image_at_a_time(monkeypatch)


def one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors that do not fit in cache go."""
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "_CHUNK_PER_WEIGHT", 0)


@pytest.fixture(params=["extension", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the C++ passes and with plain torch."""
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with every way to compute a block."""
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes to run as ranks of a process group."""
    pool = Pool()
    yield pool
    pool.close()
