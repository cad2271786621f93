"""Few-shot adaptation of frozen volumetric foundation models, as an extension of nnU-Net v2."""

__version__ = "0.2.0"
