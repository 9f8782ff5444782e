"""The plain nn blocks: the oracle of every test and the baseline of every benchmark.

They are also the *composed* path of the fused modules, which subclass them: whenever fusing would
change what the user sees, these very forward methods run.
"""

import torch
from torch import Tensor, nn


class ConvBNReLU(nn.Module):
    """``relu(bn(conv(x)))`` with plain ``nn.Conv2d``, ``nn.BatchNorm2d`` and ``nn.ReLU`` children.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            ``torch.nn.Conv2d``, in its order.
        eps, momentum: as in ``torch.nn.BatchNorm2d``.
        device, dtype: where and as what the parameters are created.

    Shapes: x ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """ResNet bottleneck block, v1.5: 1x1, 3x3 (strided), 1x1 convolutions with a residual.

    ``out = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + s(x))`` where ``s`` is
    ``identity_downsample`` or the identity.

    Args:
        in_channels: channels C of the input.
        out_channels: the block's width M; the output has ``expansion * out_channels`` channels.
        identity_downsample: module that maps x to the output's shape; None means the identity,
            which needs ``in_channels == expansion * out_channels`` and ``stride == 1``.
        stride: stride of the 3x3 convolution.
        bias: whether the three convolutions have a bias (as ``nn.Conv2d`` has by default).
        groups, dilation: of the 3x3 convolution, whose padding equals its dilation.
        expansion: output channels per unit of width.
        eps, momentum: of the batch normalisations.
        device, dtype: where and as what the parameters are created.

    Shapes: x ``[N, C, H, W]`` to ``[N, expansion*M, (H-1)//stride + 1, (W-1)//stride + 1]``.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", figure 5, with the
    stride on the 3x3 convolution.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        identity_downsample: nn.Module | None = None,
        stride: int | tuple[int, int] = 1,
        *,
        bias: bool = True,
        groups: int = 1,
        dilation: int = 1,
        expansion: int = 4,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.expansion = expansion
        wide = out_channels * expansion
        like: dict = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **like)
        self.bn1 = nn.BatchNorm2d(out_channels, eps, momentum, **like)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, stride, dilation, dilation, groups, bias, **like
        )
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **like)
        self.conv3 = nn.Conv2d(out_channels, wide, 1, bias=bias, **like)
        self.bn3 = nn.BatchNorm2d(wide, eps, momentum, **like)
        self.relu = nn.ReLU()
        self.identity_downsample = identity_downsample

    def branch(self, x: Tensor) -> Tensor:
        """The block before the residual: ``bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))

    def residual(self, x: Tensor) -> Tensor:
        """What the branch is added to: x, or the downsample of x."""
        return x if self.identity_downsample is None else self.identity_downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.residual(x)
        return self.relu(out)
