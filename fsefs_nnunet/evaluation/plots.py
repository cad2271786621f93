"""Charts, on black like the overlays and small enough for a phone; each returns the bytes of a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_learning_curves(curves: dict[str, list[dict]], value: str, title: str) -> bytes:
    """One line per method over seconds of training; `curves` are the epochs of run files, `value` a key of theirs."""

    def draw(axes):
        for method, epochs in curves.items():
            seconds = list(accumulate(epoch["seconds"] for epoch in epochs))
            axes.plot(
                seconds, [epoch[value] for epoch in epochs], marker=".", markersize=3, linewidth=1.2, label=method
            )
        axes.set_xlabel("seconds of training")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)

    return _png(draw, height=3.6)


def plot_sizes(
    expected: dict[str, dict],
    predicted: pd.DataFrame,
    labelled: pd.DataFrame,
) -> bytes:
    """Sizes of the queries as multiples of the prior size S, one row per class.

    Args:
        expected: "size" S in ml and relative "tolerance" of each class, as run files have them; the sizes that the
            prior tolerates are shaded.
        predicted: ml, a row per query and a column per class: filled circles.
        labelled: as `predicted`: rings, just below.
    """

    def draw(axes):
        axes.axvline(1, color="white", linewidth=1, linestyle="dashed", label="prior S")
        for row, (name, prior) in enumerate(expected.items()):
            tolerated = prior["tolerance"]
            band = {"color": "white", "alpha": 0.15, "linewidth": 0, "label": None if row else "tolerated"}
            axes.fill_betweenx([row - 0.5, row + 0.5], 1 - tolerated, 1 + tolerated, **band)
            for offset, sizes, style in ((-0.12, predicted, "predicted"), (0.12, labelled, "label")):
                ratios = sizes[name] / prior["size"]
                axes.plot(ratios, np.full(len(ratios), row + offset), label=style if not row else None, **_MARKS[style])
        axes.set_yticks(range(len(expected)), [f"{name}\nS {prior['size']:.0f} ml" for name, prior in expected.items()])
        axes.set_ylim(len(expected) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("size of a query / prior size S")
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1), columnspacing=1)

    return _png(draw, height=1.2 + 0.55 * len(expected))


_MARKS = {
    "predicted": {"marker": "o", "markersize": 5, "linestyle": "none", "color": "tab:orange"},
    "label": {"marker": "o", "markersize": 5, "linestyle": "none", "color": "tab:cyan", "fillstyle": "none"},
}


_COLOURS = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")


@dataclass(frozen=True)
class Point:
    """Dice of a method with a number of shots, one per fold; `labels` is what the shots cost, 0 for zero-shot."""

    method: str
    shots: int | str
    labels: int
    parameters: int
    dice: list[float]


def plot_shots_and_parameters(points: list[Point]) -> bytes:
    """Dice against shots, a line per method with a bar from the worst to the best fold; Dice against parameters.

    What needs no labels is a dashed line on the left.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    colours = {method: f"tab:{_COLOURS[i % len(_COLOURS)]}" for i, method in enumerate(methods)}
    ticks = {point.labels: str(point.shots) for point in points if point.labels}

    def draw(axes):
        for method, colour in colours.items():
            own = sorted((p for p in points if p.method == method), key=lambda p: p.labels)
            means = [float(np.mean(p.dice)) for p in own]
            if own[0].labels:
                bars = [[m - min(p.dice) for m, p in zip(means, own)], [max(p.dice) - m for m, p in zip(means, own)]]
                line = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2, "elinewidth": 0.7}
                axes[0].errorbar([p.labels for p in own], means, bars, color=colour, label=method, **line)
            else:
                axes[0].axhline(means[0], color=colour, linestyle="dashed", linewidth=1.2, label=method)
            for p, m in zip(own, means):
                axes[1].plot(p.parameters, m, marker="o", markersize=5, color=colour)
                name = f"K = {p.shots}" if p.labels else "no label"
                axes[1].annotate(name, (p.parameters, m), (5, 2), textcoords="offset points", fontsize=6)
        axes[0].set_xscale("log")
        axes[0].set_xticks(list(ticks), list(ticks.values()))
        axes[0].minorticks_off()
        axes[0].set_xlabel("shots")
        axes[0].set_ylabel("mean Dice")
        axes[0].figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper center")
        axes[1].set_xscale("symlog", linthresh=10)
        axes[1].set_xlim(left=-2)
        axes[1].set_xlabel("trained parameters")
        axes[1].set_ylabel("mean Dice")

    return _png(draw, height=4.5, columns=2)


def _png(draw, height: float, columns: int = 1) -> bytes:
    png = BytesIO()
    with matplotlib.style.context("dark_background"):
        figure = Figure(figsize=(5.2 * columns, height), layout="constrained")  # not pyplot's, as in overlays.py
        FigureCanvasAgg(figure)
        draw(figure.subplots(1, columns))
        figure.savefig(png, dpi=160)
    return png.getvalue()
