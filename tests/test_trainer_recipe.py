"""What examples/train.py trains with: schedule, averages, precision, image files, curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import load
from test_train_example import refusal
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import fused_bottleneck as fb

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import checkpoint
import data
import image_folder
import saving
import train
from config import MODELS, SMALL, Config, RunOptions, Stop
from model import build
from schedule import learning_rate
from training import Training

pytestmark = pytest.mark.slow

CONFIG = Config(
    "digits",
    epochs=1,
    width=4,
    blocks_per_stage=(1,),
    batch_size=48,
    dtype="float64",
    variants=("fused",),
    train_images=1438,
)
OPTIONS = ["--data", "digits", "--blocks", "fused", "--width", "4", "--blocks-per-stage", "1"]
OPTIONS += ["--epochs", "1", "--batch-size", "48"]


def batches(config: Config, count: int) -> list[data.Batch]:
    return list(data.training_batches(data.load("digits").train, config, range(count)))


def training(**changes: Any) -> Training:
    config = replace(CONFIG, **changes)
    return Training(config, "fused", config.total_steps)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def run_options(output: Path, resume: str | None = None) -> RunOptions:
    return RunOptions(output, resume, None, 20, 2, 0, False)


@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedule_is_that_of_torch(warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    cosine = CosineAnnealingLR(optimizer, T_max=50 - warmup)
    linear = LinearLR(optimizer, 1 / max(warmup, 1), total_iters=max(warmup - 1, 1))
    scheduler = SequentialLR(optimizer, [linear, cosine], [warmup]) if warmup else cosine
    for step in range(50):
        want = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, 50, 0.3, warmup) == pytest.approx(want, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_warmup_is_given_in_epochs() -> None:
    config = replace(CONFIG, epochs=10)
    assert config.total_steps == 290
    assert config.warmup_steps(290) == 29
    assert replace(config, warmup_epochs=0.5).warmup_steps(290) == round(0.5 * 29)
    assert replace(config, warmup_epochs=0).warmup_steps(290) == 0


def test_average_of_weights_and_statistics() -> None:
    averaged = training(ema_decay=0.7)
    want: list[Tensor] = []
    for batch in batches(averaged.config, 4):
        averaged.step(*batch)
        new = [t for t in averaged.model.state_dict().values() if t.is_floating_point()]
        new = [t.clone() for t in new]
        want = [0.7 * a + 0.3 * b for a, b in zip(want, new, strict=True)] if want else new
    assert averaged.ema is not None
    got = [t for t in averaged.weights().values() if t.is_floating_point()]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_average_is_tested_beside_the_model() -> None:
    averaged = training(ema_decay=0.999)
    test = data.load("digits").test
    for batch in batches(averaged.config, 20):
        averaged.step(*batch)
    averaged.test(data.evaluation_batches(test, averaged.config))
    images, labels = next(data.evaluation_batches(test, replace(averaged.config, batch_size=359)))
    for model, got in ((averaged.model, averaged.accuracy), (averaged.ema, averaged.ema_accuracy)):
        with torch.no_grad():
            right = model.eval()(images).argmax(1) == labels
        assert got == pytest.approx(right.double().mean().item(), abs=1e-12)
    assert averaged.accuracy != averaged.ema_accuracy


def test_best_epoch_is_that_of_the_average() -> None:
    averaged = training(ema_decay=0.9)
    averaged.accuracies = [[0.9, 0.5], [0.8, 0.6]]
    assert averaged.is_best
    assert averaged.best_accuracy == 0.6
    averaged.accuracies.append([0.95, 0.6])
    assert not averaged.is_best


def test_label_smoothing_spreads_a_share_of_the_target() -> None:
    smoothed, plain = training(label_smoothing=0.2), training()
    images, labels = batches(plain.config, 1)[0]
    log_p = plain.model(images).log_softmax(1)
    want = 0.8 * plain.loss(images, labels) - 0.2 * log_p.mean()
    torch.testing.assert_close(smoothed.loss(images, labels), want)


def test_gradients_are_clipped_to_a_norm() -> None:
    clipped = training(clip_norm=0.01)
    clipped.step(*batches(clipped.config, 1)[0])
    norms = torch.stack([parameter.grad.norm() for parameter in clipped.model.parameters()])
    assert norms.norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.half)])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Products in the dtype; parameters, logits and loss in float32."""
    cast, plain = training(dtype=name), training(dtype="float32")
    batch = batches(plain.config, 1)[0]
    found: list[torch.dtype] = []
    cast.model.head.register_forward_hook(lambda module, args, out: found.append(out.dtype))
    loss = cast.loss(*batch)
    assert found == [dtype]
    assert {p.dtype for p in cast.model.parameters()} == {loss.dtype} == {torch.float32}
    want = plain.loss(*batch)
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0)
    assert loss.item() != want.item()


def test_overflow_in_float16_skips_the_step() -> None:
    scaled = training(dtype="float16")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = parameters(scaled.model)
    scaled.take_turn(batches(scaled.config, 1))
    torch.testing.assert_close(parameters(scaled.model), before, rtol=0, atol=0)
    assert scaled.steps == 1
    assert scaled.scaler.get_scale() == 2.0**39
    scaled.check_finite()


def test_scale_of_float16_is_saved(tmp_path: Path) -> None:
    scaled = training(dtype="float16")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    scaled.take_turn(batches(scaled.config, 1))
    saving.save([scaled], run_options(tmp_path), tested=False)
    resumed = training(dtype="float16")
    saving.start([resumed], run_options(tmp_path, "required"))
    assert resumed.scaler.get_scale() == 2.0**39


def test_random_numbers_continue(tmp_path: Path) -> None:
    """No network here draws any in training; one with dropout would."""
    trained = training()
    torch.rand(3)
    saving.save([trained], run_options(tmp_path), tested=False)
    want = torch.rand(5)
    resumed = training()
    saving.start([resumed], run_options(tmp_path, "required"))
    torch.testing.assert_close(torch.rand(5), want, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trained = training()
    saving.save([trained], run_options(tmp_path), tested=False)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    trained.take_turn(batches(trained.config, 2))
    with torch.no_grad():
        next(trained.model.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(Stop, match="weights of the fused training are not finite after step 2"):
        saving.save([trained], run_options(tmp_path), tested=False)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = data.load("digits")
    digits.train.images[data.batch_indices(1438, 48, seed=0, step=9)[0]] = torch.nan
    monkeypatch.setattr(data, "load", lambda name: digits)
    arguments = [*OPTIONS, "--output", str(tmp_path), "--checkpoint-every", "4"]
    code, message = refusal(arguments, capsys)
    assert code == 1
    assert "the loss of the fused training is nan at step 10: try a lower --lr" in message
    state = checkpoint.load(tmp_path / "checkpoint.pt")["trainings"]["fused"]
    assert len(state["losses"]) == 8
    assert all(bool(t.isfinite().all()) for t in state["model"].values())


def test_sync_bn_of_one_process_is_batch_norm() -> None:
    synchronised, plain = training(sync_bn=True), training()
    kinds = {type(module) for module in synchronised.model.modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    for batch in batches(plain.config, 2):
        torch.testing.assert_close(synchronised.step(*batch), plain.step(*batch))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "cifar"], "mnist, digits or a directory with train/ and val/, not 'cifar'"),
        (["--model", "resnet50"], "takes colour images: give a directory as --data"),
        (["--warmup-epochs", "3"], "--warmup-epochs 3 are more than --epochs 1"),
        (["--label-smoothing", "1"], "--label-smoothing: a number from 0 to below 1, not '1'"),
        (["--ema-decay", "x"], "--ema-decay: a number from 0 to below 1, not 'x'"),
        (["--weight-decay", "-1"], "--weight-decay: a number of at least 0, not '-1'"),
        (["--resume", "maybe"], "--resume: invalid choice: 'maybe'"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints: an integer of at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = refusal([*OPTIONS, "--output", str(tmp_path), *options], capsys)
    assert code == 2
    assert expected in message


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, [], "WORLD_SIZE is set, and LOCAL_RANK, MASTER_ADDR"),
        ({}, ["--device", "cuda:0"], "torchrun's processes take one each"),
        (
            {},
            ["--blocks", "reference", "--sync-bn"],
            "--sync-bn with --blocks reference and several processes needs --device cuda",
        ),
    ],
)
def test_what_a_group_of_processes_lacks_is_said(
    variables: dict[str, str],
    options: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }
    for name, value in (variables or whole).items():
        monkeypatch.setenv(name, value)
    code, message = refusal([*OPTIONS, *options], capsys)
    assert code == 2
    assert expected in message


@pytest.mark.slow
def test_curves_go_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    """What was written after the checkpoint is void, as the training repeats those steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*OPTIONS, "--epochs", "2", "--ema-decay", "0.9", "--tensorboard"]
    arguments += ["--output", str(tmp_path)]
    for options in (["--stop-after", "6"], ["--stop-after", "20", "--resume"]):
        assert train.main([*arguments, *options]) == 0
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "checkpoint.pt.1").rename(tmp_path / "checkpoint.pt")  # of step 6
    assert train.main([*arguments, "--stop-after", "29", "--resume"]) == 0
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    state = checkpoint.load(tmp_path / "checkpoint.pt")["trainings"]["fused"]
    points = curves.Scalars("loss/fused")
    assert [point.step for point in points] == list(range(1, 30))
    assert [point.value for point in points] == pytest.approx(state["losses"])
    rates = [point.value for point in curves.Scalars("learning_rate/fused")]
    assert max(rates) == pytest.approx(0.05, rel=0.01)
    assert rates[-1] < max(rates)
    assert curves.Scalars("images_per_second/fused")[-1].value > 0
    accuracies = [curves.Scalars(f"{name}/fused")[0].value for name in ("accuracy", "accuracy_ema")]
    assert accuracies == pytest.approx(state["accuracies"][0])


def test_missing_tensorboard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _, message = refusal([*OPTIONS, "--output", str(tmp_path), "--tensorboard"], capsys)
    assert message.endswith("--tensorboard: pip install tensorboard")


COLORS = {"blue": (0, 0, 1.0), "green": (0, 1.0, 0), "red": (1.0, 0, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PNG files of three colours, of different sizes: 24 to train with and 9 to test with."""
    images = load("torchvision") and pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name, color in COLORS.items():
            directory = tmp_path / "images" / part / name
            directory.mkdir(parents=True)
            for index in range(count):
                height, width = generator.integers(20, 40, size=2)
                pixels = generator.uniform(size=(height, width, 3)) * 80 + np.array(color) * 175
                images.fromarray(pixels.astype(np.uint8)).save(directory / f"{index}.png")
    return tmp_path / "images"


def of_folder(folder: Path, *options: str) -> list[str]:
    sizes = ["--image-size", "16", "--batch-size", "8", "--width", "4", "--blocks-per-stage", "1"]
    arguments = ["--data", str(folder), "--blocks", "fused", "--epochs", "4", *sizes]
    return [*arguments, "--output", str(folder.parent / "out"), *options]


def folder_images(folder: Path) -> data.Dataset:
    return image_folder.load(replace(CONFIG, data=str(folder), image_size=16))


def test_image_files_are_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(of_folder(folder, "--lr", "0.1")) == 0
    table = capsys.readouterr().out
    assert "test accuracy (%)" in table
    assert "memory" not in table  # measured for comparisons only
    results = json.loads((folder.parent / "out" / "results.json").read_text())
    assert results["config"]["classes"] == 3
    assert results["config"]["train_images"] == 24
    assert len(results["results"]["fused"]["losses"]) == 12
    assert results["results"]["fused"]["best_test_accuracy"] > 0.6
    assert (folder.parent / "out" / "training.png").is_file()


def test_resumed_training_sees_the_same_crops_with_other_workers(folder: Path) -> None:
    path = folder.parent / "out" / "checkpoint.pt"
    assert train.main(of_folder(folder, "--stop-after", "8")) == 0
    whole = checkpoint.load(path)["trainings"]["fused"]
    assert train.main(of_folder(folder, "--stop-after", "4", "--workers", "2")) == 0
    assert train.main(of_folder(folder, "--stop-after", "8", "--workers", "1", "--resume")) == 0
    resumed = checkpoint.load(path)["trainings"]["fused"]
    for part in ("losses", "model", "optimizer"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)


def test_crops_depend_on_epoch_and_image_alone(folder: Path) -> None:
    images = folder_images(folder).train
    one, other = torch.tensor([3, 5]), torch.tensor([5, 3])
    state = torch.get_rng_state()
    first, again, later = images[0, one], images[0, other], images[1, one]
    torch.testing.assert_close(first[0], again[0].flip(0), rtol=0, atol=0)
    assert first[1].tolist() == again[1].flip(0).tolist() == later[1].tolist()
    assert not torch.equal(first[0], later[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_asks_for_other_crops(folder: Path) -> None:
    dataset = folder_images(folder)
    config = data.describe(replace(CONFIG, batch_size=8), dataset)
    images = [x for x, _ in data.training_batches(dataset.train, config, range(6))]
    for epoch in range(2):
        for step in range(3):
            indices = data.batch_indices(24, 8, CONFIG.seed, 3 * epoch + step)
            want, _ = dataset.train[epoch, indices]
            torch.testing.assert_close(images[3 * epoch + step], want.double(), rtol=0, atol=0)


def test_test_images_are_not_augmented(folder: Path) -> None:
    dataset = folder_images(folder)
    everything = torch.arange(len(dataset.test))
    images, labels = dataset.test[0, everything]
    torch.testing.assert_close(images, dataset.test[1, everything][0], rtol=0, atol=0)
    assert images.shape == (9, 3, 16, 16)
    mean = torch.tensor(image_folder.MEAN)[:, None, None]
    std = torch.tensor(image_folder.STD)[:, None, None]
    brightest = (images * std + mean).mean(dim=(2, 3)).argmax(1)
    assert [sorted(COLORS)[label] for label in labels] == [
        ("red", "green", "blue")[channel] for channel in brightest
    ]


def remove_class(folder: Path) -> None:
    (folder / "val" / "red").rename(folder / "val" / "rot")


def empty_class(folder: Path) -> None:
    (folder / "train" / "yellow").mkdir()


def break_image(folder: Path) -> None:
    (folder / "val" / "green" / "1.png").write_bytes(b"GIF89a")


@pytest.mark.parametrize(
    ("spoil", "options", "expected"),
    [
        (remove_class, [], "train/ and val/ differ in the classes ['red', 'rot']"),
        (empty_class, [], "Found no valid file for the classes yellow"),
        (break_image, [], "cannot read the image"),
        (break_image, ["--workers", "1"], "cannot read the image"),
    ],
)
def test_spoilt_folders_are_refused_in_one_line(
    spoil: Callable[[Path], None],
    options: list[str],
    expected: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(folder)
    code, message = refusal(of_folder(folder, *options), capsys)
    assert code == 2
    assert expected in message
    assert "green/1.png" in message or spoil is not break_image


def test_missing_torchvision_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, message = refusal(of_folder(folder), capsys)
    assert code == 2
    assert message.endswith("pip install torchvision")


@pytest.mark.slow
def test_torchvision_models_are_fused(folder: Path) -> None:
    options = ["--model", "resnet50", "--image-size", "32", "--stop-after", "1"]
    assert train.main(of_folder(folder, *options)) == 0
    config = Config(**checkpoint.load(folder.parent / "out" / "checkpoint.pt")["config"])
    reference, fused = (build(config, variant) for variant in ("reference", "fused"))
    assert len([row for row in fb.explain(fused) if row.fused]) == 17  # and the stem
    assert not any(row.fused for row in fb.explain(reference))
    torch.testing.assert_close(fused.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_models_are_torchvisions() -> None:
    models = load("torchvision").models
    assert all(callable(getattr(models, name)) for name in MODELS if name != SMALL)
