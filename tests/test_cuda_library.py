"""The CUDA library as it was built: architectures, registers, symbols, loading; needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from op_helpers import run_child

from fused_bottleneck import extension

LIBRARIES = sorted(Path(extension.__file__).parent.glob("_C_cuda.*so"))
if not LIBRARIES:
    assert shutil.which("nvcc") is None or os.environ.get("FUSED_BOTTLENECK_BUILD_CUDA") == "0", (
        "nvcc is here, and the CUDA library was not built: python setup.py build_ext --inplace"
    )
    pytest.skip("no nvcc, so no CUDA library was built", allow_module_level=True)
LIBRARY = LIBRARIES[0]
SOURCES = 4  # coefficients, junctions, pointwise, reductions
KERNELS = 7 + 2 + 5  # passes, combinations of parts, coefficients


def cuobjdump(*arguments: str) -> str:
    pytest.importorskip("triton")
    from benchmarks.compiled import tool

    command = [str(tool("cuobjdump")), *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_architecture_is_there() -> None:
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST is set")
    machine_code, ptx = cuobjdump("--list-elf"), cuobjdump("--list-ptx")
    for architecture in (80, 90, 100):
        assert machine_code.count(f".sm_{architecture}.cubin") == SOURCES
    assert ptx.count(".sm_75.ptx") == SOURCES


def test_no_kernel_spills() -> None:
    """Nor keeps an array in local memory: there is no stack."""
    report = cuobjdump("-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", report)
    names = {re.sub(r".*?(\d+)([a-z_]+_kernel).*", r"\2", name) for name, _ in found}
    assert len(names) == KERNELS, sorted(names)
    for name, stack in found:
        assert int(stack) == 0, name


@pytest.mark.slow
def test_products_of_coefficients_are_on_tensor_cores() -> None:
    """In float32, and of 16-bit weights; those in float64 are not."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST is set")
    on_tensor_cores = set()
    for function in cuobjdump("-sass", "-arch", "sm_90").split("Function : ")[1:]:
        kernel = re.match(r"\S*?\d(fold\w*_kernel)I(\S+?)EE", function)
        if kernel and "HMMA.1684.F32.TF32" in function:
            on_tensor_cores.add(kernel.groups())
    half, bfloat16 = "6__half", "13__nv_bfloat16"
    forward = ["ff", *(first + second for first in (half, bfloat16) for second in "fd")]
    assert on_tensor_cores == {
        *(("fold_kernel", types) for types in forward),
        *(("fold_backward_kernel", types) for types in ("f", half, bfloat16)),
    }


def test_undefined_symbols() -> None:
    """Of torch only the stable ABI; of CUDA nothing, as its runtime is linked in."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    output = subprocess.run(
        [nm, "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split()[-1].split("@")[0] for line in output.splitlines()}
    stable = {s for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert "aoti_torch_library_init_impl" in stable
    assert not {s for s in stable if "cuda" in s} - {"aoti_torch_device_type_cuda"}
    foreign = re.compile(r"cuda|cu[A-Z]|cublas|cudnn|Py|_ZN\w*(at|c10|torch|caffe2)\d")
    assert not [s for s in symbols - stable if foreign.match(s)]


@pytest.mark.slow
def test_loads_without_a_gpu_and_only_when_asked_for() -> None:
    code = (
        "import torch, fused_bottleneck as fb\n"
        "fb.FusedBottleneck(16, 4)(torch.randn(2, 16, 5, 5)).sum().backward()\n"
        "mapped = lambda: '_C_cuda' in open('/proc/self/maps').read()\n"
        "has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key(\n"
        "    'fused_bottleneck::bn_apply_', 'CUDA')\n"
        "print(mapped(), has(), repr(fb.extension.why_no_cuda()), mapped(), has())\n"
    )
    child = run_child(code)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["False", "False", "''", "True", "True"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_tensor_never_reaches_it() -> None:
    assert extension.why_no_cuda() == ""
    mean, _ = torch.ops.fused_bottleneck.channel_moments(torch.ones(4, 3))
    assert mean.device.type == "cpu"


@pytest.mark.parametrize(
    ("broken", "message"), [(False, "there is no _C_cuda"), (True, "_C_cuda.abi3.so: file too s")]
)
def test_missing_library_says_why(
    broken: bool, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    extension.load()
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    if broken:
        (tmp_path / "_C_cuda.abi3.so").write_bytes(b"")
    extension.why_no_cuda.cache_clear()
    reason = extension.why_no_cuda()
    extension.why_no_cuda.cache_clear()
    assert message in reason
    assert "nvcc" in reason
