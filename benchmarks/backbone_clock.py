"""Times the frozen backbone's own layers in one process: what engine.py runs with the Python of each version.

    python backbone_clock.py train OUT.json ARGUMENTS_OF_nnUNetv2_train
    python backbone_clock.py features OUT.json X Y Z

OUT.json gets the CPU seconds of all layers of the backbone's network, and of its whole forward pass: in version 0.1.0
that upsamples the maps to the window, later ones do so elsewhere. Neither includes blending.
`features` also fills a bank with one support case of X x Y x Z voxels.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

WINDOW, CROP = (64, 64, 64), (32, 32, 32)


class Clock:
    """Adds up the CPU seconds that modules spend in their forward passes."""

    def __init__(self):
        self.seconds, self._start = 0.0, 0.0

    def watch(self, module) -> None:
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_) -> None:
        self._start = process_time()

    def _end(self, *_) -> None:
        self.seconds += process_time() - self._start


def watch_backbones() -> dict[str, Clock]:
    """Clocks of all backbones that are built from now on: of their layers, and of their whole forward passes."""
    from fsefs_nnunet.backbones.frozen import FrozenBackbone

    layers, forward, original = Clock(), Clock(), FrozenBackbone.__init__

    def init(backbone, *args, **kwargs) -> None:
        original(backbone, *args, **kwargs)
        unet = backbone.module.unet
        for layer in (unet.encoder, *unet.decoder.transpconvs, *unet.decoder.stages):
            layers.watch(layer)
        forward.watch(backbone)

    FrozenBackbone.__init__ = init
    return {"backbone_cpu_seconds": layers, "backbone_forward_cpu_seconds": forward}


def fill_one(image, labels, root: Path) -> None:
    """A bank of one support case, by the interface of the version that is installed."""
    import torch

    from fsefs_nnunet.backbones.frozen import FrozenBackbone

    device, backbone = torch.device("cpu"), FrozenBackbone("phantom", "skips")
    try:
        from fsefs_nnunet.bank.features import FeatureBank  # version 0.1.0
        from fsefs_nnunet.bank.layout import support_layout
    except ImportError:
        from fsefs_nnunet.features.bank import FeatureBank, Request
        from fsefs_nnunet.features.layout import support_layout

        layout = support_layout("case", labels, CROP, WINDOW)
        request = Request("case", [], lambda: "noise", lambda: image, layout, statistics=True)
        FeatureBank(root, backbone, "skips", WINDOW, device).fill([request])
        return
    FeatureBank(root, backbone, "skips", WINDOW, device).fill(
        ["case"], lambda case: image, lambda case, shape: support_layout(case, labels, CROP, WINDOW)
    )


def features(shape: tuple[int, ...]) -> float:
    """CPU seconds of `fill_one` on smooth noise; the label is an ellipsoid of a third of the volume's width."""
    import numpy as np
    import torch
    from scipy.ndimage import gaussian_filter

    torch.set_num_threads(1)
    image = gaussian_filter(np.random.default_rng(0).standard_normal(shape, np.float32), 1)[None]
    from_centre = sum(
        axis**2 for axis in np.meshgrid(*(np.linspace(-3, 3, n) for n in shape), indexing="ij", sparse=True)
    )
    with TemporaryDirectory(dir=os.getcwd()) as root:
        start = process_time()
        fill_one(image, (from_centre < 1).astype(np.int16), Path(root))
        return process_time() - start


def main() -> None:
    what, out, *arguments = sys.argv[1:]
    clocks, figures = watch_backbones(), {}
    if what == "features":
        figures["cpu_seconds"] = features(tuple(map(int, arguments)))
    else:
        from nnunetv2.run.run_training import run_training_entry

        sys.argv[1:] = arguments
        run_training_entry()
    Path(out).write_text(json.dumps(figures | {name: clock.seconds for name, clock in clocks.items()}), "utf-8")


if __name__ == "__main__":
    main()
