"""What the watch over hung ranks does where the run's folder is out of order."""

from __future__ import annotations

from pathlib import Path

from megatron_implicit.training.watchdog import Progress, Watchdog


def test_a_folder_that_cannot_be_read_tells_of_no_hang(one_process: None, tmp_path: Path) -> None:
    logs = tmp_path / ("n" * 300)  # the file system answers with an error
    assert not Watchdog(1.0, Progress(), logs, 0, print)._another_hangs()
