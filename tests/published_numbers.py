"""Numbers that the authors' published code gives, in float32 on a CPU (torch 2.13, MONAI 1.6.1).

Weights and inputs are drawn again from their seeds; of large tensors the files in data/ hold every eighth channel, and
the norm of what each output channel has.
"""

import json
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
SPREAD = 0.05  # standard deviation of the weights


def published(name: str, group: str = "") -> dict:
    """Content of data/`name`, a .json or .npz; of a group, by the names in it."""
    if name.endswith(".json"):
        content = json.loads((DATA / name).read_text("utf-8"))
    else:
        with np.load(DATA / name) as file:
            content = {key: file[key] for key in file.files}
    return {key.removeprefix(group): value for key, value in content.items() if key.startswith(group)}


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normally distributed numbers, one tensor after the other from one generator; then the generator."""
    generator = torch.Generator().manual_seed(int(seed))
    return [*(torch.randn(shape, generator=generator) for shape in shapes), generator]


def weight_shapes(channels: int) -> list[tuple[int, ...]]:
    """Of the two convolutions of a spatial adapter, and of a head with one output and its bias."""
    return [(channels, channels, 3, 3, 3)] * 2 + [(1, channels, 1, 1, 1), (1,)]


def check_drawn(x: torch.Tensor, expected: np.ndarray) -> None:
    """PyTorch may draw other numbers one day; the files are then of no use."""
    message = "torch.Generator draws other numbers than those that the published code was run with"
    np.testing.assert_allclose(x.flatten()[: len(expected)], expected, atol=1e-5, err_msg=message)


def check_close(ours: torch.Tensor, thinned: np.ndarray, norms: np.ndarray, name: str) -> None:
    """A tensor (out, in, ...) is the published one: every eighth channel by its numbers, all by their norms."""
    np.testing.assert_allclose(
        ours.detach()[::8, ::8], thinned, rtol=1e-4, atol=1e-4 * np.abs(thinned).max(), err_msg=name
    )
    np.testing.assert_allclose(ours.detach().flatten(1).norm(dim=1), norms, rtol=1e-4, err_msg=name)
