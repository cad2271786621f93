"""The spatial adapter of FSEFT (arXiv 2303.17051v4)."""

import torch
from torch import nn
from torch.nn import functional as F

from fsefs_nnunet.device import THIN


class SpatialAdapter(nn.Module):
    """x + conv2(relu(conv1(x))) with 3^3 convolutions without bias; 54 channels^2 weights, 124,416 for 48 channels.

    conv2 starts at zero: step 0 is the identity, so the head sees the backbone's features as they are.
    """

    # voxels around a crop that its outermost output voxels depend on
    margin = 2

    def __init__(self, channels: int, dilation: int = 1):
        super().__init__()
        self.dilation = dilation
        self.conv1 = nn.Conv3d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, X, Y, Z) -> the same shape."""
        if self.dilation == 1 or x.device.type != "cpu" or x.shape[2] <= self.dilation * THIN:
            return self._block(x, self.dilation)
        # on CPUs the gradient of a dilated convolution takes three times as long as that of a plain one on every
        # `dilation`-th voxel, which gives the same result
        outside = None
        if any(n % self.dilation for n in x.shape[2:]):
            outside = split(x.new_ones((len(x), 1, *x.shape[2:])), self.dilation) == 0
        return merged(self._block(split(x, self.dilation), 1, outside), self.dilation, x.shape)

    def _block(self, x: torch.Tensor, dilation: int, outside: torch.Tensor | None = None) -> torch.Tensor:
        """outside: mask of the padding, which both convolutions must see as zeros."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # oneDNN's convolutions in bfloat16 take half the time with channels last
            x = x.contiguous(memory_format=torch.channels_last_3d)
        inner = torch.relu(F.conv3d(x, self.conv1.weight, padding="same", dilation=dilation))
        if outside is not None:
            inner = inner.masked_fill(outside, 0)
        return x + F.conv3d(inner, self.conv2.weight, padding="same", dilation=dilation)


def split(x: torch.Tensor, step: int) -> torch.Tensor:
    """(B, C, X, Y, Z) -> (B step^3, C, x, y, z): every step-th voxel, from each offset; zeros pad the far ends."""
    b, c, *shape = x.shape
    sides = [-(-n // step) for n in shape]
    x = F.pad(x, [n for side, have in zip(reversed(sides), reversed(shape)) for n in (0, side * step - have)])
    x = x.view(b, c, sides[0], step, sides[1], step, sides[2], step)
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(b * step**3, c, *sides)


def merged(x: torch.Tensor, step: int, shape: torch.Size) -> torch.Tensor:
    """The inverse of `split`; shape: the original (B, C, X, Y, Z)."""
    b, c, *wanted = shape
    sides = x.shape[2:]
    x = x.reshape(b, step, step, step, c, *sides).permute(0, 4, 5, 1, 6, 2, 7, 3)
    x = x.reshape(b, c, *(n * step for n in sides))
    return x[:, :, : wanted[0], : wanted[1], : wanted[2]]
