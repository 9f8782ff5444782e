"""Train a bottleneck ResNet with fused blocks, with plain ones, or with both to compare them.

The program is in the modules beside this one; options.py has its command line.
"""

from collections.abc import Sequence

import launch
import options
from config import Stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every expected failure into one line and an exit code."""
    parser = options.parser()
    config, run_options = options.parse(parser, arguments)
    try:
        from experiment import run  # after parsing: importing torch takes seconds
    except ModuleNotFoundError as error:
        parser.error(f"the Python package {error.name} is missing; `make demo` installs it")
    try:
        return run(config, run_options)
    except Stop as stop:
        parser.fail(str(stop), stop.exit_code, everywhere=stop.everywhere)
    except KeyboardInterrupt:
        message = f"\n{parser.prog}: interrupted; --resume goes on from the last checkpoint\n"
        parser.exit(130, message if launch.is_main() else None)


if __name__ == "__main__":
    launch.leave(main())
