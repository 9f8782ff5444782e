"""Builds the C++ extension; everything else is in pyproject.toml.

* ``fused_bottleneck._C``: the schemas of all ops and the CPU passes.
* ``fused_bottleneck._C_cuda``: the CUDA passes, wherever nvcc is found, GPU or not. A library of
  its own, loaded when a CUDA tensor first needs it: a torch without CUDA never sees it, and what is
  wrong with it (an old driver) takes nothing else away.

Environment:
    FUSED_BOTTLENECK_BUILD_EXTENSION=0  install without either (all runs through torch)
    FUSED_BOTTLENECK_BUILD_CUDA=0 or 1  leave the CUDA library out; insist on it
    TORCH_CUDA_ARCH_LIST                its architectures, "8.0;9.0+PTX" for example (default: 8.0,
                                        9.0, 10.0 where nvcc has it, and PTX for 7.5 and all others)
    CUDA_HOME                           where nvcc is, if not on the PATH
    CXX, CFLAGS, MAX_JOBS               as usual for a PyTorch extension
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version

MINIMUM_SETUPTOOLS = 77  # as in pyproject.toml, which --no-build-isolation does not enforce
MINIMUM_TORCH = (2, 10)
# The lowest libtorch that the built library runs with: its stable ABI as of this version.
TORCH_TARGET_VERSION = "0x020a000000000000"

DEFAULT_ARCHITECTURES = (80, 90, 100)
# The kernels use nothing of later ones: one PTX serves all real architectures from it on.
VIRTUAL_ARCHITECTURE = 80
OLDEST_ARCHITECTURE = 75  # as PTX, for every GPU without machine code of its own

NEEDS_SETUPTOOLS = (
    "fused_bottleneck needs setuptools >= {minimum} to build, found {found}; "
    'upgrade it first: pip install "setuptools>={minimum}".'
)
NEEDS_TORCH = (
    "fused_bottleneck needs PyTorch >= 2.10 to build{found}; "
    'install it first: pip install "torch>=2.10", then build with --no-build-isolation.'
)
NEEDS_COMPILER = (
    "fused_bottleneck needs a C++17 compiler to build its extension, and '{command}' was not "
    "found; install one (Debian, Ubuntu: apt install g++), name it in CXX, or set "
    "FUSED_BOTTLENECK_BUILD_EXTENSION=0 to install without the extension."
)
NEEDS_NVCC = (
    "FUSED_BOTTLENECK_BUILD_CUDA=1 is set, and nvcc was not found; install the CUDA toolkit, or "
    "name its folder in CUDA_HOME."
)
BAD_ARCHITECTURE = (
    "TORCH_CUDA_ARCH_LIST must hold compute capabilities such as '8.0;9.0+PTX', got {entry!r}."
)


def require_setuptools() -> None:
    """Exits with one sentence unless setuptools understands pyproject.toml."""
    if int(setuptools_version.split(".")[0]) < MINIMUM_SETUPTOOLS:
        sys.exit(NEEDS_SETUPTOOLS.format(minimum=MINIMUM_SETUPTOOLS, found=setuptools_version))


def require_torch() -> None:
    """Exits with one sentence unless a new enough torch is importable."""
    try:
        import torch
    except ImportError:
        sys.exit(NEEDS_TORCH.format(found=""))
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        sys.exit(NEEDS_TORCH.format(found=f", found {torch.__version__}"))


def require_compiler() -> None:
    """Exits with one sentence unless the C++ compiler that torch will call is on the PATH."""
    command = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(command)[0]) is None:
        sys.exit(NEEDS_COMPILER.format(command=command))


COMPILE_ARGUMENTS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # The forward's relu and the backward's gate must round alike, on every CPU.
    "-ffp-contract=off",
    # No absolute path of the build machine in the binary and its messages.
    f"-ffile-prefix-map={Path.cwd()}=.",
]
SOURCE = Path("csrc")


def extension() -> Extension:
    """The library of C++ passes, on the stable ABIs of libtorch and of Python 3.10."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fused_bottleneck._C",
        sources=sorted(str(path) for path in [*SOURCE.glob("*.cpp"), *SOURCE.glob("cpu/*.cpp")]),
        depends=sorted(str(path) for path in SOURCE.rglob("*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=COMPILE_ARGUMENTS,
        py_limited_api=True,
    )


def cuda_extension(nvcc: Path) -> Extension:
    """The library of CUDA passes: host code as in ``extension``, kernels by ``compile_kernels``.

    Linked with the static CUDA runtime, which finds the driver when it is first used: it loads on
    machines without one.
    """
    from torch.utils.cpp_extension import CppExtension

    toolkit = nvcc.resolve().parent.parent
    runtime = next(toolkit.glob("**/libcudart_static.a"), toolkit / "lib64" / "libcudart_static.a")
    return CppExtension(
        "fused_bottleneck._C_cuda",
        sources=sorted(str(path) for path in SOURCE.glob("cuda/*.cpp")),
        depends=sorted(str(path) for path in [*SOURCE.rglob("*.h"), *SOURCE.glob("cuda/*.cu*")]),
        include_dirs=[str(toolkit / "include")],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("FUSED_BOTTLENECK_CUDA_LIBRARY", "1"),
        ],
        extra_compile_args=COMPILE_ARGUMENTS,
        extra_link_args=[str(runtime), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )


def find_nvcc() -> Path | None:
    """The CUDA compiler, if the CUDA library is to be built; exits if it must be and is not."""
    wanted = os.environ.get("FUSED_BOTTLENECK_BUILD_CUDA")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        if wanted == "1":
            sys.exit(NEEDS_NVCC)
        print("fused_bottleneck: nvcc was not found; the CUDA passes are left out.")
        return None
    return real_nvcc(Path(found))


def real_nvcc(nvcc: Path) -> Path:
    """nvcc inside its toolkit, wherever the PATH names a link or a script that calls it."""
    output = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE)
    return Path(top[1].strip(), "bin", "nvcc") if top else nvcc


def virtual_architecture(architecture: str) -> str:
    """The PTX that a real architecture ("90", "90a") is compiled from."""
    return str(min(int(re.sub(r"\D", "", architecture)), VIRTUAL_ARCHITECTURE))


def architecture_flags(nvcc: Path) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, or for the default architectures that it has."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    real: list[str] = []
    ptx: list[str] = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if match is None:
            sys.exit(BAD_ARCHITECTURE.format(entry=entry))
        real.append(match[1] + match[2])
        ptx += [match[1] + match[2]] if match[3] else []
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        real = [str(a) for a in DEFAULT_ARCHITECTURES if f"compute_{a}\n" in known + "\n"]
        ptx = [str(OLDEST_ARCHITECTURE)]
    codes = [f"arch=compute_{virtual_architecture(a)},code=sm_{a}" for a in real]
    codes += [f"arch=compute_{a},code=compute_{a}" for a in ptx]
    return [flag for code in codes for flag in ("-gencode", code)]


def compile_kernels(nvcc: Path, architectures: list[str], folder: Path) -> list[str]:
    """Compile every csrc/cuda/*.cu; ptxas's report of registers and spills stays beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-cudart", "static"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *architectures]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.cu.o"
        command = [str(nvcc), *flags, "-c", str(source), "-o", str(target)]
        print(shlex.join(command), flush=True)
        result = subprocess.run(command, capture_output=True, text=True)
        target.with_suffix(".log").write_text(result.stderr)
        if result.returncode != 0:
            sys.exit(result.stderr)
        return str(target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compiled, sorted(SOURCE.glob("cuda/*.cu"))))


def build_arguments() -> dict[str, object]:
    """The arguments of setup() that build the extension; none if it is not wanted."""
    if os.environ.get("FUSED_BOTTLENECK_BUILD_EXTENSION") == "0":
        return {}
    require_torch()
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    nvcc = find_nvcc()
    architectures = architecture_flags(nvcc) if nvcc else []

    class BuildPasses(BuildExtension):
        """torch's builder, with ninja only where it is there, a plain word on no compiler, and the
        kernels compiled by nvcc itself: torch's own way needs a torch that was built for CUDA."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, use_ninja=is_ninja_available(), **kwargs)

        def run(self) -> None:
            require_compiler()
            super().run()

        def build_extension(self, ext: Extension) -> None:
            if nvcc is not None and ext.name.endswith("_cuda"):
                ext.extra_objects = compile_kernels(
                    nvcc, architectures, Path(self.build_temp, "cuda")
                )
            super().build_extension(ext)

    return {
        "ext_modules": [extension(), *([cuda_extension(nvcc)] if nvcc else [])],
        "cmdclass": {"build_ext": BuildPasses},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


require_setuptools()
setup(**build_arguments())
