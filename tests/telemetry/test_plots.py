"""PNGs of a run's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from megatron_implicit.errors import DataError
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.plots import _read_run, write_plots
from tests.telemetry.runs import implicit_run, record

CONFIG = """
solver: {tolerance: 0.05}
curriculum: [{name: bounded, tolerance: 0.0}, {name: free, tolerance: null}]
run: {name: a run}
"""


def make_run(folder: Path, records: list[dict[str, Any]], config: str | None = None) -> Path:
    writer = LineFile(folder / "metrics.jsonl")
    for values in records:
        writer.write(values)
    writer.close()
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def names_and_widths(paths: list[Path]) -> dict[str, int]:
    return {path.name: matplotlib.image.imread(path).shape[1] for path in paths}


def test_an_implicit_run_has_three_plots_wide_enough_for_a_page(tmp_path: Path) -> None:
    paths = write_plots(make_run(tmp_path, implicit_run(), CONFIG))
    assert names_and_widths(paths) == {"loss.png": 1200, "evaluations.png": 1200, "residual.png": 1200}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {path.name for path in paths}


def test_an_explicit_run_has_only_its_loss(tmp_path: Path) -> None:
    assert list(names_and_widths(write_plots(make_run(tmp_path, [record(1), record(2)])))) == ["loss.png"]


def test_phases_carry_their_tolerance(tmp_path: Path) -> None:
    curves = _read_run(make_run(tmp_path, implicit_run(40), CONFIG))
    assert curves.name == "a run" and curves.tokens_per_step == 1000
    assert [(phase.name, phase.first, phase.last, phase.tolerance) for phase in curves.phases] == [
        ("bounded", 1, 30, None), ("free", 31, 40, 0.05),
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_first_steps_of_a_run_can_be_drawn(tmp_path: Path, steps: int) -> None:
    assert len(write_plots(make_run(tmp_path, implicit_run(steps)))) == 3


def test_losses_that_were_not_finite_leave_gaps(tmp_path: Path) -> None:
    assert write_plots(make_run(tmp_path, [record(1), record(2, loss=float("nan")), record(3)]))


def test_a_run_without_steps_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metrics.jsonl: no such file"):
        write_plots(tmp_path)
    with pytest.raises(DataError, match="holds no step yet"):
        write_plots(make_run(tmp_path, [{"step": 0, "validation_loss": 8.0}]))
