"""``FusedConvBNReLU``: conv+BN+ReLU as a drop-in module, for a stem for example."""

from .chain import FusedChain
from .fused_module import composed_method
from .layout import ChainLayout
from .reference import ConvBNReLU


class FusedConvBNReLU(FusedChain, ConvBNReLU):
    """Drop-in replacement of ``ConvBNReLU``: same arguments, children, state_dict and results.

    Keeps the convolution's input and output for backward, and not what the normalisation and the
    ReLU return. Reads its children at every call, and runs composed where fusing would change
    what the user sees; ``why_not_fused`` tells.

    Shapes: x ``[N, C, H, W]`` to ``[N, W, H', W']``, channels_last if x or the weight is.
    """

    plain_class = ConvBNReLU
    plain_layout = ChainLayout(("conv", "bn", "relu"))
    composed = composed_method(ConvBNReLU)
