"""One run of the demo from data to report."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import checkpoint
import data
import footprint
import parity
import reporting
import torch
from config import Config, Stop
from tqdm import tqdm
from training import Training, to_device, train_in_lockstep


def run(
    config: Config, output: Path, *, resume: bool, stop_after: int | None, checkpoint_every: int
) -> int:
    """Train, measure, report; the exit code is 1 if the trainings parted, else 0.

    Args:
        config: what to train.
        output: directory of checkpoint.pt, results.json and training.png; made if needed.
        resume: continue from the checkpoint in ``output`` instead of starting again.
        stop_after: stop with a checkpoint when this many steps are done; None means never.
        checkpoint_every: steps between checkpoints.
    """
    start = time.perf_counter()
    _check_device(config.device)
    _prepare(output)
    dataset = data.load(config.data)
    total_steps = config.epochs * (len(dataset.train_images) // config.batch_size)
    if total_steps == 0:
        raise Stop(
            f"--batch-size {config.batch_size} is more than the "
            f"{len(dataset.train_images)} training images of {config.data}",
            exit_code=2,
        )
    trainings = [Training(config, variant, total_steps) for variant in config.variants]
    path = output / "checkpoint.pt"
    if resume:
        _restore(trainings, config, path)
    dataset = to_device(dataset, config)
    last_step = min(total_steps, stop_after or total_steps)
    _train(trainings, dataset, last_step, path, checkpoint_every)
    done = len(trainings[0].losses)
    if done < total_steps:
        print(f"stopped after step {done} of {total_steps}; continue with --resume")
        return 0
    print("testing, and measuring memory in a fresh process each ...", file=sys.stderr)
    results = {training.variant: _result(training, dataset) for training in trainings}
    return _report(config, results, output, time.perf_counter() - start)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Stop(f"--device: there is no kind of device called {name!r}", exit_code=2) from None
    if device.type not in ("cpu", "cuda"):
        raise Stop(f"--device: cpu or cuda, not {name!r}", exit_code=2)
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise Stop(f"--device {name}: torch finds {found} CUDA devices here", exit_code=2)


def _prepare(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.check_writable(output)
    except OSError as error:
        raise Stop(f"--output: cannot write to {output}: {error.strerror}", exit_code=2) from None


def _restore(trainings: Sequence[Training], config: Config, path: Path) -> None:
    state = checkpoint.load(path, config.device)
    for field in fields(Config):
        before, now = state["config"].get(field.name), getattr(config, field.name)
        if before != now:
            raise Stop(
                f"--resume: the checkpoint was written with {field.name}={before}, not {now}; "
                "give the same options, or start again without --resume",
                exit_code=2,
            )
    for training in trainings:
        training.load_state_dict(state["trainings"][training.variant])


def _train(
    trainings: Sequence[Training],
    dataset: data.Dataset,
    last_step: int,
    path: Path,
    checkpoint_every: int,
) -> None:
    done = saved = len(trainings[0].losses)
    bar = tqdm(
        total=max(done, last_step) * len(trainings),
        initial=done * len(trainings),
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )

    def on_step(_: Training) -> None:
        bar.set_postfix_str(", ".join(_progress(t) for t in trainings if t.losses), refresh=False)
        bar.update()

    with bar:
        for done in train_in_lockstep(trainings, dataset, last_step, on_step):
            if done - saved >= checkpoint_every or done == last_step:
                _save(trainings, path)
                saved = done


def _progress(training: Training) -> str:
    speed = training.recent_images_per_second
    return f"{training.variant}: loss {training.losses[-1]:.3f} {speed:.0f} img/s"


def _save(trainings: Sequence[Training], path: Path) -> None:
    state = {
        "config": asdict(trainings[0].config),
        "trainings": {training.variant: training.state_dict() for training in trainings},
    }
    try:
        checkpoint.save(state, path)
    except OSError as error:
        raise Stop(f"cannot write the checkpoint {path}: {error.strerror}", exit_code=2) from None


def _result(training: Training, dataset: data.Dataset) -> reporting.Result:
    image_size = dataset.test_images.shape[-1]
    return reporting.Result(
        losses=training.losses,
        accuracy=training.accuracy(dataset.test_images, dataset.test_labels),
        images_per_second=training.images_per_second,
        footprint=footprint.measure(training.config, training.variant, image_size),
    )


def _report(
    config: Config, results: dict[str, reporting.Result], output: Path, seconds: float
) -> int:
    checks = []
    if len(results) == 2:
        bounds = parity.BOUNDS[config.dtype]
        checks = parity.compare(results["reference"].outcome, results["fused"].outcome, bounds)
    reporting.write_json(output / "results.json", config, results, checks, seconds)
    reporting.plot(output / "training.png", config, results)
    print("\n" + reporting.table(results) + "\n")
    for variant, result in results.items():
        for name, reason in result.footprint.composed.items():
            print(f"note: {variant} {name} ran composed, not fused: {reason}")
    for check in checks:
        verdict = "ok" if check.passed else "TOO FAR APART"
        print(
            f"difference of {check.name}: {check.difference:.2g} (bound {check.bound:g}) {verdict}"
        )
    print(f"{seconds:.0f} s; results.json, training.png and checkpoint.pt are in {output}")
    return 0 if all(check.passed for check in checks) else 1
