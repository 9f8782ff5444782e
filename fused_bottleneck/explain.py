"""What ``fuse`` would do to a model, as a table.

    python -m fused_bottleneck.explain torchvision.models.resnet50
    python -m fused_bottleneck.explain --stem timm.create_model resnet50d

The first argument is whatever returns a model, the others its arguments: ``value`` or
``name=value``, where a value is a Python literal or else text.
"""

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any

from . import explain


def _constructor(path: str) -> Callable[..., Any]:
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"cannot import {path}: {error}") from error
    if not callable(found):
        raise SystemExit(f"{path} is a {type(found).__name__}: give what makes a model")
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the model that the arguments make."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_bottleneck.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("constructor", help="dotted name, like torchvision.models.resnet50")
    parser.add_argument("arguments", nargs="*", help="of the constructor")
    parser.add_argument("--stem", action="store_true", help="list also what fuse(stem=True) takes")
    options = parser.parse_args(argv)
    named = dict(a.split("=", 1) for a in options.arguments if "=" in a)
    values = [_value(a) for a in options.arguments if "=" not in a]
    make = _constructor(options.constructor)
    model = make(*values, **{name: _value(text) for name, text in named.items()})
    print(explain(model, stem=options.stem))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, "")
    sys.exit(main())

# Importing a module binds its name in its package. There it is to stay the function's, so the
# function takes the place of this module, which is a command and nothing to import.
sys.modules[__name__] = explain  # type: ignore[assignment]
