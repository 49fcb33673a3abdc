"""A lease that cannot be read is not a lease that is lost."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from megatron_implicit.errors import LeaseLostError, MachineError
from megatron_implicit.training import run_folder
from megatron_implicit.training.run_folder import LEASE_FILE, Lease, RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder that this job holds."""
    lease = Lease("run", 0, "token", "node1", "1", 0.0)
    write(tmp_path, lease)
    return RunFolder(tmp_path, lease)


def write(path: Path, lease: Lease) -> None:
    (path / LEASE_FILE).write_text(json.dumps(dataclasses.asdict(lease)), encoding="utf-8")


def test_a_file_system_may_be_away_for_a_moment(folder: RunFolder) -> None:
    (folder.path / LEASE_FILE).write_text("", encoding="utf-8")
    back = threading.Timer(0.05, write, (folder.path, folder.lease))
    back.start()
    folder.verify("a line")
    back.join()


def test_a_lease_that_cannot_be_read_lets_the_job_start_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEASE_PAUSES_S", (0.01,))
    (folder.path / LEASE_FILE).write_text("", encoding="utf-8")
    with pytest.raises(MachineError, match="lease.json cannot be read"):
        folder.verify("a line")


def test_a_lease_of_another_job_is_lost_at_once(folder: RunFolder, one_process: None) -> None:
    write(folder.path, dataclasses.replace(folder.lease, token="another"))
    with pytest.raises(LeaseLostError, match="held by attempt 0"):
        folder.verify("a line")
