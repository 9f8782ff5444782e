"""Train a small bottleneck ResNet with plain and with fused blocks, and compare.

The program is in the modules beside this one; here is its command line.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from config import DEFAULT_EPOCHS, DTYPES, LAYOUTS, VARIANTS, Config, Stop

DESCRIPTION = """\
Train a small ResNet of bottleneck blocks on real images, once with the plain blocks
(reference) and once with FusedBottleneck (fused): same initial weights, same batches. Prints
final loss, test accuracy, images/s, peak memory and the bytes that autograd saves for backward,
and writes checkpoint.pt, results.json and training.png to the output directory."""

EPILOG = """\
exit codes: 0 both trainings learned the same (or only one was run); 1 they parted by more than
the bounds in parity.py, or a loss was not finite; 2 bad options or checkpoint; 130 interrupted.

how it is measured: the two trainings take turns of a few steps on the same batches, so noise of
the machine hits both; images/s is from the median step (forward, backward, update). The peak is
what training steps need above weights and optimiser state, each variant in its own process.

examples:
  train.py                                    both trainings on MNIST, about 2 minutes on 2 cores
  train.py --data digits --width 16           a quick look
  train.py --layout channels_last             against the plain blocks at their fastest
  train.py --blocks fused --stop-after 50     pause with a checkpoint ...
  train.py --blocks fused --resume            ... and go on
  train.py --device cuda --batch-size 256 --width 128 --blocks-per-stage 3 4
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage that argparse prints before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every expected failure into one line and an exit code."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    try:
        from experiment import run  # after parsing: importing torch takes seconds
    except ModuleNotFoundError as error:
        parser.error(f"the Python package {error.name} is missing; `make demo` installs it")
    try:
        return run(
            _config(options),
            options.output,
            resume=options.resume,
            stop_after=options.stop_after,
            checkpoint_every=options.checkpoint_every,
        )
    except Stop as stop:
        parser.exit(stop.exit_code, f"{parser.prog}: error: {stop}\n")
    except KeyboardInterrupt:
        parser.exit(
            130, f"\n{parser.prog}: interrupted; --resume goes on from the last checkpoint\n"
        )


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_training_options(parser.add_argument_group("what to train"))
    _add_machine_options(parser.add_argument_group("how to run it"))
    _add_run_options(parser.add_argument_group("output and continuation"))
    return parser


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        choices=list(DEFAULT_EPOCHS),
        default="mnist",
        help="mnist: 5000 images of 28x28; digits: 1797 of 8x8 (default: %(default)s)",
    )
    group.add_argument(
        "--blocks",
        choices=["both", *VARIANTS],
        default="both",
        help="train with both kinds of blocks and compare, or with one (default: %(default)s)",
    )
    group.add_argument(
        "--width",
        type=_positive_int,
        default=Config.width,
        metavar="N",
        help="bottleneck width of the first stage; each further stage doubles it, and a block "
        "has 4 times its width in outputs (default: %(default)s)",
    )
    group.add_argument(
        "--blocks-per-stage",
        type=_positive_int,
        nargs="+",
        default=Config.blocks_per_stage,
        metavar="N",
        help="blocks of each stage, one number per stage; each further stage halves the "
        "resolution (default: 2 1 1)",
    )
    group.add_argument(
        "--epochs",
        type=_positive_int,
        metavar="N",
        help=f"passes over the training images (default: {_listed(DEFAULT_EPOCHS)})",
    )
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default=Config.batch_size,
        metavar="N",
        help="images per step (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=_positive_float,
        default=Config.lr,
        metavar="X",
        help="peak learning rate of SGD with momentum (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        default=Config.seed,
        metavar="N",
        help="of the initial weights and of the order of the images (default: %(default)s)",
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        default=Config.device,
        help="cpu, cuda or cuda:N (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=Config.dtype,
        help="float32 and float64: everything in it; bfloat16: float32 weights under autocast "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=Config.layout,
        help="memory format of images and weights: contiguous is what torch does by itself, "
        "channels_last mostly the faster one for both kinds of blocks (default: %(default)s)",
    )


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where checkpoint.pt, results.json and training.png go; what is there is replaced "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from DIR/checkpoint.pt with the same options; on a CPU, with as many "
        "threads as before, the result is bit for bit that of a training that never stopped",
    )
    group.add_argument(
        "--stop-after",
        type=_positive_int,
        metavar="N",
        help="stop with a checkpoint after N steps, to be continued with --resume",
    )
    group.add_argument(
        "--checkpoint-every",
        type=_positive_int,
        default=20,
        metavar="N",
        help="steps from checkpoint to checkpoint (default: %(default)s)",
    )


def _config(options: argparse.Namespace) -> Config:
    return Config(
        data=options.data,
        epochs=options.epochs or DEFAULT_EPOCHS[options.data],
        width=options.width,
        blocks_per_stage=tuple(options.blocks_per_stage),
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        layout=options.layout,
        variants=VARIANTS if options.blocks == "both" else (options.blocks,),
    )


def _positive_int(text: str) -> int:
    return _int_from(1, text)


def _batch_size(text: str) -> int:
    return _int_from(2, text)  # batch statistics need more than one value per channel


def _seed(text: str) -> int:
    return _int_from(0, text)


def _int_from(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"an integer of at least {least}, not {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a positive number, not {text!r}")
    return value


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} for {name}" for name, number in numbers.items())


if __name__ == "__main__":
    sys.exit(main())
