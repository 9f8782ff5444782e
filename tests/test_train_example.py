"""examples/train.py: what it writes, what it refuses, and that its verdict can be "no"."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="a package of the demo")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import checkpoint  # noqa: E402
import parity  # noqa: E402
import train  # noqa: E402
from config import Config, Stop  # noqa: E402
from data import batch_indices  # noqa: E402
from model import build  # noqa: E402

pytestmark = pytest.mark.slow

TINY = [
    "--data",
    "digits",
    "--width",
    "4",
    "--blocks-per-stage",
    "1",
    "1",
    "--epochs",
    "1",
    "--batch-size",
    "48",
]
VARIANTS = ["reference", "fused"]


def run_example(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "train.py", *TINY, "--output", output, *options],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of an uninterrupted run."""
    output = tmp_path_factory.mktemp("finished")
    process = run_example(output)
    assert process.returncode == 0, process.stderr
    assert "test accuracy" in process.stdout
    assert "loss" in process.stderr  # the progress bar
    return output


def run_here(output: Path, *options: str) -> None:
    """Train in this process, in one thread, for tests that stop before the report.

    The number of threads is set here because fixtures of the module run before those that set it
    for each test, and with another number sums are rounded otherwise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train.main([*TINY, "--output", str(output), *options]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def paused_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of a run stopped after ten steps, in the middle of an epoch."""
    output = tmp_path_factory.mktemp("paused")
    run_here(output, "--stop-after", "10", "--checkpoint-every", "3")
    return output


@pytest.fixture
def paused(paused_once: Path, tmp_path: Path) -> Path:
    """A copy of ``paused_once`` to go on from or to damage."""
    return Path(shutil.copytree(paused_once, tmp_path / "paused"))


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a run that must fail with one line."""
    with pytest.raises(SystemExit) as exit_info:
        train.main(arguments)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error:")
    ]
    assert len(lines) == 1
    return exit_info.value.code, lines[0]


def test_results_file_holds_config_measurements_and_verdict(finished: Path) -> None:
    content = json.loads((finished / "results.json").read_text())
    assert content["config"]["width"] == 4
    assert content["machine"]["torch"] == torch.__version__
    assert all(check["passed"] for check in content["parity"])
    assert list(content["results"]) == VARIANTS
    for result in content["results"].values():
        assert len(result["losses"]) == 1438 // 48
        assert result["final_loss"] < result["losses"][0]
        assert 0.1 < result["test_accuracy"] <= 1
        assert result["images_per_second"] > 0
        assert result["peak_memory_bytes"] > 0
        assert result["saved_for_backward_bytes"] > 0


def test_fused_variant_runs_fused_and_saves_less(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())["results"]
    assert results["fused"]["composed"] == {}
    saved = {variant: results[variant]["saved_for_backward_bytes"] for variant in VARIANTS}
    assert saved["fused"] < 0.7 * saved["reference"]


def test_picture_is_a_png(finished: Path) -> None:
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_training_is_bit_identical(paused: Path, tmp_path: Path) -> None:
    run_here(paused, "--resume", "--stop-after", "25")
    run_here(tmp_path / "whole", "--stop-after", "25")
    resumed, whole = (
        checkpoint.load(output / "checkpoint.pt", "cpu")["trainings"]
        for output in (paused, tmp_path / "whole")
    )
    for variant in VARIANTS:
        assert len(whole[variant]["losses"]) == 25
        for part in ("losses", "model", "optimizer"):
            torch.testing.assert_close(resumed[variant][part], whole[variant][part], rtol=0, atol=0)


def test_run_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path, "--blocks", "fused", "--stop-after", "1")
    assert "stopped after step 1 of 29; continue with --resume" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty"])
def test_damaged_checkpoint_is_refused(
    paused: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = paused / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut short": content[:-100], "empty": b""}.get(damage, content))
    code, message = refusal([*TINY, "--output", str(paused), "--resume"], capsys)
    assert code == 2
    assert "corrupted" in message


def test_checkpoint_of_another_configuration_is_refused(
    paused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--output", str(paused), "--resume", "--lr", "0.01"]
    code, message = refusal(arguments, capsys)
    assert code == 2
    assert "lr=0.05, not 0.01" in message


def test_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"step": 1}, path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path, "cpu") == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt", "cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--width", "0"], "--width: an integer of at least 1, not '0'"),
        (["--batch-size", "1"], "--batch-size: an integer of at least 2, not '1'"),
        (["--batch-size", "5000"], "more than the 1438 training images of digits"),
        (["--blocks-per-stage", "2", "x"], "--blocks-per-stage: an integer of at least 1"),
        (["--lr", "nan"], "--lr: a positive number, not 'nan'"),
        (["--seed", "-1"], "--seed: an integer of at least 0, not '-1'"),
        (["--device", "abacus"], "no kind of device called 'abacus'"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = refusal(["--data", "digits", "--output", str(tmp_path), *options], capsys)
    assert code == 2
    assert expected in message


def test_output_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, message = refusal([*TINY, "--output", str(tmp_path / "file")], capsys)
    assert code == 2
    assert "cannot write to" in message


def test_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = refusal([*TINY, "--output", str(tmp_path), "--lr", "1e30"], capsys)
    assert code == 1
    assert "the loss of the reference training is" in message


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert "exit codes: 0 both" in text
    assert "--resume" in text


def test_both_variants_start_from_the_same_weights() -> None:
    config = Config(data="digits", epochs=1, width=4)
    states = [build(config, variant).state_dict() for variant in VARIANTS]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_every_epoch_is_another_order_of_the_same_images() -> None:
    first, second = (
        torch.cat([batch_indices(12, 4, seed=0, step=3 * epoch + step) for step in range(3)])
        for epoch in range(2)
    )
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(12))
    assert first.tolist() != second.tolist()


FALLING = [2.3 * math.exp(-step / 30) for step in range(100)]
BOUNDS = parity.BOUNDS["float32"]


def failures(losses: list[float], accuracy: float) -> list[str]:
    checks = parity.compare(parity.Outcome(FALLING, 0.95), parity.Outcome(losses, accuracy), BOUNDS)
    return [check.name for check in checks if not check.passed]


def test_parity_accepts_rounding_and_late_noise() -> None:
    noisy = [loss + 1e-6 * 10 ** min(step, 4) for step, loss in enumerate(FALLING)]
    assert failures(noisy, 0.945) == []


def test_parity_rejects_a_wrong_gradient() -> None:
    slower = [2.3 * math.exp(-step / 33) for step in range(100)]
    assert failures(slower, 0.95)[0] == "loss at step 2"


def test_parity_rejects_curves_that_part_late() -> None:
    parting = FALLING[:50] + [loss + 0.1 for loss in FALLING[50:]]
    assert failures(parting, 0.95) == ["final loss"]


def test_parity_rejects_a_network_that_generalises_less() -> None:
    assert failures(FALLING, 0.92) == ["test accuracy"]


def test_parity_rejects_nan() -> None:
    assert failures([math.nan] * 100, math.nan) == [
        "loss at step 1",
        "loss at step 2",
        "loss at step 3",
        "final loss",
        "test accuracy",
    ]


def test_parity_needs_trainings_of_equal_length() -> None:
    with pytest.raises(ValueError, match="100 and 99 steps"):
        failures(FALLING[:-1], 0.95)
