"""What models answered to the questions of stories: numbers, tables and figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np

from megatron_implicit.evaluation.studies.figures import COLOURS, DASHES, draw_with_spread, drawing
from megatron_implicit.evaluation.studies.study import Table


@dataclass
class Measurements:
    """Of several models, each trained with several seeds."""

    statements: int
    """Of the longest story in training."""
    multiples: Sequence[int]
    """Of that: the lengths of the stories that were read."""
    _runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, run: dict[str, Any], seconds: Optional[float] = None) -> None:
        """One trained model: ``parameters``, and ``tasks`` by multiple and name (questions, right, evaluations,
        unconverged)."""
        self._runs.setdefault(name, []).append({**run, "seconds": seconds})

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return list(self._runs)

    def tasks(self) -> list[str]:
        """Of the stories."""
        first = next(iter(self._runs.values()))[0]
        return list(dict.fromkeys(task for multiple in self.multiples for task in first["tasks"][multiple]))

    def accuracies(self, name: str, multiple: int, task: Optional[str] = None) -> list[float]:
        """Share of right answers by seed: of a task, or the mean over tasks; NaN where no story is that long."""
        return [
            _mean([v["right"] / v["questions"] for t, v in run["tasks"][multiple].items() if task in (None, t)])
            for run in self._runs[name]
        ]

    def evaluations(self, name: str, multiple: int, task: Optional[str] = None) -> float:
        """Mean evaluations a story, over seeds and tasks or of one task."""
        values = [v for run in self._runs[name] for t, v in run["tasks"][multiple].items() if task in (None, t)]
        return _mean([value["evaluations"] for value in values])

    def unconverged(self, name: str, multiple: int) -> float:
        """Share of stories whose solve missed the tolerance."""
        return _mean([v["unconverged"] for run in self._runs[name] for v in run["tasks"][multiple].values()])

    def parameters(self, name: str) -> int:
        """Of the model."""
        return self._runs[name][0]["parameters"]

    def seconds(self, name: str) -> Optional[float]:
        """Of the longest training."""
        values = [run["seconds"] for run in self._runs[name] if run["seconds"] is not None]
        return max(values, default=None)

    def sentence(self, name: str) -> str:
        """What one model did."""
        shares = ", ".join(f"{_mean(self.accuracies(name, m)):.1%} at {m}x" for m in self.multiples)
        counts = ", ".join(f"{self.evaluations(name, m):.1f}" for m in self.multiples)
        return f"Right answers of {name}: {shares} the length of {self.statements} statements; evaluations {counts}."

    def numbers(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"statements": self.statements, "models": self._runs}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def tables(measured: Measurements, far: int) -> list[Table]:
    """Models; accuracy and evaluations by length; accuracy by task at the training length and far beyond it."""
    return [_models(measured), _by_length(measured), _by_task(measured, far)]


def _models(measured: Measurements) -> Table:
    rows = [
        [name, f"{measured.parameters(name):,}", "" if seconds is None else f"{seconds / 60:.1f}"]
        for name, seconds in ((name, measured.seconds(name)) for name in measured.names)
    ]
    return Table("Models", ["model", "parameters", "minutes of training, at most"], rows)


def _by_length(measured: Measurements) -> Table:
    columns = ["statements", *(f"right answers, {name}" for name in measured.names)]
    columns += [f"evaluations (unconverged), {name}" for name in measured.names]
    rows = [
        [f"{multiple * measured.statements} ({multiple}x)"]
        + [_spread(measured.accuracies(name, multiple)) for name in measured.names]
        + [f"{measured.evaluations(name, multiple):.1f} ({measured.unconverged(name, multiple):.0%})"
           for name in measured.names]
        for multiple in measured.multiples
    ]  # fmt: skip
    return Table("By the length of the story, mean over tasks (lowest to highest seed)", columns, rows)


def _by_task(measured: Measurements, far: int) -> Table:
    columns = ["task", *(f"{name}, {multiple}x" for name in measured.names for multiple in (1, far))]
    rows = [
        [task, *(_spread(measured.accuracies(name, m, task)) for name in measured.names for m in (1, far))]
        for task in measured.tasks()
    ]
    return Table("Right answers by task", columns, rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{_mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def draw_lengths(measured: Measurements, path: Path) -> None:
    """Accuracy and evaluations against the length of the story."""
    lengths = [multiple * measured.statements for multiple in measured.multiples]
    with drawing(path, panels=2) as (accuracy, evaluations):
        for name, colour, dash in zip(measured.names, COLOURS, DASHES):
            by_length = np.array([measured.accuracies(name, multiple) for multiple in measured.multiples]).T
            draw_with_spread(accuracy, lengths, by_length, name, colour, dash)
            counts = [measured.evaluations(name, multiple) for multiple in measured.multiples]
            evaluations.plot(lengths, counts, dash, color=colour, label=name, marker="o", markersize=4)
        accuracy.set(title="Right answers", ylim=(0, 1.02))
        evaluations.set(title="Evaluations of F a story", ylim=(0, None))
        for axes in (accuracy, evaluations):
            axes.set(xscale="log", xlabel="statements")
            axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axes.minorticks_off()
            axes.axvline(measured.statements, color=COLOURS[-1], linewidth=0.8, linestyle=":")
        accuracy.legend(loc="lower left")


def draw_tasks(measured: Measurements, path: Path) -> None:
    """Accuracy of each task against the length of the story, a panel a model."""
    lengths = [multiple * measured.statements for multiple in measured.multiples]
    with drawing(path, panels=len(measured.names)) as panels:
        for axes, name in zip(panels, measured.names):
            for number, task in enumerate(measured.tasks()):
                shares = [_mean(measured.accuracies(name, multiple, task)) for multiple in measured.multiples]
                dash = DASHES[number % len(DASHES)]
                axes.plot(lengths, shares, dash, color=COLOURS[number % len(COLOURS)], label=task)
            axes.set(title=name, ylim=(0, 1.02), xscale="log", xlabel="statements")
            axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axes.minorticks_off()
        panels[-1].legend(loc="lower left", fontsize=8, ncols=2)
