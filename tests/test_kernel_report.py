"""The kernel report's model against the plan of benchmarks/traffic.py, and its files."""

import csv
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("reports on compiled kernels", allow_module_level=True)

from benchmarks import kernel_report
from benchmarks.compiled import Usage
from benchmarks.shapes import RESNET50
from benchmarks.traffic import fused_bytes, fused_extra_flops, step_flops


@pytest.fixture(scope="module")
def rows() -> list[kernel_report.Row]:
    return kernel_report.call_rows("bf16", 256, kernel_report.MACHINES["H200"])


@pytest.mark.parametrize("shape", RESNET50, ids=lambda shape: shape.name)
def test_calls_add_up_to_the_plan(
    shape: kernel_report.BlockShape, rows: list[kernel_report.Row]
) -> None:
    """The kernels move what the plan says, their partial results and the operands they write to
    scratch; they do its products."""
    mine = [row for row in rows if row["shape"] == shape.name]
    moved = sum(row["bytes"] for row in mine)
    plan = fused_bytes(shape, 256, 2)
    # a1 once in forward and once in backward, each written and read; dy1 and dy2 are written, but
    # then read twice in place of two tensors twice.
    scratch = 2 * 256 * shape.width * (5 * shape.size**2 + shape.out_size**2)
    # W cov of each folded unit, in float32, written and read in forward and in backward.
    operands = shape.width + (shape.in_channels if shape.downsample else 0)
    scratch += 4 * 4 * shape.out_channels * operands
    assert plan + scratch <= moved <= 1.4 * plan + scratch
    done = sum(row["operations"] for row in mine)
    least = step_flops(shape, 256)
    assert least <= done <= 1.15 * (least + fused_extra_flops(shape, 256))


def test_sums(rows: list[kernel_report.Row]) -> None:
    *shapes, network = kernel_report.shape_rows(rows, "bf16", 256)
    assert [row["shape"] for row in shapes] == [shape.name for shape in RESNET50]
    total = sum(row["floor_us"] * row["count"] for row in shapes)
    assert network["floor_us"] == pytest.approx(total)


def test_occupancy() -> None:
    usage = Usage(registers=128, stack=0, shared=98_304, wgmma=4, products=1)
    assert kernel_report.occupancy(usage, 8, 90) == 2  # registers and shared memory
    assert kernel_report.occupancy(usage, 8, 80) == 1  # shared memory
    small = Usage(registers=32, stack=0, shared=0, wgmma=0, products=0)
    assert kernel_report.occupancy(small, 4, 90) == 16  # warps


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel_report.main(["--batch", "2", "--architectures", "--output", str(tmp_path)])
    assert "all sixteen blocks" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "kernel_calls_bf16.csv",
        "kernel_floors_bf16.csv",
    ]
    with (tmp_path / "kernel_floors_bf16.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(RESNET50) + 1
