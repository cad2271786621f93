"""Charts, black as the overlays and small enough for a phone; each returns the bytes of a PNG."""

from __future__ import annotations

from io import BytesIO

import numpy as np

from fsefs_nnunet.evaluation.training_logs import LearningCurve
from fsefs_nnunet.size_prior import SizePrior


def plot_learning_curves(curves: dict[str, LearningCurve], value: str, title: str) -> bytes:
    """One line per method over seconds of training; `value` is a field of LearningCurve."""

    def draw(axes):
        for method, curve in curves.items():
            axes.plot(curve.seconds, getattr(curve, value), marker=".", markersize=3, linewidth=1.2, label=method)
        axes.set_xlabel("seconds of training")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)

    return _png(draw, height=3.6)


def plot_sizes(
    priors: dict[str, SizePrior],
    predicted: dict[str, dict[str, float]],
    labelled: dict[str, dict[str, float]],
    gamma: float,
) -> bytes:
    """Sizes of the queries as multiples of the prior size S, one row per class.

    Args:
        predicted: ml by query and class: filled circles.
        labelled: ml by query and class: rings, just below.
        gamma: the prior tolerates sizes in [1 - gamma, 1 + gamma] S, shaded.
    """

    def draw(axes):
        axes.axvspan(1 - gamma, 1 + gamma, color="white", alpha=0.15, linewidth=0, label=f"tolerated, ±{gamma:.0%}")
        axes.axvline(1, color="white", linewidth=1, linestyle="dashed", label="prior S")
        for row, (name, prior) in enumerate(priors.items()):
            for offset, sizes, style in ((-0.12, predicted, "predicted"), (0.12, labelled, "label")):
                ratios = [query[name] / prior.size for query in sizes.values() if name in query]
                axes.plot(ratios, np.full(len(ratios), row + offset), label=style if not row else None, **_MARKS[style])
        axes.set_yticks(range(len(priors)), [f"{name}\nS {prior.size:.0f} ml" for name, prior in priors.items()])
        axes.set_ylim(len(priors) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("size of a query / prior size S")
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1), columnspacing=1)

    return _png(draw, height=1.2 + 0.55 * len(priors))


_MARKS = {
    "predicted": {"marker": "o", "markersize": 5, "linestyle": "none", "color": "tab:orange"},
    "label": {"marker": "o", "markersize": 5, "linestyle": "none", "color": "tab:cyan", "fillstyle": "none"},
}


def _png(draw, height: float) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png = BytesIO()
    with matplotlib.style.context("dark_background"):
        figure = Figure(figsize=(5.2, height), layout="constrained")  # not pyplot's, as in overlays.py
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        figure.savefig(png, dpi=160)
    return png.getvalue()
