"""The spatial adapter of FSEFT's first version (arXiv 2303.17051v1), with instance norm."""

import torch
from torch import nn
from torch.nn.functional import instance_norm, leaky_relu


class SpatialINAdapter(nn.Module):
    """leaky(x + norm(conv2(leaky(norm(conv1(x)))))) with 3^3 convolutions without bias; 54 channels^2 weights.

    norm is instance norm without weights, leaky has slope 0.01. Unlike the others it does not start as the identity,
    and its output depends on the whole crop through the norm.
    """

    margin = None

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding="same", bias=False)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding="same", bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, X, Y, Z) -> the same shape."""
        inner = leaky_relu(instance_norm(self.conv1(x)))
        return leaky_relu(x + instance_norm(self.conv2(inner)))
