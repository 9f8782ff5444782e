"""Write docs/compatibility.md: what ``fuse`` takes of the models of known libraries.

python -m benchmarks.compatibility            # write
python -m benchmarks.compatibility --check    # exit status 1 if the page is not up to date
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import fused_bottleneck
from benchmarks import model_zoo, records

PAGE = records.ROOT / "docs" / "compatibility.md"
PREFACE = """\
# Which models `fuse` takes

Written by `python -m benchmarks.compatibility`, which makes each model, in the library's version of
`constraints.txt`, and asks `fused_bottleneck.explain` about it. `make lint` checks that the page is
current. For a model of yours:

```bash
python -m fused_bottleneck.explain torchvision.models.resnet50
python -m fused_bottleneck.explain timm.create_model resnet50d
```

A block is found by its class where that is one of the libraries' below, and else by its graph: any
class whose forward `torch.fx` shows to be relu(branch + shortcut), the branch being conv+BN+ReLU,
conv+BN+ReLU, conv+BN on 1x1, any and 1x1 kernels. What is declined runs as before.
"""


def _made(model: model_zoo.Model) -> nn.Module:
    """The model, without memory for its parameters where its constructor can do so."""
    try:
        with torch.device("meta"):
            return model.make()
    except NotImplementedError:  # it computes sizes with tensors
        return model.make()


def rows() -> Iterator[tuple[str, ...]]:
    """Library, model, and what becomes of its blocks, for each model."""
    for model in model_zoo.MODELS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = fused_bottleneck.explain(_made(model))
        ready = sum(row.reason is None for row in report)
        kinds = sorted({f"`{row.kind.rpartition('.')[2]}`" for row in report})
        reasons = Counter(row.reason for row in report if row.reason is not None)
        why = "; ".join(f"{count}: {reason}" for reason, count in sorted(reasons.items()))
        yield (
            model.package,
            f"`{model.name}`",
            ", ".join(kinds) or "no bottleneck blocks",
            str(ready),
            str(len(report) - ready),
            why,
        )


def page() -> str:
    """The text of the page."""
    head = ("library", "model", "class of the blocks", "fused", "declined", "why")
    lines = [head, ("---", "---", "---", "---:", "---:", "---"), *rows()]
    return PREFACE + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check, the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compatibility", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    args = parser.parse_args(argv)
    text = page()
    if not args.check:
        PAGE.write_text(text)
        return 0
    current = PAGE.exists() and PAGE.read_text() == text
    if not current:
        print(f"{PAGE.name} is not up to date: run `make report`", file=sys.stderr)
    return int(not current)


if __name__ == "__main__":
    sys.exit(main())
