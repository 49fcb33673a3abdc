"""Drawing of studies: one style, colours told apart by people with any colour vision, a family always in its colour."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Sequence

import numpy as np

from megatron_implicit.telemetry.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
"""Okabe and Ito's."""
FAMILY_COLOURS = {
    "implicit_mamba2": "#0072B2",
    "explicit_mamba2": "#56B4E9",
    "implicit_llama": "#D55E00",
    "explicit_llama": "#E69F00",
}
DASHES = ("-", "--", ":", "-.")


@contextmanager
def drawing(path: Path, panels: int = 1, height: float = 3.8) -> Iterator[list[Axes]]:
    """Axes side by side; the image is written when the block ends.

    Args:
        path: of the PNG.
        panels: axes in a row.
        height: of the image in inches; its width is 8.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, panels, figsize=(8.0, height), squeeze=False, layout="constrained")
        try:
            yield list(axes[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        finally:
            pyplot.close(figure)


def draw_matrix(axes: Axes, values: np.ndarray, title: str, limit: float | None = None) -> None:
    """A heat map of non-negative values with its scale.

    Args:
        axes: to draw in.
        values: [rows, columns].
        title: above it.
        limit: value of the darkest colour; None takes the largest.
    """
    image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=limit, interpolation="nearest")
    axes.grid(False)
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def draw_magnitudes(axes: Axes, values: np.ndarray, title: str, decades: int = 6, scale: bool = True) -> None:
    """A heat map of magnitudes on a logarithmic scale that ends at 1.

    Args:
        axes: to draw in.
        values: [rows, columns] of any sign.
        title: above it.
        decades: powers of ten that are shown; what is smaller is as dark as 10^-decades.
        scale: whether to draw the colour bar.
    """
    from matplotlib.colors import LogNorm

    magnitudes = np.abs(values).clip(min=10.0**-decades)
    image = axes.imshow(magnitudes, cmap="viridis", norm=LogNorm(10.0**-decades, 1.0), interpolation="nearest")
    axes.grid(False)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    if scale:
        axes.figure.colorbar(image, ax=axes, shrink=0.8)


def draw_with_spread(
    axes: Axes, x: Sequence[float], runs: np.ndarray, label: str, colour: str, dash: str = "-"
) -> None:
    """The mean over runs, and the range between the lowest and the highest.

    Args:
        axes: to draw in.
        x: [n].
        runs: [runs, n].
        label: in the legend.
        colour: of line and range.
        dash: of the line.
    """
    axes.plot(x, runs.mean(axis=0), dash, color=colour, label=label)
    if len(runs) > 1:
        axes.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.15, linewidth=0)
