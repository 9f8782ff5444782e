"""What of a run is saved, and how it continues from that."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import checkpoint
import distributed
import launch
import torch
from config import Config, RunOptions, Stop
from torch import Tensor
from training import Training


def save(trainings: Sequence[Training], options: RunOptions, *, tested: bool) -> None:
    """Write the checkpoint and, after a test that is the best so far, the weights.

    Raises ``Stop``, and leaves what is there as it is, if a weight is not finite.
    """
    state = {
        "config": asdict(trainings[0].config),
        "processes": launch.size(),
        "random": distributed.gather(_random_state()),
        "trainings": {training.variant: training.state_dict() for training in trainings},
    }

    def write() -> None:
        for training in trainings:
            training.check_finite()
        try:
            for training in trainings:
                if tested and training.is_best:
                    path = options.output / f"best-{training.variant}.pt"
                    checkpoint.save_weights(training.weights(), path)
            checkpoint.save(state, options.checkpoint, options.keep_checkpoints)
        except OSError as error:
            raise Stop(f"cannot write to {options.output}: {error.strerror}", exit_code=2) from None

    distributed.on_main(write)


def start(trainings: Sequence[Training], options: RunOptions) -> None:
    """Continue from a checkpoint as ``options.resume`` says, or make room for new ones."""
    state = distributed.on_main(lambda: _find(options))
    if state is not None:
        _restore(trainings, state)


def _find(options: RunOptions) -> dict[str, Any] | None:
    if options.resume == "auto":
        return checkpoint.load_newest(options.checkpoint)
    if options.resume == "required":
        return checkpoint.load(options.checkpoint)
    checkpoint.remove_all(options.checkpoint)
    return None


def _restore(trainings: Sequence[Training], state: dict[str, Any]) -> None:
    _check_config(trainings[0].config, state["config"])
    for training in trainings:
        training.load_state_dict(state["trainings"][training.variant])
    before, now = state["processes"], launch.size()
    if before == now:
        _set_random_state(state["random"][launch.rank()])
    elif launch.is_main():
        print(
            f"note: processes: {before} before, {now} now; the batches are the same, but not the "
            "rounding, nor the statistics of each process's share",
            file=sys.stderr,
        )


def _check_config(config: Config, saved: dict[str, Any]) -> None:
    for field in fields(Config):
        before, now = saved.get(field.name), getattr(config, field.name)
        if before != now:
            raise Stop(
                f"--resume: the checkpoint was written with {field.name}={before}, not {now}; "
                "give the same options, or start again without --resume",
                exit_code=2,
            )


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
