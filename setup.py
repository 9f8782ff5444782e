"""Builds the C++ extension ``fused_bottleneck._C``; everything else is in pyproject.toml.

Environment:
    FUSED_BOTTLENECK_BUILD_EXTENSION=0  install without the extension (all runs through torch)
    CXX, CFLAGS, MAX_JOBS               as usual for a PyTorch extension
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version

MINIMUM_SETUPTOOLS = 77  # as in pyproject.toml, which --no-build-isolation does not enforce
MINIMUM_TORCH = (2, 10)
# The lowest libtorch that the built library runs with: its stable ABI as of this version.
TORCH_TARGET_VERSION = "0x020a000000000000"

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


def extension() -> Extension:
    """The library of C++ passes, on the stable ABIs of libtorch and of Python 3.10."""
    from torch.utils.cpp_extension import CppExtension

    source = Path("csrc")
    return CppExtension(
        "fused_bottleneck._C",
        sources=sorted(str(path) for path in [*source.glob("*.cpp"), *source.glob("cpu/*.cpp")]),
        depends=sorted(str(path) for path in source.rglob("*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            # The forward's relu and the backward's gate must round alike, on every CPU.
            "-ffp-contract=off",
            # No absolute path of the build machine in the binary and its messages.
            f"-ffile-prefix-map={Path.cwd()}=.",
        ],
        py_limited_api=True,
    )


def build_arguments() -> dict[str, object]:
    """The arguments of setup() that build the extension; none if it is not wanted."""
    if os.environ.get("FUSED_BOTTLENECK_BUILD_EXTENSION") == "0":
        return {}
    require_torch()
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class BuildPasses(BuildExtension):
        """torch's builder, with ninja only where it is there and a plain word on no compiler."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, use_ninja=is_ninja_available(), **kwargs)

        def run(self) -> None:
            require_compiler()
            super().run()

    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": BuildPasses},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


require_setuptools()
setup(**build_arguments())
