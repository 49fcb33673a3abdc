"""Draws a run's curves from its metrics.jsonl: loss, evaluations and residual over steps, phases shaded.

Colours are Okabe and Ito's, told apart by people with any colour vision; what is compared differs in line style too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

import numpy as np

from megatron_implicit.config import read_config_file
from megatron_implicit.errors import DataError
from megatron_implicit.telemetry.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
PHASE_SHADES = ("#FFFFFF", "#F0F3F6")

STYLE = {
    "figure.figsize": (8.0, 3.8),
    "figure.dpi": 150,
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E1E5E9",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class PhaseSpan:
    """Consecutive steps of one phase."""

    name: str
    first: int
    last: int
    tolerance: Optional[float]
    """Relative residual at which its solves stop; None where unknown or 0 (they never do)."""


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of a run."""

    name: str
    records: list[dict[str, Any]]
    phases: list[PhaseSpan]
    tokens_per_step: Optional[int]

    def series(self, field: str, phase: Optional[PhaseSpan] = None) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the records that have ``field``, of one phase or of the whole run."""
        first, last = (phase.first, phase.last) if phase else (0, self.phases[-1].last)
        records = [record for record in self.records if first <= record["step"] <= last]
        pairs = [(record["step"], record[field]) for record in records if record.get(field) is not None]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)


def write_plots(run_dir: str | Path) -> list[Path]:
    """Writes PNGs into the run's plots/ folder and returns their paths.

    loss.png always; evaluations.png and residual.png for implicit models.

    Raises:
        DataError: there is no metrics.jsonl, or no step in it.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    curves = _read_run(Path(run_dir))
    drawings: dict[str, Callable[[Axes, RunCurves], None]] = {"loss": _draw_loss}
    if any(record.get("evaluations_mean") is not None for record in curves.records):
        drawings["evaluations"] = _draw_evaluations
    if any(record.get("residual_mean") is not None for record in curves.records):
        drawings["residual"] = _draw_residual
    folder = Path(run_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / f"{name}.png", draw, curves) for name, draw in drawings.items()]


def _read_run(run_dir: Path) -> RunCurves:
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if record["step"] > 0]
    if not steps:
        raise DataError(f"{run_dir / 'metrics.jsonl'}: holds no step yet; plots need at least one")
    path = run_dir / "config.yaml"
    config = read_config_file(path) if path.is_file() else {}
    tolerances = _tolerances(config)
    phases = []
    for name, group in groupby(steps, lambda record: record.get("phase") or "main"):
        members = list(group)
        phases.append(PhaseSpan(name, members[0]["step"], members[-1]["step"], tolerances.get(name)))
    name = (config.get("run") or {}).get("name") or run_dir.resolve().name
    tokens = round(steps[-1]["tokens"] / steps[-1]["step"]) if steps[-1].get("tokens") else None
    return RunCurves(name, records, phases, tokens)


def _tolerances(config: dict[str, Any]) -> dict[str, Optional[float]]:
    """Tolerance by name of the phase, from a resolved configuration."""
    default = (config.get("solver") or {}).get("tolerance")
    values = {phase["name"]: phase.get("tolerance") for phase in config.get("curriculum") or []}
    return {name: (default if value is None else value) or None for name, value in values.items()}


def _write(path: Path, draw: Callable[["Axes", RunCurves], None], curves: RunCurves) -> Path:
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        draw(axes, curves)
        _shade_phases(axes, curves)
        tokens = f" ({curves.tokens_per_step:,} tokens each)" if curves.tokens_per_step else ""
        axes.set_xlabel(f"optimizer step{tokens}")
        axes.set_xlim(0, 1.01 * curves.phases[-1].last)
        unfinished = path.with_suffix(".new.png")
        figure.savefig(unfinished)
        plt.close(figure)
    unfinished.replace(path)
    return path


def _shade_phases(axes: "Axes", curves: RunCurves) -> None:
    """A background for every phase and its name at the top; nothing for a run of a single phase."""
    if len(curves.phases) < 2:
        return
    for index, phase in enumerate(curves.phases):
        left = phase.first - 1
        right = phase.last if index + 1 < len(curves.phases) else 1.01 * phase.last
        axes.axvspan(left, right, color=PHASE_SHADES[index % 2], zorder=-2, linewidth=0)
        if index:
            axes.axvline(left, color=GREY, linewidth=0.8, zorder=-1)
        axes.annotate(
            f"{phase.name} phase", (left, 1), xycoords=("data", "axes fraction"), xytext=(5, -4),
            textcoords="offset points", va="top", color=GREY, fontsize=9.5,
        )  # fmt: skip


def _draw_loss(axes: "Axes", curves: RunCurves) -> None:
    window = _draw_smoothed(axes, curves, "loss", color=BLUE, label="training")
    held_out = curves.series("validation_loss")
    if len(held_out[0]):
        label = f"held out, {held_out[1][-1]:.2f} at last"
        axes.plot(*held_out, color=ORANGE, marker="o", markersize=4.5, linestyle="--", label=label, clip_on=False)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{curves.name}: loss{window}")
    _finish_vertical_axis(axes, curves)


def _draw_evaluations(axes: "Axes", curves: RunCurves) -> None:
    _draw_raw(axes, curves, "evaluations_max", color=BLUE, label="evaluations, largest")
    window = _draw_smoothed(axes, curves, "evaluations_mean", color=BLUE, label="evaluations, mean")
    _draw_smoothed(axes, curves, "iterations_mean", color=ORANGE, linestyle="--", label="iterations, mean")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("passes of F in a solve")
    axes.set_title(f"{curves.name}: evaluations of the fixed-point solve{window}")
    _finish_vertical_axis(axes, curves)


def _draw_residual(axes: "Axes", curves: RunCurves) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    _draw_raw(axes, curves, "residual_max", color=BLUE, label="largest")
    window = _draw_smoothed(axes, curves, "residual_mean", color=BLUE, label="mean")
    for phase in curves.phases:
        if phase.tolerance:
            axes.hlines(phase.tolerance, phase.first - 1, phase.last, color=ORANGE, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"tolerance {phase.tolerance:g}", (phase.last, phase.tolerance), xytext=(-2, 4),
                textcoords="offset points", ha="right", color=ORANGE, fontsize=9.5,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("relative residual  ‖F(z) − z‖ / ‖F(z)‖")
    axes.set_title(f"{curves.name}: residual of the accepted iterates{window}")
    _finish_vertical_axis(axes, curves)


def _draw_raw(axes: "Axes", curves: RunCurves, field: str, *, color: str, label: Optional[str] = None) -> None:
    """A thin line, broken where a phase ends."""
    for phase in curves.phases:
        axes.plot(*curves.series(field, phase), color=color, alpha=0.4, linewidth=1.0, label=label)
        label = None


def _draw_smoothed(axes: "Axes", curves: RunCurves, field: str, *, color: str, label: str, linestyle: str = "-") -> str:
    """A thick line of running means within each phase; returns words for the title on how many steps they cover."""
    window = max(1, len(curves.records) // 40)
    if window > 1 and linestyle == "-":
        _draw_raw(axes, curves, field, color=color)
    for phase in curves.phases:
        steps, values = curves.series(field, phase)
        axes.plot(steps, _running_mean(values, window), color=color, linestyle=linestyle, label=label)
        label = ""
    return f" (thick: mean of {window} steps)" if window > 1 else ""


def _finish_vertical_axis(axes: "Axes", curves: RunCurves) -> None:
    _leave_room_for_labels(axes, curves)
    axes.legend(loc="best")


def _leave_room_for_labels(axes: "Axes", curves: RunCurves) -> None:
    """Moves the upper limit so that no curve runs through the phases' names."""
    if len(curves.phases) < 2:
        return
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** 0.12)
    else:
        axes.set_ylim(low, high + 0.12 * (high - low))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` values around each, of fewer at the ends."""
    kernel = np.ones(window)
    if len(values) < window:
        return np.full_like(values, values.mean()) if len(values) else values
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")
