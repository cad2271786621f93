"""The linear probe: no adapter, only the head is trained."""

from torch import nn


class LinearProbe(nn.Identity):
    """Passes the features (B, C, X, Y, Z) on to the head."""

    margin = 0
