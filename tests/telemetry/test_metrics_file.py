"""metrics.jsonl: last line of a step wins, torn lines cost nothing but themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_implicit.errors import DataError
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.metrics_file import read_metrics


def write(path: Path, *records: dict[str, object]) -> None:
    writer = LineFile(path)
    for record in records:
        writer.write(record)
    writer.close()


def test_records_come_back_in_order_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "phase": "free"})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "phase": "free"}]


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *({"step": step, "attempt": 0} for step in (1, 2, 3)))
    write(path, {"step": 2, "attempt": 1})
    assert [(record["step"], record["attempt"]) for record in read_metrics(path)] == [(1, 0), (2, 1), (3, 0)]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = LineFile(tmp_path / "metrics.jsonl")
    writer.write({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    writer.close()


def test_a_torn_last_line_is_left_out_and_does_not_harm_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1}, {"step": 2})
    path.write_bytes(path.read_bytes()[:-5])
    assert read_metrics(path) == [{"step": 1}]
    write(path, {"step": 2, "attempt": 1})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "attempt": 1}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "na', b'"\xc3', b"[1, 2]", b"7", b"{}"])
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n' + torn)
    assert read_metrics(path) == [{"step": 1}]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1, "loss": math.nan, "residual_max": math.inf, "grad_norm": 1.5})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "residual_max": None, "grad_norm": 1.5}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metrics.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
