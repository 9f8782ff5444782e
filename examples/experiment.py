"""One run from data to report."""

import sys
import time

import checkpoint
import data
import distributed
import footprint
import image_folder
import launch
import loop
import parity
import reporting
import saving
import torch
from config import Config, RunOptions, Stop
from torch import nn
from training import Training

import fused_bottleneck


def run(config: Config, options: RunOptions) -> int:
    """Train, measure, report; the exit code is 1 if two trainings parted, else 0."""
    start = time.perf_counter()
    _check_machine(config)
    with distributed.process_group(config.device):
        distributed.on_main(lambda: _prepare(options))
        dataset = image_folder.load(config) if config.is_folder else data.load(config.data)
        config = data.describe(config, dataset)
        trainings = _trainings(config)
        saving.start(trainings, options)
        loop.train(trainings, dataset, options)
        for training in trainings:
            training.leave_group()
    if not launch.is_main():
        return 0
    done, total = trainings[0].steps, trainings[0].total_steps
    if done < total:
        print(f"stopped after step {done} of {total}; continue with --resume")
        return 0
    results = _results(trainings, dataset.image_size)
    return _report(config, results, options, time.perf_counter() - start)


def _check_machine(config: Config) -> None:
    missing = launch.missing_variables() if launch.launched() else []
    if missing:
        raise Stop(
            f"WORLD_SIZE is set, and {', '.join(missing)} not: start several processes by torchrun",
            exit_code=2,
        )
    _check_device(config.device)
    each, rest = divmod(config.batch_size, launch.size())
    if rest or each < 2:
        raise Stop(
            f"--batch-size {config.batch_size} cannot be divided among {launch.size()} processes, "
            "the same number of at least 2 images for each",
            exit_code=2,
        )
    plain_sync_bn = config.sync_bn and launch.launched() and config.variants == ("reference",)
    if plain_sync_bn and not config.device.startswith("cuda"):
        raise Stop(
            "--sync-bn with --blocks reference and several processes needs --device cuda: "
            "nn.SyncBatchNorm does not run on a CPU",
            exit_code=2,
        )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Stop(f"--device: there is no kind of device called {name!r}", exit_code=2) from None
    if device.type not in ("cpu", "cuda"):
        raise Stop(f"--device: cpu or cuda, not {name!r}", exit_code=2)
    if device.index is not None and launch.launched():
        raise Stop(f"--device {name}: torchrun's processes take one each, --device cuda", 2)
    index = launch.local_rank() if device.index is None else device.index
    found = torch.cuda.device_count()
    if device.type == "cuda" and index >= found:
        raise Stop(
            f"--device {name}: torch finds {found} CUDA devices here", 2, everywhere=found == 0
        )


def _prepare(options: RunOptions) -> None:
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        checkpoint.check_writable(options.output)
    except OSError as error:
        raise Stop(
            f"--output: cannot write to {options.output}: {error.strerror}", exit_code=2
        ) from None


def _trainings(config: Config) -> list[Training]:
    if config.total_steps == 0:
        raise Stop(
            f"--batch-size {config.batch_size} is more than the "
            f"{config.train_images} training images of {config.data}",
            exit_code=2,
        )
    trainings = [Training(config, variant, config.total_steps) for variant in config.variants]
    # Only now: the weights are to be the same in every process, what dropout draws is not.
    torch.manual_seed(config.seed + launch.rank())
    return trainings


def _results(trainings: list[Training], image_size: int) -> dict[str, reporting.Result]:
    config = trainings[0].config
    # Only with the small sets: the fresh process needs memory that this one has not released, and
    # a long training must not fail in its last minute.
    measures = not config.is_folder and not launch.launched()
    if measures:
        print("measuring memory in a fresh process each ...", file=sys.stderr)
    results = {}
    for training in trainings:
        measured = footprint.measure(config, training.variant, image_size) if measures else None
        results[training.variant] = reporting.Result(
            losses=training.losses,
            accuracy=training.accuracy,
            ema_accuracy=training.ema_accuracy,
            best_accuracy=training.best_accuracy,
            images_per_second=training.images_per_second,
            footprint=measured,
            composed=_declined(training.model) if measured is None else measured.composed,
        )
    return results


def _declined(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in fused_bottleneck.explain(model) if row.reason}


def _report(
    config: Config, results: dict[str, reporting.Result], options: RunOptions, seconds: float
) -> int:
    checks = []
    if len(results) == 2:
        bounds = parity.BOUNDS[config.dtype]
        checks = parity.compare(results["reference"].outcome, results["fused"].outcome, bounds)
    output = options.output
    reporting.write_json(output / "results.json", config, results, checks, seconds)
    reporting.plot(output / "training.png", config, results)
    print("\n" + reporting.table(results) + "\n")
    for note in reporting.notes(results):
        print(note)
    for check in checks:
        verdict = "ok" if check.passed else "TOO FAR APART"
        print(
            f"difference of {check.name}: {check.difference:.2g} (bound {check.bound:g}) {verdict}"
        )
    print(
        f"{seconds:.0f} s; results.json, training.png, {options.checkpoint.name} and the weights "
        f"of the best epoch are in {output}"
    )
    return 0 if all(check.passed for check in checks) else 1
