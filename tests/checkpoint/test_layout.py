"""The folders of a run's checkpoints: what is kept, what is taken, what is published."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_implicit.checkpoint import CheckpointFolder, read_checkpoint_config
from megatron_implicit.errors import CheckpointError, LeaseLostError


def folder_with(path: Path, *steps: int) -> CheckpointFolder:
    """Whole checkpoints of these steps, the last one published last."""
    folder = CheckpointFolder(path)
    for step in steps:
        partial = folder.partial_folder(step)
        partial.mkdir(parents=True)
        folder.publish(partial, step)
    return folder


def test_the_newest_and_every_m_th_are_kept(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, *range(100, 1001, 100))
    folder.prune(keep_last=2, keep_every=400)
    assert folder.steps() == [400, 800, 900, 1000]
    for thread in threading.enumerate():
        if thread.name.startswith("removes"):
            thread.join()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{step:08}" for step in folder.steps()]


def test_an_ephemeral_checkpoint_stays_while_it_is_the_newest_and_does_not_count(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100, 150, 200, 250)
    folder.prune(2, 0, is_ephemeral=lambda step: step % 100 != 0)
    assert folder.steps() == [100, 200, 250]
    folder_with(tmp_path, 300).prune(2, 0, is_ephemeral=lambda step: step % 100 != 0)
    assert folder.steps() == [200, 300]


def test_a_checkpoint_that_is_to_stay_is_not_pruned(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100, 150, 200, 300)
    for step in (100, 150):
        folder.keep(folder.step_folder(step))
    folder.prune(1, 0, is_ephemeral=lambda step: step == 150)
    assert folder.steps() == [100, 150, 300]
    with pytest.raises(CheckpointError, match="step_00000200 is not there any more"):
        folder.keep(folder.step_folder(200))
    assert not list(tmp_path.glob("step_00000200*.keep"))


def test_checkpoints_newer_than_latest_are_left_alone(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100, 200, 300)
    folder.point_to(folder.step_folder(200))
    folder.prune(keep_last=1, keep_every=0)
    assert folder.steps() == [200, 300]
    assert folder.candidates() == [folder.step_folder(200)]


def test_candidates_come_newest_first_and_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100, 200, 300)
    assert [path.name for path in folder.candidates()] == ["step_00000300", "step_00000200", "step_00000100"]
    folder.point_to(folder.step_folder(200))
    folder.set_aside(folder.step_folder(300))
    assert folder.steps() == [100, 200]
    assert (tmp_path / "step_00000300.damaged").is_dir()


def test_what_an_attempt_did_not_finish_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100)
    assert folder.partial_folder(200, 0) != folder.partial_folder(200, 1)
    folder.partial_folder(200, 0).mkdir()
    folder.remove_leftovers()
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000100"]


def test_a_job_that_lost_its_lease_moves_nothing(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100)
    partial = folder.partial_folder(200)
    partial.mkdir()

    def lost(purpose: str) -> None:
        raise LeaseLostError(purpose)

    with pytest.raises(LeaseLostError, match="the checkpoint step_00000200"):
        folder.publish(partial, 200, lost)
    assert folder.steps() == [100] and folder.latest() == folder.step_folder(100)

    def lost_meanwhile(purpose: str) -> None:
        if "latest" in purpose:
            raise LeaseLostError(purpose)

    with pytest.raises(LeaseLostError, match="moving 'latest'"):
        folder.publish(partial, 200, lost_meanwhile)
    assert folder.latest() == folder.step_folder(100)


def test_a_missing_pointer_is_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 100)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match="holds checkpoints but no 'latest'"):
        folder.candidates()


@pytest.mark.parametrize("content", [b"", b"garbage", b"train: [1]", b"train: {steps: ", b"\xff\xfe", b"trian: {}"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.yaml cannot be read \(.*take another checkpoint$"):
        read_checkpoint_config(tmp_path)
