"""The command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import launch
import option_types
from config import (
    DEFAULT_EPOCHS,
    DTYPES,
    FOLDER_EPOCHS,
    LAYOUTS,
    MODELS,
    SINGLE_DTYPES,
    SMALL,
    VARIANTS,
    Config,
    RunOptions,
)

DESCRIPTION = """\
Train a ResNet of bottleneck blocks on real images, with the plain blocks (reference), with
FusedBottleneck (fused), or with both and compare: same initial weights, same batches. Prints
final loss, test accuracy and images/s, for the built-in sets also peak memory and the bytes that
autograd saves for backward, and writes checkpoint.pt, best-VARIANT.pt (weights for torch.load),
results.json and training.png to the output directory."""

EPILOG = """\
exit codes: 0 both trainings learned the same (or only one was run); 1 they parted by more than
the bounds in parity.py, or a loss was not finite; 2 bad options, data or checkpoint;
130 interrupted.

how it is measured: the two trainings take turns of a few steps on the same batches, so noise of
the machine hits both; images/s is from the median step (forward, backward, update). The peak is
what training steps need above weights and optimiser state, each variant in its own process.

examples:
  train.py                                    both trainings on MNIST, about 2 minutes on 2 cores
  train.py --data digits --width 16           a quick look
  train.py --layout contiguous                in the layout that torch has by itself
  train.py --blocks fused --stop-after 50     pause with a checkpoint ...
  train.py --blocks fused --resume            ... and go on
  train.py --device cuda --batch-size 256 --width 128 --blocks-per-stage 3 4
  torchrun --nproc-per-node=8 train.py --blocks fused --device cuda --dtype bfloat16 \\
    --data imagenet --model resnet50 --batch-size 2048 --lr 0.8 --warmup-epochs 5 \\
    --label-smoothing 0.1 --ema-decay 0.9999 --workers 8 --tensorboard --resume auto
"""

CHECKPOINT_EVERY = 20
#: Checkpoints of real networks are hundreds of megabytes.
FOLDER_CHECKPOINT_EVERY = 500


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.fail(message, exit_code=2)

    def fail(self, message: str, exit_code: int, *, everywhere: bool = True) -> NoReturn:
        """Exit with a message; if all processes do, with that of rank 0."""
        if everywhere and not launch.is_main():
            launch.leave_last_word_to_main()
            self.exit(exit_code)
        self.exit(exit_code, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """The parser of all options."""
    made = Parser(
        prog="train.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_task_options(made.add_argument_group("what to train"))
    _add_recipe_options(made.add_argument_group("how to train it"))
    _add_machine_options(made.add_argument_group("on what to run it"))
    _add_run_options(made.add_argument_group("output and continuation"))
    return made


def parse(parser: Parser, arguments: Sequence[str] | None) -> tuple[Config, RunOptions]:
    """The options; exits with one line if one is wrong, or if two do not go together."""
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = DEFAULT_EPOCHS.get(options.data, FOLDER_EPOCHS)
    config = _config(options)
    problem = _problem(config)
    if problem is not None:
        parser.error(problem)
    return config, _run_options(options, config)


def _problem(config: Config) -> str | None:
    if launch.launched() and len(config.variants) > 1:
        return "several processes train one kind of blocks: give --blocks fused or reference"
    if config.dtype in SINGLE_DTYPES and len(config.variants) > 1:
        return (
            f"argument --dtype: invalid choice: {config.dtype!r} with --blocks both: loss scaling "
            "skips steps on overflow, and trainings that skip different steps cannot be compared"
        )
    if config.model != SMALL and not config.is_folder:
        return f"--model {config.model} takes colour images: give a directory as --data"
    if config.warmup_epochs is not None and config.warmup_epochs > config.epochs:
        return f"--warmup-epochs {config.warmup_epochs:g} are more than --epochs {config.epochs}"
    return None


def _config(options: argparse.Namespace) -> Config:
    return Config(
        data=options.data,
        epochs=options.epochs,
        width=options.width,
        blocks_per_stage=tuple(options.blocks_per_stage),
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        layout=options.layout,
        variants=VARIANTS if options.blocks == "both" else (options.blocks,),
        model=options.model,
        image_size=options.image_size,
        warmup_epochs=options.warmup_epochs,
        weight_decay=options.weight_decay,
        label_smoothing=options.label_smoothing,
        clip_norm=options.clip_norm,
        ema_decay=options.ema_decay,
        sync_bn=options.sync_bn,
    )


def _run_options(options: argparse.Namespace, config: Config) -> RunOptions:
    every = FOLDER_CHECKPOINT_EVERY if config.is_folder else CHECKPOINT_EVERY
    return RunOptions(
        output=options.output,
        resume=options.resume,
        stop_after=options.stop_after,
        checkpoint_every=options.checkpoint_every or every,
        keep_checkpoints=options.keep_checkpoints,
        workers=options.workers,
        tensorboard=options.tensorboard,
    )


def _add_task_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=option_types.data,
        default="mnist",
        metavar="NAME|DIR",
        help="mnist: 5000 images of 28x28; digits: 1797 of 8x8; or a directory of image files, "
        "with train/ and val/ and in both a folder per class (default: %(default)s)",
    )
    group.add_argument(
        "--image-size",
        type=option_types.positive_int,
        default=Config.image_size,
        metavar="N",
        help="height and width to which image files are cropped (default: %(default)s)",
    )
    group.add_argument(
        "--blocks",
        choices=["both", *VARIANTS],
        default="both",
        help="train with both kinds of blocks and compare, or with one (default: %(default)s)",
    )
    group.add_argument(
        "--model",
        choices=MODELS,
        default=SMALL,
        help="a small ResNet, or one of torchvision's, whose blocks are then fused by "
        "fused_bottleneck.fuse (default: %(default)s)",
    )
    group.add_argument(
        "--width",
        type=option_types.positive_int,
        default=Config.width,
        metavar="N",
        help="of the small ResNet: bottleneck width of the first stage; each further stage doubles "
        "it, and a block has 4 times its width in outputs (default: %(default)s)",
    )
    group.add_argument(
        "--blocks-per-stage",
        type=option_types.positive_int,
        nargs="+",
        default=Config.blocks_per_stage,
        metavar="N",
        help="of the small ResNet: blocks of each stage, one number per stage; each further stage "
        "halves the resolution (default: "
        f"{' '.join(map(str, Config.blocks_per_stage))})",
    )


def _add_recipe_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs",
        type=option_types.positive_int,
        metavar="N",
        help=f"passes over the training images (default: {_listed(DEFAULT_EPOCHS)}, "
        f"{FOLDER_EPOCHS} for a directory)",
    )
    group.add_argument(
        "--batch-size",
        type=option_types.batch_size,
        default=Config.batch_size,
        metavar="N",
        help="images per step, of all processes together (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=option_types.positive_float,
        default=Config.lr,
        metavar="X",
        help="peak learning rate of SGD with momentum; a cosine takes it to zero "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--warmup-epochs",
        type=option_types.non_negative_float,
        metavar="X",
        help="linear warm-up to the peak, in epochs, 0.5 for example (default: a tenth of all)",
    )
    group.add_argument(
        "--weight-decay",
        type=option_types.non_negative_float,
        default=Config.weight_decay,
        metavar="X",
        help="of all parameters (default: %(default)s)",
    )
    group.add_argument(
        "--label-smoothing",
        type=option_types.fraction,
        default=Config.label_smoothing,
        metavar="X",
        help="share of the target spread evenly over the classes (default: %(default)s)",
    )
    group.add_argument(
        "--clip-norm",
        type=option_types.positive_float,
        metavar="X",
        help="scale gradients down to this norm of all together (default: they stay)",
    )
    group.add_argument(
        "--ema-decay",
        type=option_types.fraction,
        metavar="X",
        help="keep an exponential moving average of weights and statistics, 0.9999 for example, "
        "and test it too (default: none)",
    )
    group.add_argument(
        "--seed",
        type=option_types.non_negative_int,
        default=Config.seed,
        metavar="N",
        help="of the initial weights, the order of the images, their crops and flips "
        "(default: %(default)s)",
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        default=Config.device,
        help="cpu, cuda or cuda:N; cuda under torchrun: one for each process "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=[*DTYPES, *SINGLE_DTYPES],
        default=Config.dtype,
        help="float32 and float64: everything in it; bfloat16 and float16: float32 weights under "
        "autocast, float16 with loss scaling (default: %(default)s)",
    )
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=Config.layout,
        help="memory format of images and weights: contiguous is what torch does by itself, "
        "channels_last mostly the faster one for both kinds of blocks (default: %(default)s)",
    )
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="batch statistics over all processes (nn.SyncBatchNorm), not of each one's images",
    )
    group.add_argument(
        "--workers",
        type=option_types.non_negative_int,
        default=0,
        metavar="N",
        help="processes that load images, for each that trains; the images do not depend on it "
        "(default: %(default)s)",
    )


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where checkpoints, results.json and training.png go; what is there is replaced "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        choices=["required", "auto"],
        const="required",
        metavar="auto",
        help="continue from DIR/checkpoint.pt with the same options; on a CPU, with as many "
        "threads and processes as before, the result is bit for bit that of a training that never "
        "stopped. auto: take the checkpoint before it if it is corrupted, and start if there is "
        "none",
    )
    group.add_argument(
        "--stop-after",
        type=option_types.positive_int,
        metavar="N",
        help="stop with a checkpoint after N steps, to be continued with --resume",
    )
    group.add_argument(
        "--checkpoint-every",
        type=option_types.positive_int,
        metavar="N",
        help="steps from checkpoint to checkpoint; every epoch ends with one, too "
        f"(default: {CHECKPOINT_EVERY}, {FOLDER_CHECKPOINT_EVERY} for a directory of images)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=option_types.positive_int,
        default=2,
        metavar="N",
        help="checkpoints to keep: checkpoint.pt, checkpoint.pt.1 before it, ... "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write curves to DIR/tensorboard",
    )


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} for {name}" for name, number in numbers.items())
