from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from megatron_implicit.data.publishing import PartialDataset, remove_leftovers


def test_leftovers_of_the_dead_are_removed_and_the_living_keep_theirs(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, living = socket.gethostname(), os.getppid()
    dead = [f"d.bin.{here}-{ended.pid}.partial", "d.idx.elsewhere-1.partial", f"e.json.{here}-{ended.pid}.partial"]
    kept = [f"d.bin.{here}-{living}.partial", "d.bin", "d.idx", "notes.partial"]
    for name in (*dead, *kept):
        (tmp_path / name).touch()
    with PartialDataset(tmp_path / "d"):
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, dead[2]])
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_killed_process_that_nobody_waited_for_counts_as_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    leftover = tmp_path / f"d.bin.{socket.gethostname()}-{process.pid}.partial"
    leftover.touch()
    remove_leftovers(tmp_path)
    assert leftover.exists()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    process.wait()
