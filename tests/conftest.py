"""What every test runs under: fixed seeds, one thread, and NaN in memory nobody has written."""

from collections.abc import Iterator

import pytest
import torch

from fused_bottleneck import extension

IMPLEMENTATIONS = ["extension", "torch"]


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One seed, and one thread: for tensors this small a second costs more than it does, a hundred
    times more where another process wants its core (OpenMP threads spin while they wait)."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
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


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the C++ passes and with plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(extension, "loaded", lambda: False)
    elif not extension.load():
        pytest.skip(extension.reason())
    return request.param
