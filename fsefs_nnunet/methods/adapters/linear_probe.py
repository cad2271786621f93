"""The linear probe: no adapter, the head alone is trained."""

from torch import nn


class LinearProbe(nn.Identity):
    """Passes the features (B, C, X, Y, Z) on to the head."""

    margin = 0
