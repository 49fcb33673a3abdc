"""Reading runs while they grow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_implicit.telemetry.history import RunHistory
from megatron_implicit.telemetry.rank_history import RankHistory, slowness
from tests.telemetry.runs import implicit_run, record
from tests.telemetry.simulation import SimulatedRun


def append(folder: Path, *lines: object, name: str = "metrics.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def read(folder: Path) -> RunHistory:
    history = RunHistory(folder)
    history.refresh()
    return history


def test_only_what_was_appended_is_read_and_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    append(tmp_path, record(1), '{"step": 2, "ti')
    history = read(tmp_path)
    assert list(history.steps) == [1]
    append(tmp_path, 'me": 5.0, "loss": 3.0}\n', record(3))
    history.refresh()
    assert list(history.steps) == [1, 2, 3] and history.column("loss")[1] == 3.0


def test_a_file_that_began_anew_is_read_anew(tmp_path: Path) -> None:
    append(tmp_path, record(1), record(2))
    history = read(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    append(tmp_path, record(1, loss=7.0))
    history.refresh()
    assert list(history.steps) == [1] and list(history.column("loss")) == [7.0]


def test_a_run_that_was_killed_and_resumed_is_one_curve_with_its_gap_marked(tmp_path: Path) -> None:
    first = [record(step, attempt=0, time=100.0 + step, validation_loss=9.0) for step in range(1, 7)]
    second = [record(step, attempt=1, time=200.0 + step, loss=1.0, ranks=4) for step in range(4, 9)]
    append(tmp_path, *first, *second)
    history = read(tmp_path)
    assert list(history.steps) == [1, 2, 3, 4, 5, 6, 7, 8]
    curves = history.curves(["loss", "validation_loss"], 100)
    assert curves["loss"][3:] == [1.0] * 5 and curves["validation_loss"][2:5] == [9.0, None, None]
    (attempt,) = history.attempts
    assert (attempt.attempt, attempt.step, attempt.gap_s, attempt.redone) == (1, 4, 98.0, 3)
    assert history.device_seconds == 5 + 4 * 4  # the gap costs no device


def test_long_curves_are_put_together(tmp_path: Path) -> None:
    append(tmp_path, *(record(step, evaluations_max=9.0 if step == 15 else 5.0) for step in range(1, 31)))
    curves = read(tmp_path).curves(["loss", "evaluations_max"], 3)
    assert curves["step"] == [10, 20, 30]
    assert curves["loss"][0] == pytest.approx(8.0 - 0.055)
    assert curves["evaluations_max"] == [5.0, 9.0, 5.0]
    assert read(tmp_path).curves(["loss"], 3, first=29, last=30)["step"] == [29, 30]


def test_phases_leave_out_the_untrained_model(tmp_path: Path) -> None:
    append(tmp_path, *implicit_run(40))
    assert read(tmp_path).phases() == [
        {"name": "bounded", "first": 1, "last": 30}, {"name": "free", "first": 31, "last": 40},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "age", "state"),
    [("finish", 900, "finished"), ("stop", 900, "stopped"), ("error", 900, "failed"), ("checkpoint", 900, "stalled"),
     ("checkpoint", 10, "running")],
)  # fmt: skip
def test_the_state_of_a_run(tmp_path: Path, event: str, age: float, state: str) -> None:
    append(tmp_path, record(1, time=time.time() - age))
    append(tmp_path, {"kind": event, "time": time.time() - age, "step": 1, "message": ""}, name="events.jsonl")
    assert read(tmp_path).summary()["state"] == state


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"train: [1]", b"\xff\xfe", b"train: {steps: x}", b"curriculum: [{start: x}, {}]", b"a: [1"],
)
def test_a_damaged_configuration_marks_the_run_until_it_is_mended(tmp_path: Path, content: bytes) -> None:
    append(tmp_path, record(1), record(2))
    (tmp_path / "config.yaml").write_bytes(content)
    history = read(tmp_path)
    summary = history.summary()
    assert (summary["state"], summary["step"], summary["name"]) == ("unreadable", 2, tmp_path.name)
    assert str(tmp_path / "config.yaml") in summary["reason"] and "checkpoints" in summary["reason"]
    (tmp_path / "config.yaml").write_text("run: {name: alpha}\ntrain: {steps: 9}\n")
    history.refresh()
    assert (history.summary()["reason"], history.summary()["steps"], history.name) == (None, 9, "alpha")


def test_lines_without_what_every_line_has_are_left_out(tmp_path: Path) -> None:
    append(tmp_path, record(1), {"a": 1}, record(2, ranks="x"))
    append(tmp_path, {"a": 1}, {"time": 1.0, "step": 1, "kind": "start", "message": ""}, name="events.jsonl")
    append(tmp_path / "ranks", {"rank": 0, "busy_s": 1.0}, name="rank_00000.jsonl")
    history = read(tmp_path)
    assert (list(history.steps), [event["kind"] for event in history.events]) == ([1], ["start"])
    ranks = RankHistory(tmp_path)
    ranks.refresh()
    assert ranks.heat_map()["ranks"] == []


def test_a_resumed_run_is_no_longer_what_the_job_before_left(tmp_path: Path) -> None:
    append(tmp_path, record(1, time=time.time() - 500))
    for kind, age in (("error", 500), ("resume", 5)):
        append(tmp_path, {"kind": kind, "time": time.time() - age, "step": 1, "message": ""}, name="events.jsonl")
    assert read(tmp_path).state() == "running"


def test_the_time_left_counts_phases_to_come_at_their_most(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "a", steps=100, planned_steps=1000, step_s=0.5)
    run.write()
    # 150 steps of 4 + 3, then 750 of 24 + 3 x 4, at 0.5 s for 4 + 3 passes
    assert read(run.folder).summary()["eta_s"] == pytest.approx(0.5 * (150 + 750 * 36 / 7), rel=0.01)


def test_the_slow_rank_stands_out_among_its_stage() -> None:
    busy = [[1.0, 1.0], [1.0, None], [1.5, 2.0], [9.0, 9.0]]
    assert slowness(busy, [0, 0, 0, 1]) == [[1.0, 0.6667], [1.0, None], [1.5, 1.3333], [1.0, 1.0]]


def test_ranks_are_read_from_their_files(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "a", ranks=6, per_node=3, slow_rank=4, steps=50)
    run.write()
    ranks = RankHistory(run.folder)
    ranks.refresh()
    answer = ranks.heat_map()
    assert [(row["rank"], row["node"]) for row in answer["ranks"]][3:5] == [(3, "a-node01"), (4, "a-node01")]
    means = [sum(row) / len(row) for row in answer["slowness"]]
    assert means.index(max(means)) == 4 and max(means) > 1.4 and sorted(means)[-2] < 1.1
