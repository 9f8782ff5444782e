"""The CUDA passes on the CPU: csrc/cuda compiled as C++ against tests/cuda_emulator.

``load()`` gives the ops as ``torch.ops.fused_bottleneck_emulated``, with the schemas of ops.cpp:
the very kernels, launches and checks, on CPU tensors.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"
SOURCES = [
    ROOT / "csrc" / "ops.cpp",
    *sorted(ROOT.glob("csrc/cuda/*.cu")),
    *(p for p in sorted(ROOT.glob("csrc/cuda/*.cpp")) if p.name != "runtime.cpp"),
    EMULATOR / "stream.cpp",
]
NAMESPACE = "fused_bottleneck_emulated"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    # A misaligned access of 16 bytes ends the process, as it ends a kernel on a GPU.
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
    "-Wno-unknown-pragmas",
    f"-Dfused_bottleneck={NAMESPACE}",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{EMULATOR}",
    *(f"-I{path}" for path in include_paths()),
]


def available() -> bool:
    """Whether there is a compiler to build it with."""
    return shutil.which(COMPILER[0]) is not None


def _digest() -> str:
    """Names everything that the library is built from."""
    files = [*SOURCES, *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *EMULATOR.glob("*.h")]
    files += ROOT.glob("csrc/cuda/*.cuh")
    text = "".join(path.read_text() for path in sorted(set(files)))
    return hashlib.sha256((text + torch.__version__ + shlex.join(FLAGS)).encode()).hexdigest()[:16]


def _build(target: Path) -> None:
    folder = target.parent
    objects = [str(folder / f"{source.name}.o") for source in SOURCES]

    def compile_one(source: Path, target: str) -> None:
        command = [*COMPILER, *FLAGS, "-x", "c++", "-c", str(source), "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    part = target.with_suffix(".part")
    subprocess.run([*COMPILER, "-shared", *objects, *libraries, "-o", str(part)], check=True)
    part.rename(target)


@cache
def load() -> Any:
    """The ops, built at the first call after a change (half a minute)."""
    folder = ROOT / "build" / "cuda_emulation" / _digest()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "emulated.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, NAMESPACE)
