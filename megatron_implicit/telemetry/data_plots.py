"""Draws how long the documents of datasets are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_implicit.telemetry.plots import BLUE, GREY, ORANGE, STYLE


@dataclass(frozen=True)
class LengthHistogram:
    """Documents of one dataset by their length."""

    name: str
    bins: np.ndarray
    """Edges, in tokens."""
    documents: np.ndarray
    """Documents in each bin."""
    tokens: np.ndarray
    """Tokens that these documents hold."""


def draw_lengths(histograms: list[LengthHistogram], sequence_length: int, path: Path) -> None:
    """Writes a PNG: a row a dataset, the share of documents and of tokens at each length, and where a sample ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(histograms), 1, figsize=(8.0, 1.2 + 2.4 * len(histograms)), sharex=True, squeeze=False
        )
        for axis, histogram in zip(axes[:, 0], histograms):
            for counts, colour, label in (
                (histogram.documents, BLUE, "of documents"), (histogram.tokens, ORANGE, "of tokens")
            ):  # fmt: skip
                axis.stairs(100 * counts / counts.sum(), histogram.bins, color=colour, label=label, linewidth=1.6)
            axis.axvline(sequence_length, color=GREY, linewidth=1.0, linestyle="--")
            axis.annotate(
                f" sample of {sequence_length:,}", (sequence_length, 1), xycoords=("data", "axes fraction"),
                va="top", color=GREY, fontsize=9,
            )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set_ylabel("share, %")
            axis.set_title(f"{histogram.name}: {histogram.documents.sum():,} documents")
        axes[0, 0].legend(loc="upper left")
        axes[-1, 0].set_xlabel("tokens of a document")
        figure.tight_layout()
        partial = path.with_name(f".{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, format="png")
        plt.close(figure)
    os.replace(partial, path)
