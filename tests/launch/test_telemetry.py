"""Runs that report everywhere: interrupted ones are one curve, and no sink that fails harms a run."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_implicit.telemetry.history import RunHistory
from tests.launch.conftest import Runs

EVERYWHERE = (
    "--telemetry.tensorboard", "true", "--telemetry.wandb", "offline", "--telemetry.prometheus", "true",
    "--telemetry.rank_file_every_s", "0.1", "--checkpoint.asynchronous", "false",
)  # fmt: skip


@pytest.fixture(scope="module")
def resumed(runs: Runs) -> Path:
    """A run that reports everywhere, was killed before step 6 and went on from step 3."""
    targets = ("--telemetry.targets_dir", str(runs.folder / "targets"))
    assert runs.start("told", *EVERYWHERE, *targets, "--debug.inject", "crash@6").code != 0
    job = runs.start("told", *EVERYWHERE, *targets)
    assert job.code == 0, job.output
    assert not [line for line in job.output.splitlines() if "telemetry" in line], job.output
    return runs.folder / "told"


def test_metrics_of_a_killed_and_resumed_run_are_one_curve(resumed: Path) -> None:
    history = RunHistory(resumed)
    history.refresh()
    assert list(history.steps) == list(range(9))
    assert list(history.column("attempt")) == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    (attempt,) = history.attempts
    assert attempt.step == 4 and attempt.redone in (1, 2) and attempt.gap_s > 1  # the last line may be lost
    assert [event["kind"] for event in history.events if event["kind"] in ("start", "resume")] == ["start", "resume"]
    assert history.state() == "finished" and history.last["time_solve_s"] > 0


def test_tensorboard_shows_every_step_once_and_says_where_the_run_went_on(resumed: Path) -> None:
    board = EventAccumulator(str(resumed / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 9))
    assert [event.value for event in board.Scalars("attempt")] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    times = [event.wall_time for event in board.Scalars("loss")]
    assert max(later - earlier for earlier, later in zip(times, times[1:])) == times[3] - times[2]  # the gap
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("events/text_summary")]
    assert any("**resume** (attempt 1" in text for text in texts)


def test_wandb_continues_the_same_run(resumed: Path) -> None:
    first, second = (wandb_file(path) for path in sorted((resumed / "wandb").glob("offline-run-*/run-*.wandb")))
    assert first.id in ("", second.id) and second.id  # a kill may take all of a file with it
    steps = {int(line["step"]): line for line in first.history + second.history if "loss" in line}
    assert sorted(steps) == list(range(1, 9))
    assert [int(steps[step]["attempt"]) for step in sorted(steps)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [int(line["step"]) for line in second.history if "loss" in line] == list(range(1, 9))
    assert any("event/resume" in line for line in second.history)


@dataclass
class WandbFile:
    """Id and history of an offline run."""

    id: str
    history: list[dict[str, Any]]


def wandb_file(path: Path) -> WandbFile:
    """Reads a .wandb file: a header of 7 bytes, then LevelDB's log format with records of wandb's protocol."""
    from wandb.proto import wandb_internal_pb2

    found = WandbFile("", [])
    for data in _log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            found.id = record.run.run_id
        if record.WhichOneof("record_type") == "history":
            found.history.append(_items(record.history.item))
    return found


def _log_records(content: bytes) -> Iterator[bytes]:
    place, block, parts = 7, 32768, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_the_exporter_s_registration_ends_with_the_job(runs: Runs, resumed: Path) -> None:
    assert list((runs.folder / "targets").glob("*")) == []


def test_sinks_that_fail_leave_the_run_unharmed_and_say_so_once(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk under metrics.jsonl, no folder for TensorBoard, a taken port, no way to wandb's server."""
    folder = runs.folder / "troubled"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    (folder / "tensorboard").write_text("not a folder")
    (folder / "ranks").write_text("not a folder")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    with socket.create_server(("0.0.0.0", 0)) as taken:
        job = runs.start(
            "troubled", *EVERYWHERE, "--telemetry.wandb", "online", "--telemetry.targets_dir", str(folder / "targets"),
            "--telemetry.prometheus_port", str(taken.getsockname()[1]),
        )  # fmt: skip
    assert job.code == 0, job.output
    assert (folder / "checkpoints/step_00000008").is_dir() and job.output.count("step 8/8") == 1
    sinks = ("TensorBoard", "ranks/", "Prometheus exporter", "wandb")
    for words in ("metrics.jsonl: No space left", *(f"{sink} failed (" for sink in sinks)):
        assert job.output.count(words) == 1, (words, job.output)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert {"start", "finish", "telemetry"} <= {event["kind"] for event in events}
