"""examples/train.py as a trainer: kills, damaged checkpoints, several processes, its recipe."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="a package of the demo")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import checkpoint  # noqa: E402
import data  # noqa: E402
from config import Config, Stop  # noqa: E402
from model import build  # noqa: E402
from schedule import learning_rate  # noqa: E402

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("KILL_SEED", "0"))  # of the moments of kill -9
TINY = ["--data", "digits", "--blocks", "fused", "--width", "4", "--blocks-per-stage", "1"]
#: Gives every part of the state of a training something to do. An epoch has 14 steps.
RECIPE = ["--epochs", "3", "--batch-size", "96", "--ema-decay", "0.8", "--label-smoothing", "0.1"]
RECIPE += ["--clip-norm", "1", "--warmup-epochs", "0.5"]
#: In the third epoch; the report at the end, which takes seconds, has tests of its own.
END = ["--stop-after", "31"]


class Runs:
    """Runs train.py in processes of its own; see ``trainer_server``."""

    def __init__(self) -> None:
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "trainer_server.py"],
            env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, output: Path, *options: str, **how: Any) -> dict[str, Any]:
        request = {
            "arguments": [*TINY, *RECIPE, "--output", str(output), *options],
            "checkpoint": str(output / "checkpoint.pt"),
        }
        self._server.stdin.write(json.dumps(request | how) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def ok(self, output: Path, *options: str, **how: Any) -> dict[str, Any]:
        """A run that must succeed."""
        result = self(output, *options, **how)
        assert set(result["codes"]) == {0}, result["stderr"]
        return result

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    made = Runs()
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of an uninterrupted training."""
    output = tmp_path_factory.mktemp("whole")
    runs.ok(output, *END)
    return output


@pytest.fixture(scope="module")
def whole_of_two(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of an uninterrupted training in two processes."""
    output = tmp_path_factory.mktemp("whole")
    runs.ok(output, *END, processes=2)
    return output


def saved(output: Path, name: str = "checkpoint.pt") -> dict[str, Any]:
    """State of the fused training in a checkpoint."""
    return checkpoint.load(output / name)["trainings"]["fused"]


def steps_of(output: Path, name: str = "checkpoint.pt") -> int:
    return len(saved(output, name)["losses"])


def assert_same_training(output: Path, whole: Path) -> None:
    """Bit for bit: weights, average, optimiser, history, and the weights of the best epoch."""
    got, want = saved(output), saved(whole)
    for part in want.keys() - {"seconds"}:
        torch.testing.assert_close(got[part], want[part], rtol=0, atol=0)
    best = [torch.load(directory / "best-fused.pt") for directory in (output, whole)]
    torch.testing.assert_close(*best, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_training_continues_to_the_same_weights(
    processes: int, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = request.getfixturevalue("whole" if processes == 1 else "whole_of_two")
    moments = random.Random(SEED + processes)
    output, kills, result = tmp_path / "killed", 0, {"codes": []}
    print(f"KILL_SEED={SEED}")
    while set(result["codes"]) != {0}:
        kill = {"kill_after": moments.randrange(6), "delay": moments.uniform(0, 0.03)}
        options = [*END, "--resume", "auto", "--checkpoint-every", str(moments.randint(1, 2))]
        if kills >= 8 // processes:
            kill = {}
        result = runs(output, *options, processes=processes, **kill)
        kills += -signal.SIGKILL in result["codes"]
        assert set(result["codes"]) <= {0, -signal.SIGKILL}, result["stderr"]
    assert kills > 0
    assert_same_training(output, whole)


def fork_and_kill(action: Callable[[], None], moment: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run ``action`` in a fork that is killed before its ``moment``-th call of the operating system
    that makes something durable or renames it. Whether it came to that."""
    calls = 0

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "fsync", deadly(os.fsync))
        monkeypatch.setattr(os, "replace", deadly(os.replace))
        action()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_kill_within_a_save_leaves_the_old_or_the_new(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for moment in itertools.count(1):
        path = tmp_path / str(moment) / "checkpoint.pt"
        path.parent.mkdir()
        for step in (1, 2, 3):
            checkpoint.save({"step": step}, path, keep)
        killed = fork_and_kill(
            lambda path=path: checkpoint.save({"step": 4}, path, keep), moment, monkeypatch
        )
        found.append(checkpoint.load_newest(path)["step"])
        if not killed:
            break
    # Before: writing to disk, a rename for each that is kept. After: the directory, and nothing.
    assert found == [3] * (1 + keep) + [4, 4]


def test_checkpoints_are_kept_up_to_a_number(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for step in range(5):
        checkpoint.save({"step": step}, path, keep=3)
    steps = {file.name: checkpoint.load(file)["step"] for file in tmp_path.iterdir()}
    assert steps == {"checkpoint.pt": 4, "checkpoint.pt.1": 3, "checkpoint.pt.2": 2}


@pytest.fixture
def paused(runs: Runs, tmp_path: Path) -> Path:
    """Output directory of a training stopped after 12 steps, with the checkpoint of step 8."""
    output = tmp_path / "paused"
    runs.ok(output, "--stop-after", "12", "--checkpoint-every", "4")
    return output


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut short": content[:-100], "empty": b""}.get(how, content))


@pytest.mark.parametrize("how", ["flipped bit", "cut short", "empty"])
def test_auto_goes_on_from_the_checkpoint_before_a_damaged_one(
    paused: Path, whole: Path, how: str, runs: Runs
) -> None:
    damage(paused / "checkpoint.pt", how)
    result = runs.ok(paused, "--resume", "auto", *END)
    warning = next(line for line in result["stderr"].splitlines() if line.startswith("warning"))
    assert "checkpoint.pt is corrupted (its checksum does not match)" in warning
    assert warning.endswith(f"going on from {paused / 'checkpoint.pt.1'}")
    assert (paused / "checkpoint.pt.corrupted").is_file()
    assert_same_training(paused, whole)


def test_a_damaged_checkpoint_does_not_push_out_an_intact_one(paused: Path, runs: Runs) -> None:
    damage(paused / "checkpoint.pt", "cut short")
    runs.ok(paused, "--resume", "auto", "--stop-after", "9")
    assert [steps_of(paused, name) for name in ("checkpoint.pt", "checkpoint.pt.1")] == [9, 8]


def test_auto_uses_the_one_before_where_a_kill_left_no_newest(paused: Path, runs: Runs) -> None:
    (paused / "checkpoint.pt").unlink()
    runs.ok(paused, "--resume", "auto", "--stop-after", "9")
    assert steps_of(paused) == 9


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--resume"], "--resume auto tries the one before it"),
        (["--resume", "auto"], "no checkpoint is intact"),
    ],
)
def test_all_damaged_are_refused_and_left(
    paused: Path, option: list[str], words: str, runs: Runs
) -> None:
    for name in ("checkpoint.pt", "checkpoint.pt.1"):
        damage(paused / name, "flipped bit")
    before = {file.name: file.read_bytes() for file in paused.iterdir()}
    result = runs(paused, *option)
    assert result["codes"] == [2]
    (line,) = result["stderr"].splitlines()
    assert words in line
    assert str(paused / "checkpoint.pt") in line
    assert {file.name: file.read_bytes() for file in paused.iterdir()} == before


def test_auto_starts_where_nothing_was_saved(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"killed in the first save")
    runs.ok(tmp_path, "--resume", "auto", "--stop-after", "1")
    assert steps_of(tmp_path) == 1


def test_a_new_training_does_not_keep_checkpoints_of_the_old(paused: Path, runs: Runs) -> None:
    runs.ok(paused, "--stop-after", "1")
    assert sorted(file.name for file in paused.iterdir()) == ["checkpoint.pt"]


def test_a_finished_training_reports_again(whole_of_two: Path, runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(whole_of_two, tmp_path, dirs_exist_ok=True)
    first, second = (runs.ok(tmp_path, "--resume", "auto", processes=2) for _ in range(2))
    table = first["stdout"].splitlines()[:-1]  # without the seconds it took
    assert [line.split()[0] for line in table[3:7]] == ["final", "test", "averaged", "images/s"]
    assert second["stdout"].splitlines()[:-1] == table
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["processes"] == 2
    assert results["results"]["fused"]["composed"] == {}


def test_other_number_of_processes(whole_of_two: Path, runs: Runs, tmp_path: Path) -> None:
    """One goes on with the batches of two; five cannot share them."""
    runs.ok(tmp_path, "--stop-after", "12", processes=2)
    result = runs.ok(tmp_path, "--resume", *END)
    assert "processes: 2 before, 1 now" in result["stderr"]
    want = torch.tensor(saved(whole_of_two)["losses"])
    torch.testing.assert_close(torch.tensor(saved(tmp_path)["losses"]), want, rtol=0.1, atol=0)
    result = runs(tmp_path, "--resume", processes=5)
    assert result["stderr"].count("error") == 1
    assert "--batch-size 96 cannot be divided among 5 processes" in result["stderr"]


def test_two_processes_average_their_gradients(runs: Runs, tmp_path: Path) -> None:
    """After one step the weights are those of the mean of the gradients of two halves."""
    options = ["--stop-after", "1", "--clip-norm", "1000", "--label-smoothing", "0"]
    runs.ok(tmp_path, *options, processes=2)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    config = Config(**state["config"])
    images, labels = next(data.training_batches(data.load("digits").train, config, range(1)))
    losses, gradients = [], []
    for half in range(2):
        model = build(config, "fused")
        loss = nn.functional.cross_entropy(model(images[half::2]), labels[half::2])
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    rate = learning_rate(0, config.total_steps, config.lr, config.warmup_steps(config.total_steps))
    model = build(config, "fused")
    for parameter, *halves in zip(model.parameters(), *gradients, strict=True):
        gradient = sum(halves) / 2 + config.weight_decay * parameter.detach()
        parameter.data -= rate * 1.9 * gradient  # the first step of Nesterov's momentum
    assert saved(tmp_path)["losses"] == pytest.approx([sum(losses) / 2], rel=1e-6)
    got = saved(tmp_path)["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_synchronised_processes_train_as_one(runs: Runs, tmp_path: Path) -> None:
    options = ["--stop-after", "3"]
    runs.ok(tmp_path / "one", *options)
    runs.ok(tmp_path / "two", *options, "--sync-bn", processes=2)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["whole", "whole_of_two"])
def test_accuracy_is_that_of_the_best_weights(name: str, request: pytest.FixtureRequest) -> None:
    """Every image counts once, also where two processes share them."""
    output = request.getfixturevalue(name)
    state = checkpoint.load(output / "checkpoint.pt")
    config = Config(**state["config"])
    test = data.load("digits").test
    model = build(config, "fused").eval()
    model.load_state_dict(torch.load(output / "best-fused.pt"))
    images, labels = test[0, torch.arange(len(test))]
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(max(ema for _, ema in saved(output)["accuracies"]), abs=1e-12)


def test_several_processes_refuse_to_compare(runs: Runs, tmp_path: Path) -> None:
    result = runs(tmp_path, "--blocks", "both", processes=2)
    assert 2 in result["codes"]
    assert result["stderr"].splitlines() == [
        "train.py: error: several processes train one kind of blocks: "
        "give --blocks fused or reference"
    ]


def test_what_the_main_process_refuses_ends_all(runs: Runs, tmp_path: Path) -> None:
    result = runs(tmp_path, "--resume", processes=2)
    assert 2 in result["codes"]
    (line,) = result["stderr"].splitlines()
    assert line.startswith("train.py: error: --resume: there is no checkpoint")


def test_a_stop_travels_between_processes() -> None:
    stop = pickle.loads(pickle.dumps(Stop("no space", exit_code=2, everywhere=False)))
    assert (str(stop), stop.exit_code, stop.everywhere) == ("no space", 2, False)


def test_several_processes_stop_together(runs: Runs, tmp_path: Path) -> None:
    result = runs(tmp_path, "--lr", "1e30", "--clip-norm", "1e30", processes=2)
    assert 1 in result["codes"]
    (line,) = [line for line in result["stderr"].splitlines() if "error" in line]
    assert "the loss of the fused training is nan at step" in line


@pytest.mark.slow
def test_torchrun(tmp_path: Path, whole_of_two: Path) -> None:
    """The real launcher; the others here set its variables themselves."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [*TINY, *RECIPE, "--output", tmp_path, "--stop-after", "15"]
    process = subprocess.run(
        [sys.executable, *torchrun, ROOT / "examples" / "train.py", *options],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("stopped after step 15 of 42; continue with --resume") == 1
    assert saved(tmp_path)["losses"] == saved(whole_of_two)["losses"][:15]
