"""Procedural CT-like abdominal volumes: the demo's data and the embedded backbone's pretraining assembly.

Arrays are (X, Y, Z) in RAS orientation: x grows to the patient's right, y to the front, z to the head. Positions are
given in body units: one unit is 190 mm, the body's centre is the origin, the body is about 2 units wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

UNIT_MM = 190.0

LABELS = {
    "liver_right_lobe": 1,
    "liver_left_lobe": 2,
    "spleen": 3,
    "kidney_right": 4,
    "kidney_left": 5,
    "aorta": 6,
    "inferior_vena_cava": 7,
    "gallbladder": 8,
    "pancreas_head": 9,
    "pancreas_tail": 10,
    "vertebrae": 11,
    "stomach": 12,
}

# Mean HU of each tissue and its standard deviation between patients; portal venous phase.
TISSUE_HU = {
    "air": (-1000, 0),
    "fat": (-100, 8),
    "muscle": (55, 8),
    "bowel": (30, 25),
    "liver": (105, 15),
    "spleen": (120, 15),
    "kidney_right": (165, 20),
    "kidney_left": (165, 20),
    "aorta": (160, 25),
    "inferior_vena_cava": (130, 20),
    "stomach": (25, 20),
    "gallbladder": (12, 8),
    "pancreas": (90, 15),
    "vertebrae": (260, 50),
}

HU_WINDOW = (-175.0, 250.0)


@dataclass(frozen=True)
class Phantom:
    """One volume: `image` (X, Y, Z) float32 HU, `labels` (X, Y, Z) uint8 as in LABELS, `spacing` in mm per axis."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class PhantomConfig:
    """What a phantom looks like.

    shape: voxels per axis. spacing: mm per axis; one number stands for all three. centre: middle of the field of view
    in body units; a field of view smaller than the body shows part of it. The same seed and field of view give the
    same anatomy whatever the spacing.
    drift: scanner drift; 0 is the reference scanner, [0, 1] is what the embedded backbone saw in pretraining. It
    raises noise, blur and bias field and lowers the gain, all linearly.
    appearance: 'ct' for tissue values as in TISSUE_HU, 'random' for tissue values drawn for each volume, with
    textured clutter between the organs, so that shape and place are all that tells organs apart.
    """

    shape: tuple[int, int, int] = (96, 96, 96)
    spacing: float | tuple[float, float, float] = 4.0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    drift: float = 0.0
    appearance: str = "ct"

    def __post_init__(self):
        spacing = (self.spacing,) * 3 if np.ndim(self.spacing) == 0 else self.spacing
        object.__setattr__(self, "spacing", tuple(float(mm) for mm in spacing))
        if self.appearance not in ("ct", "random"):
            raise ValueError(f"appearance must be 'ct' or 'random', not {self.appearance!r}")
        if min(self.shape) < 8 or len(self.spacing) != 3 or min(self.spacing) <= 0 or self.drift < 0:
            raise ValueError(
                "shape must be at least 8 per axis, spacing one or three positive numbers and drift not negative: "
                f"{self}"
            )

    @property
    def extent(self) -> np.ndarray:
        """Field of view, mm per axis."""
        return np.multiply(self.shape, self.spacing)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: int | Sequence[int]) -> np.ndarray:
    """Random smooth field of unit variance, `shape` (X, Y, Z) float32: a cubic B-spline on `knots` intervals per axis.

    One number of knots stands for all axes. The tensor product of three small basis matrices costs less than any
    interpolation of the same field.
    """
    knots = np.broadcast_to(knots, len(shape))
    field = rng.standard_normal(knots + 3, dtype=np.float32)
    for n, k in zip(shape, knots):
        # each product consumes the leading axis and appends the new one, so after three the order is restored
        field = np.tensordot(field, _bspline_basis(n, k), axes=([0], [1]))
    return field / field.std()


def _bspline_basis(n: int, knots: int) -> np.ndarray:
    position = np.linspace(0, knots, n, endpoint=False, dtype=np.float32)
    cell = position.astype(int)
    t = position - cell
    weights = (
        np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1).astype(np.float32)
        / 6
    )
    basis = np.zeros((n, knots + 3), np.float32)
    for i in range(4):
        basis[np.arange(n), cell + i] = weights[:, i]
    return basis


class _Anatomy:
    """Paints implicit shapes on warped body coordinates; each shape is evaluated only in its bounding box."""

    MARGIN = 0.16  # the warp and the jitter move a point by less than this

    def __init__(self, rng: np.random.Generator, config: PhantomConfig):
        self.rng = rng
        self.axes = [
            (c + (np.arange(n) - (n - 1) / 2) * (mm / UNIT_MM)).astype(np.float32)
            for n, c, mm in zip(config.shape, config.centre, config.spacing)
        ]
        grid = np.stack(np.meshgrid(*self.axes, indexing="ij"))
        # knots about half a body unit apart, whatever the field of view
        knots = max(1, round(2 * config.extent.max() / UNIT_MM))
        self.grid = grid
        self.points = grid + 0.022 * np.stack([smooth_field(rng, config.shape, knots) for _ in range(3)])
        self.size = rng.normal(1.0, 0.04)
        self.labels = np.zeros(config.shape, np.uint8)

    def box(self, centre, radii) -> tuple[slice, ...]:
        return tuple(
            slice(*np.searchsorted(axis, [c - r - self.MARGIN, c + r + self.MARGIN]))
            for axis, c, r in zip(self.axes, centre, radii)
        )

    def jitter(self, centre, radii) -> tuple[np.ndarray, np.ndarray]:
        centre = np.array(centre) * self.size + self.rng.normal(0, 0.025, 3)
        radii = np.array(radii) * self.size * np.exp(self.rng.normal(0, 0.09, 3))
        return centre, radii

    def ellipsoid(self, centre, radii, tilt=0.0) -> tuple[tuple[slice, ...], np.ndarray]:
        """Ellipsoid turned by `tilt` radians in the x-z plane; the mask covers the returned box."""
        centre, radii = self.jitter(centre, radii)
        reach = max(radii[0], radii[2]) if tilt else None
        box = self.box(centre, (reach or radii[0], radii[1], reach or radii[2]))
        x, y, z = (self.points[i][box] - centre[i] for i in range(3))
        tilt += self.rng.normal(0, 0.08)
        c, s = np.cos(tilt), np.sin(tilt)
        return box, ((c * x + s * z) / radii[0]) ** 2 + (y / radii[1]) ** 2 + ((c * z - s * x) / radii[2]) ** 2 < 1

    def tube(self, path, radius) -> tuple[tuple[slice, ...], np.ndarray]:
        """Union of the capsules along `path`, a list of points."""
        path = np.array(path) * self.size + self.rng.normal(0, 0.018, (len(path), 3)) + self.rng.normal(0, 0.015, 3)
        radius = radius * self.size * np.exp(self.rng.normal(0, 0.09))
        box = self.box((path.max(0) + path.min(0)) / 2, (path.max(0) - path.min(0)) / 2 + radius)
        points = self.points[(slice(None), *box)]
        mask = np.zeros(points.shape[1:], bool)
        for a, b in zip(path[:-1], path[1:]):
            along = b - a
            t = np.clip(np.tensordot(along / (along @ along), points - a[:, None, None, None], 1), 0, 1)
            mask |= sum((points[i] - a[i] - along[i] * t) ** 2 for i in range(3)) < radius**2
        return box, mask

    def paint(self, name: str, shape: tuple[tuple[slice, ...], np.ndarray], keep: bool = False) -> None:
        """Give `shape` the label `name`; with `keep`, voxels already labelled stay as they are."""
        box, mask = shape
        if keep:
            mask = mask & (self.labels[box] == 0)
        self.labels[box][mask] = LABELS[name]


# Centre and radii in body units, tilt; the tubes' paths. Painted in this order, later ones on top.
_ELLIPSOIDS = {
    "spleen": ((-0.62, -0.22, 0.30), (0.14, 0.20, 0.22), 0.2),
    "stomach": ((-0.36, 0.20, 0.24), (0.24, 0.17, 0.18), 0.5),
    "kidney_right": ((0.36, -0.30, -0.10), (0.12, 0.11, 0.22), 0.15),
    "kidney_left": ((-0.36, -0.30, -0.02), (0.12, 0.11, 0.22), -0.15),
    "gallbladder": ((0.34, 0.24, 0.02), (0.08, 0.09, 0.12), 0.3),
}
_PANCREAS = [(0.20, 0.06, -0.10), (0.08, 0.10, -0.02), (-0.12, 0.07, 0.05), (-0.42, -0.08, 0.16)]
_AORTA = [(-0.05, -0.20, 1.6), (-0.05, -0.17, 0.3), (-0.04, -0.19, -0.45), (-0.12, -0.1, -1.6)]
_CAVA = [(0.10, -0.05, 1.6), (0.11, -0.10, 0.4), (0.09, -0.17, -0.45), (0.16, -0.1, -1.6)]
ORGAN_CENTRES = {
    "liver": (0.36, 0.05, 0.28),
    "pancreas": (-0.08, 0.05, 0.02),
    "vertebrae": (0.0, -0.42, 0.0),
    "aorta": (-0.05, -0.18, -0.1),
    **{name: centre for name, (centre, _, _) in _ELLIPSOIDS.items()},
}


def _body(anatomy: _Anatomy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the body, of everything inside the fat under the skin, and of the abdominal cavity."""
    rng, (x, y, _) = anatomy.rng, anatomy.points
    radius = np.sqrt((x / (0.93 * anatomy.size)) ** 2 + (y / (0.68 * anatomy.size)) ** 2)
    fat, wall = rng.uniform(0.04, 0.14), rng.uniform(0.06, 0.10)
    return radius < 1, radius < 1 - fat, radius < 1 - fat - wall


def _draw_organs(anatomy: _Anatomy) -> None:
    rng = anatomy.rng
    box, right = anatomy.ellipsoid((0.42, 0.02, 0.28), (0.38, 0.42, 0.36), 0.25)
    anatomy.paint("liver_right_lobe", (box, right))
    box, left = anatomy.ellipsoid((0.05, 0.28, 0.36), (0.34, 0.20, 0.16), 0.1)
    anatomy.paint("liver_left_lobe", (box, left), keep=True)
    # the lobes part along an oblique plane through the gallbladder's bed, not where the two ellipsoids meet
    liver = (anatomy.labels == LABELS["liver_right_lobe"]) | (anatomy.labels == LABELS["liver_left_lobe"])
    plane = anatomy.points[0] - 0.25 * anatomy.points[1] > 0.14 * anatomy.size + rng.normal(0, 0.02)
    anatomy.labels[liver] = np.where(plane[liver], LABELS["liver_right_lobe"], LABELS["liver_left_lobe"])
    for name, (centre, radii, tilt) in _ELLIPSOIDS.items():
        anatomy.paint(name, anatomy.ellipsoid(centre, radii, tilt), keep=name == "spleen")
    box, pancreas = anatomy.tube(_PANCREAS, 0.055)
    anatomy.paint("pancreas_tail", (box, pancreas), keep=True)
    head = (anatomy.labels == LABELS["pancreas_tail"]) & (anatomy.points[0] > 0.02 + rng.normal(0, 0.015))
    anatomy.labels[head] = LABELS["pancreas_head"]
    anatomy.paint("vertebrae", anatomy.ellipsoid((0, -0.42, 0), (0.13, 0.12, 9.0)))
    anatomy.paint("inferior_vena_cava", anatomy.tube(_CAVA, 0.062))
    anatomy.paint("aorta", anatomy.tube(_AORTA, 0.058))


def _tissue_values(rng: np.random.Generator, appearance: str) -> dict[str, float]:
    if appearance == "random":
        low, high = HU_WINDOW
        return {name: rng.uniform(low, high) for name in TISSUE_HU}
    enhancement = rng.uniform(0.5, 1.15)
    return {
        name: rng.normal(mean, sd) if mean < 60 else 50 + (rng.normal(mean, sd) - 50) * enhancement
        for name, (mean, sd) in TISSUE_HU.items()
    }


def _render(rng: np.random.Generator, config: PhantomConfig, anatomy: _Anatomy) -> np.ndarray:
    values = _tissue_values(rng, config.appearance)
    body, muscle, cavity = _body(anatomy)
    labels = anatomy.labels
    # organs end where the abdominal cavity does; the spine lies in the muscle behind it
    labels[~cavity & (labels != LABELS["vertebrae"])] = 0
    labels[~muscle] = 0
    per_label = np.array(
        [0.0] + [values.get(name, values.get(name.split("_")[0], 0.0)) for name in LABELS], dtype=np.float32
    )
    image = np.full(config.shape, values["air"], np.float32)
    image[body] = values["fat"]
    image[muscle] = values["muscle"]
    image[cavity] = values["fat"]
    clutter = smooth_field(rng, config.shape, max(2, round(config.extent.mean() / 30)))
    image[cavity & (clutter > 0.35)] = values["bowel"]
    if config.appearance == "random":
        blobs = smooth_field(rng, config.shape, int(rng.integers(3, 16)))
        levels = rng.uniform(*HU_WINDOW, size=5).astype(np.float32)
        if rng.random() < 0.6:
            outside = labels == 0
            image[outside] = levels[np.digitize(blobs, [-1.0, -0.3, 0.3, 1.0])][outside]
    else:
        image[cavity & (clutter > 1.5)] = -700  # gas in the bowel
    image = np.where(labels > 0, per_label[labels], image)
    # vertebrae and discs alternate every 35 mm
    discs = (labels == LABELS["vertebrae"]) & (np.mod(anatomy.points[2] * UNIT_MM, 35) < 8)
    image[discs] -= 0.6 * (image[discs] - values["muscle"])
    # as fine as the voxels: a thick slice averages what the other axes show
    grain = np.rint(config.extent.min() / config.spacing).astype(int) // 3
    texture = smooth_field(rng, config.shape, np.maximum(2, grain))
    image += texture * (rng.uniform(4, 10) if config.appearance == "ct" else rng.uniform(4, 40)) * (image > -500)
    return _scan(rng, image, config)


def _scan(rng: np.random.Generator, image: np.ndarray, config: PhantomConfig) -> np.ndarray:
    drift = config.drift
    blur = rng.uniform(0.35, 0.6) + 0.6 * drift * rng.uniform(0.5, 1.0)
    image = gaussian_filter(image, blur, truncate=2.0)  # in voxels, so that a thick slice mixes what lies within
    bias = smooth_field(rng, config.shape, 2)
    image = image * (1 + (0.02 + 0.06 * drift) * bias) * (1 - 0.25 * drift) + 30 * drift * rng.uniform(-1, 1)
    noise = rng.standard_normal(config.shape, dtype=np.float32)
    return (image + noise * (8 + 22 * drift * rng.uniform(0.5, 1.0))).astype(np.float32)


def make_phantom(seed: int | tuple[int, ...], config: PhantomConfig = PhantomConfig()) -> Phantom:
    """The phantom that belongs to `seed`; the same seed and config give the same voxels."""
    rng = np.random.default_rng(seed)
    anatomy = _Anatomy(rng, config)
    _draw_organs(anatomy)
    image = _render(rng, config, anatomy)
    return Phantom(image, anatomy.labels, config.spacing)


def pretraining_config(seed: int | tuple[int, ...], shape: tuple[int, int, int] = (64, 64, 64)) -> PhantomConfig:
    """The ranges of the embedded backbone's pretraining.

    Half of the volumes look like CT with a drift in [0, 1], half have random tissue values; the field of view is 0.4
    to 1.05 of the body and lies around a random organ.
    """
    rng = np.random.default_rng((*np.atleast_1d(seed), 1))
    view = rng.uniform(0.4, 1.05)  # half width in body units
    organ = np.array(list(ORGAN_CENTRES.values())[rng.integers(len(ORGAN_CENTRES))])
    reach = max(0.0, 1.0 - view)
    centre = np.clip(organ + rng.uniform(-0.15, 0.15, 3), -reach, reach)
    return PhantomConfig(
        shape=shape,
        spacing=2 * view * UNIT_MM / max(shape),
        centre=tuple(float(c) for c in centre),
        drift=float(rng.uniform(0, 1)),
        appearance="random" if rng.random() < 0.5 else "ct",
    )
