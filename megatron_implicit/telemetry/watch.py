"""One run, live in a terminal: over ssh, without a browser."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Optional

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_implicit.telemetry.history import RunHistory
from megatron_implicit.telemetry.rank_history import RankHistory
from megatron_implicit.telemetry.timing import PARTS

BARS = "▁▂▃▄▅▆▇█"
CURVES = (
    ("loss", "loss"), ("validation_loss", "held out"), ("tokens_per_s", "tokens/s"), ("mfu", "MFU"),
    ("model_flops_per_s", "FLOP/s a device"), ("evaluations_mean", "evaluations"),
    ("evaluations_max", "evaluations, most"), ("residual_mean", "residual"), ("unconverged_fraction", "unconverged"),
    ("grad_norm", "gradient norm"), ("learning_rate", "learning rate"),
)  # fmt: skip
"""Rows of the table of curves: key and words."""
HEADS = {"data_wait": "data\nwait", "optimizer": "opti-\nmizer", "communication": "communi-\ncation"}
"""Heads of the table of ranks that are broken, so that it fits 80 columns."""
STATE_STYLES = {"running": "green", "finished": "blue", "stalled": "bold red", "failed": "bold red"}


def watch(run_dir: Path, every_s: float, *, once: bool = False, console: Optional[Console] = None) -> None:
    """Shows a run until it has ended, or Ctrl-C; ``once`` prints its present state.

    Raises:
        ConfigError: the run's config.yaml is damaged.
    """
    console = console or Console()
    view = TerminalView(run_dir)
    if once:
        console.print(view.render(console.width))
        return
    try:
        with Live(view.render(console.width), console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while view.state in ("running", "stalled", "waiting"):
                time.sleep(every_s)
                live.update(view.render(console.width), refresh=True)
    except KeyboardInterrupt:
        return
    console.print(view.render(console.width))


class TerminalView:
    """What is shown of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._history, self._ranks = RunHistory(run_dir), RankHistory(run_dir)
        self.state = "waiting"

    def render(self, width: int) -> Group:
        """The present state, for a terminal of so many columns."""
        self._history.refresh()
        if self._history.damage:
            raise self._history.damage
        self._ranks.refresh()
        summary = self._history.summary()
        self.state = summary["state"]
        parts = [self._head(summary), self._curves(max(10, width - 64)), self._slowest(), self._events()]
        return Group(*(part for part in parts if part is not None))

    def _head(self, summary: dict[str, Any]) -> Panel:
        step, steps = summary["step"], summary["steps"]
        line = Text.assemble(
            (summary["state"], STATE_STYLES.get(summary["state"], "")), f"  {summary['phase'] or '–'}  step {step:,}",
            f" of {steps:,}" if steps else "", f"  at most {_span(summary['eta_s'])} left" if summary["eta_s"] else "",
            f"  attempt {summary['attempt']}", f"  {summary['device_hours']:.3g} device hours",
        )  # fmt: skip
        return Panel(Group(line, ProgressBar(total=max(steps, 1), completed=step)), title=summary["name"],
                     title_align="left")  # fmt: skip

    def _curves(self, columns: int) -> Table:
        table = Table(box=None, pad_edge=False, expand=False)
        for name in ("", "now", "over the run", "lowest", "highest"):
            table.add_column(name, justify="left" if name in ("", "over the run") else "right", no_wrap=True)
        curves = self._history.curves([key for key, _ in CURVES], columns)
        for key, words in CURVES:
            known = [value for value in self._history.column(key) if math.isfinite(value)]  # curves are averaged
            if known:
                table.add_row(words, _short(known[-1]), sparkline(curves[key]), _short(min(known)), _short(max(known)))
        return table

    def _slowest(self) -> Optional[Table]:
        heat = self._ranks.heat_map()
        if not heat["ranks"]:
            return None
        table = Table(box=None, pad_edge=False, collapse_padding=True, title_justify="left",
                      title=f"slowest of {len(heat['ranks'])} ranks")  # fmt: skip
        for name in ("rank", "node", "×\nmedian", *(HEADS.get(part, part) for part in PARTS)):
            table.add_column(name, justify="left" if name == "node" else "right", no_wrap=name != "node",
                             overflow="fold", vertical="bottom")  # fmt: skip
        recent = [_mean([value for value in row[-5:] if value is not None]) for row in heat["slowness"]]
        for index in sorted(range(len(recent)), key=lambda index: -(recent[index] or 0))[:4]:
            line, slow = heat["latest"][index], recent[index] or 0
            parts = [_span(line.get(f"{part}_s")) for part in PARTS]
            style = "bold red" if slow > 1.25 else ""
            table.add_row(str(line["rank"]), str(line["node"]), f"{slow:.2f}", *parts, style=style)
        return table

    def _events(self) -> Optional[Text]:
        lines = [
            f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  step {event['step']}  {event['kind']}: "
            f"{event['message']}"
            for event in self._history.events[-5:]
        ]
        return Text("\n" + "\n".join(lines), style="dim") if lines else None


def sparkline(values: list[Optional[float]]) -> str:
    """A row of bars, the lowest for the smallest value; a space where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, width = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if value is None else BARS[round((len(BARS) - 1) * (value - low) / width)] for value in values)


def _mean(values: list[float]) -> Optional[float]:
    return sum(values) / len(values) if values else None


def _short(value: float) -> str:
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if letter == 'k' else factor):.3g}{letter}"
    return f"{value:.4g}"


def _span(seconds: Optional[float]) -> str:
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
