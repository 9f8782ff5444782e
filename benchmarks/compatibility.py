"""Write docs/compatibility.md: what ``fuse`` takes of the models of known libraries.

python -m benchmarks.compatibility            # write
python -m benchmarks.compatibility --check    # exit status 1 if the page is not up to date
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

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

Blocks that are fused and declined, with the reasons; the last column counts what `stem=True` adds:
the stem that the network starts with, and each `nn.Sequential` with a conv+BN+ReLU that pays.
"""
OTHERS = [
    ("library", "run with", "fused", "declined"),
    ("---", "---", "---", "---"),
    (
        "detectron2",
        "commit 02b5c4e",
        "`BottleneckBlock` with BN or FrozenBN",
        "stride on the 1x1 convolution; GN",
    ),
    (
        "mmdet, mmpretrain, mmseg",
        "3.3.0, 1.2.0, 1.2.2",
        "`Bottleneck` of ResNet and ResNeXt",
        "`with_cp`, plugins, DCN, stochastic depth; strided blocks of style `caffe`; GN",
    ),
    (
        "CLIP, open_clip",
        "openai-clip 1.0.1, open_clip_torch 3.3.0",
        "blocks of stride 1, by their graph",
        "strided ones, which pool before their last convolution",
    ),
]
OTHERS_PREFACE = """
## Libraries that are not in `constraints.txt`

The tests have stand-ins of their blocks (`tests/stand_ins.py`): the same structure under the same
names. On 2026-11-23 networks of the real ones gave, fused, the unfused output, gradients and
running statistics in float64, in training and in eval.

"""
NOTES = """
`stem=True` takes OpenMMLab's stems, but not its `ConvModule`; and neither CLIP's nor detectron2's.

## FrozenBatchNorm2d under autocast

torchvision's is two products with float32 vectors: under autocast its output is float32, and so are
the sum and the block's output, to which the next block adds its own. The fused block has one dtype
for x, residual and output. In the autocast dtype it would round what eager keeps in float32; in
float32 throughout it would lose the 16-bit products, which are what autocast is for; and with only
the narrow convolutions fused, three quarters of the memory traffic would stay. So such a block runs
as it is, and `why_not_fused` says so. detectron2's keeps its input's dtype, and is fused under
autocast too; so is an `nn.BatchNorm2d` in eval mode, which computes the same function.
"""


def _made(model: model_zoo.Model) -> nn.Module:
    """The model, without memory for its parameters where its constructor can do so."""
    try:
        with torch.device("meta"):
            return model.make()
    except NotImplementedError:  # it computes sizes with tensors
        return model.make()


def rows() -> Iterator[tuple[str, ...]]:
    """Library, model, what becomes of its blocks, and what there is besides, for each model."""
    for model in model_zoo.MODELS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _made(model)
            report = fused_bottleneck.explain(made)
            besides = fused_bottleneck.explain(made, stem=True).ready() - report.ready()
        kinds = sorted({f"`{row.kind.rpartition('.')[2]}`" for row in report})
        reasons = Counter(row.reason for row in report if row.reason is not None)
        why = "; ".join(f"{count}: {reason}" for reason, count in sorted(reasons.items()))
        yield (
            model.package,
            f"`{model.name}`",
            ", ".join(kinds) or "no bottleneck blocks",
            str(report.ready()),
            str(len(report) - report.ready()),
            why,
            str(besides),
        )


def page() -> str:
    """The text of the page."""
    head = ("library", "model", "class of the blocks", "fused", "declined", "why", "stem")
    lines = [head, ("---", "---", "---", "---:", "---:", "---", "---:"), *rows()]
    return PREFACE + "\n" + _table(lines) + OTHERS_PREFACE + _table(OTHERS) + NOTES


def _table(lines: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
