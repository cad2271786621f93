"""The spatial adapter of FSEFT (arXiv 2303.17051v4)."""

import torch
from torch import nn


class SpatialAdapter(nn.Module):
    """x + conv2(relu(conv1(x))) with 3^3 convolutions without bias; 54 channels^2 weights, 124,416 for 48 channels.

    conv2 starts at zero: step 0 is the identity, so the head sees the backbone's features as they are.
    """

    # voxels around a crop that its outermost output voxels depend on
    margin = 2

    def __init__(self, channels: int, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, X, Y, Z) -> the same shape."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # oneDNN's convolutions in bfloat16 take half the time where channels come last
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return x + self.conv2(torch.relu(self.conv1(x)))
