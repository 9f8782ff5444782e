"""Building, installing and importing, each in a process and a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["LICENSE", "README.md", "csrc", "fused_bottleneck", "pyproject.toml", "setup.py"]

ONE_STEP = """
import torch, fused_bottleneck as fb
block = fb.FusedBottleneck(16, 4)
x = torch.randn(2, 16, 5, 5, requires_grad=True)
block(x).sum().backward()
assert x.grad is not None
"""
WARN_COUNT = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_bottleneck
    at_import = len(caught)
    for _ in range(2):
{chr(10).join(" " * 8 + line for line in ONE_STEP.splitlines())}
ours = [w for w in caught if "fused_bottleneck" in str(w.message)]
print(at_import, len(ours), fused_bottleneck.extension_loaded())
"""
NEW_MODULES = """
import sys, torch
before = set(sys.modules)
import fused_bottleneck
print(*sorted(set(sys.modules) - before))
"""


def run(command: Sequence[str | Path], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` in `cwd`, with `env` on top of this process's environment."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_python(code: str, cwd: Path, **env: str) -> str:
    """Output of `code` in a new interpreter; the test fails with its errors if it fails."""
    result = run([sys.executable, "-c", code], cwd, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the files that a build reads, without anything built."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, tree / name)
    return tree


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The process failed and its errors are one line that holds all `words`."""
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def without_optimisation(folder: Path) -> Path:
    """A C++ compiler that is done sooner; what it makes is to be linked and run once."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler


@pytest.mark.slow
def test_wheel_installs_and_trains(source_tree: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path / "dist", "."],
        source_tree,
        CXX=str(without_optimisation(tmp_path)),
        TORCH_CUDA_ARCH_LIST="9.0",
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert ("fused_bottleneck/_C_cuda.abi3.so" in names) == (shutil.which("nvcc") is not None)

    target = tmp_path / "site"
    installed = run([*pip, "install", "--no-deps", "--target", target, wheel], tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    code = ONE_STEP + "print(fb.extension_loaded(), fb.__file__)"
    loaded, file = run_python(code, tmp_path, PYTHONPATH=str(target)).split(maxsplit=1)
    assert loaded == "True"
    assert Path(file.strip()).is_relative_to(target)


def test_without_extension_works_and_warns_once() -> None:
    output = run_python(WARN_COUNT, ROOT, FUSED_BOTTLENECK_NO_EXTENSION="1")
    assert output.split() == ["0", "1", "False"]


def test_import_adds_little_to_torch() -> None:
    """Each of these takes from a tenth of a second to several; torch leaves them for later."""
    new = set(run_python(NEW_MODULES, ROOT).split())
    heavy = {"torch._dynamo", "torch._inductor", "triton", "sympy", "numpy", "networkx"}
    assert "fused_bottleneck" in new
    assert new.isdisjoint(heavy)


def test_building_without_torch_says_so(source_tree: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "torch"
    absent.mkdir(parents=True)
    absent.joinpath("__init__.py").write_text("raise ModuleNotFoundError('No module')")
    result = run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        source_tree,
        PYTHONPATH=str(absent.parent),
    )
    assert_one_sentence(result, "PyTorch >= 2.10", "pip install")


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"CXX": "/nonexistent/c++"}, {"CXX": "", "PATH": ""}])
def test_building_without_compiler_says_so(source_tree: Path, env: dict[str, str]) -> None:
    result = run([sys.executable, "setup.py", "--quiet", "build_ext"], source_tree, **env)
    assert_one_sentence(result, "C++17 compiler", "CXX")


@pytest.mark.slow
def test_building_cuda_without_nvcc_says_so(source_tree: Path, tmp_path: Path) -> None:
    env = {"CUDA_HOME": str(tmp_path), "FUSED_BOTTLENECK_BUILD_CUDA": "1"}
    result = run([sys.executable, "setup.py", "--quiet", "build_ext"], source_tree, **env)
    assert_one_sentence(result, "nvcc was not found", "CUDA_HOME")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_wrong_architecture_says_so(source_tree: Path) -> None:
    env = {"TORCH_CUDA_ARCH_LIST": "8.0;hopper"}
    result = run([sys.executable, "setup.py", "--quiet", "build_ext"], source_tree, **env)
    assert_one_sentence(result, "TORCH_CUDA_ARCH_LIST", "'hopper'")
