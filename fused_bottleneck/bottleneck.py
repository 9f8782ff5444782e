"""``FusedBottleneck``: the bottleneck block as a drop-in module."""

from .block import FusedBlock
from .fused_module import composed_method
from .layout import Layout
from .reference import Bottleneck


class FusedBottleneck(FusedBlock, Bottleneck):
    """Drop-in replacement of ``Bottleneck``: same arguments, children, state_dict and results.

    Constructor: see ``Bottleneck``. Geometry, modes and parameters are read from the children at
    every call, so that freezing a normalisation or patching a stride works as on plain modules.
    An ``identity_downsample`` that is exactly ``Sequential(conv1x1, BatchNorm2d)`` is fused; any
    other module is called as it is. Where fusing would change what the user sees (hooks on
    children, torch.func, export, an input that does not fit) the composed block runs instead;
    ``why_not_fused`` tells.

    Shapes: x ``[N, C, H, W]`` to ``[N, 4*M, H', W']``, channels_last if x or a weight is.
    """

    plain_class = Bottleneck
    plain_layout = Layout(shortcut="identity_downsample")
    composed = composed_method(Bottleneck)
