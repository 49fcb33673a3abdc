"""Saving in the background: the state of the moment, whole or not at all, and a full disk that costs nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Iterator, Optional
from unittest import mock

import pytest
import torch

from megatron_implicit.checkpoint import CheckpointFolder, CheckpointWriter, SaveError, TrainingState, background
from megatron_implicit.checkpoint.background import BackgroundWrite
from megatron_implicit.checkpoint.integrity import find_problem
from megatron_implicit.checkpoint.store import load_training_state
from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.device import current_platform
from megatron_implicit.device.host_memory import HostMemory
from tests.checkpoint.late_copies import copy_late

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # isort: skip

REPOSITORY = Path(__file__).parents[2]
CONFIG = {
    "model": {"family": "implicit_llama", "size": "custom", "num_layers": 2, "hidden_size": 64, "num_heads": 4,
              "vocab_size": 512},
    "data": {"sequence_length": 16},
    "optimizer": {"learning_rate": 1e-2},
    "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 2},
}  # fmt: skip


class Job:
    """A model that trains on random tokens, on the process group there is."""

    def __init__(self, config: Config) -> None:
        from megatron_implicit.comm.groups import start_model_parallel
        from megatron_implicit.models import build_model
        from megatron_implicit.training.optimizer import prepare_training
        from megatron_implicit.training.step import StepRunner

        start_model_parallel(config.parallel, config.train.seed)
        self.config, self.device = config, current_platform().device()
        self.parts = prepare_training(config, build_model(config).to(self.device))
        self.runner = StepRunner(config, self.parts, on_gradients=self._before_update)
        self._writer: Optional[CheckpointWriter] = None

    def _before_update(self, step: int) -> None:
        if self._writer is not None:
            self._writer.finish_copy()

    def train(self, steps: range, writer: Optional[CheckpointWriter] = None) -> None:
        """Steps whose batches depend on their number alone, beside what ``writer`` does."""
        self._writer = writer
        for step in steps:
            tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(step))
            batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(2, 16)}
            self.runner.run(step, iter([batch] * 2), self.device)

    def start(self, writer: CheckpointWriter, step: int) -> None:
        """Begins a save."""
        writer.start(TrainingState(step=step), self.parts.model.module, self.parts.optimizer, self.parts.scheduler)

    def load(self, step_folder: Path) -> None:
        """Takes a checkpoint's state."""
        load_training_state(
            step_folder, self.parts.model.module, self.parts.optimizer, self.parts.scheduler, same_layout=True
        )

    def parameters(self) -> list[torch.Tensor]:
        """A copy of all of them."""
        return [parameter.detach().clone() for parameter in self.parts.model.parameters()]


def train_beside_saves(folder: Path, layout: dict, saves: int = 1) -> list[bool]:
    """Whether runs from checkpoints that were written while training went on go on as the run itself."""
    config = config_from_dict(CONFIG | {"parallel": layout})
    job = Job(config)
    writer = CheckpointWriter(CheckpointFolder(folder), config)
    job.train(range(1, 4))
    step_folders, expected = [], []
    for step in range(3, 3 + 2 * saves, 2):
        job.start(writer, step)
        job.train(range(step + 1, step + 3), writer)  # changes all that is being written
        expected.append(job.parameters())
        step_folders.append(writer.finish())
    same = []
    for step, step_folder in zip(range(3, 3 + 2 * saves, 2), step_folders):
        assert find_problem(step_folder) is None
        other = Job(config)
        other.load(step_folder)
        other.train(range(step + 1, step + 3))
        same += [torch.equal(a, b) for a, b in zip(other.parameters(), expected.pop(0), strict=True)]
    return same


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"distributed_optimizer": True}], ids=["TP2", "DP2 distributed optimizer"]
)
def test_a_save_beside_training_holds_the_state_of_its_beginning(pool, tmp_path: Path, layout: dict) -> None:
    for same in pool(2).run(train_beside_saves, tmp_path, layout):
        assert all(same)
    sizes = {path.name[:3]: path.stat().st_size for path in tmp_path.rglob("*.distcp")}
    assert set(sizes) == {"__0", "__1"}  # both ranks wrote


def test_a_save_by_way_of_host_memory_is_the_same(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tensors of a GPU go: their values when the save began, and as much on disk, but for how archives are padded; a
    view of the memory would take all of it along."""
    layout = {"distributed_optimizer": True}
    assert all(train_beside_saves(tmp_path / "direct", layout))
    monkeypatch.setattr(background, "_is_away", lambda tensor: True)
    assert all(train_beside_saves(tmp_path / "copied", layout))
    sizes = [sum(path.stat().st_size for path in (tmp_path / way).rglob("*.distcp")) for way in ("copied", "direct")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_copies_are_waited_for_before_an_update(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_late(monkeypatch)
    assert all(train_beside_saves(tmp_path, {"distributed_optimizer": True}, saves=2))


def test_where_no_process_can_be_made_the_rank_writes_by_itself(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "fork", mock.Mock(side_effect=OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
    assert all(train_beside_saves(tmp_path, {}))
    assert "not written in the background: [Errno 12]" in capfd.readouterr().err


def plan_as_before(folder: Path) -> list[bool]:
    """Whether each of four checkpoints, the last two of which reuse the plan of those before, is right."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    plan = DefaultSavePlanner.create_global_plan
    with mock.patch.object(DefaultSavePlanner, "create_global_plan", autospec=True, side_effect=plan) as planned:
        same = train_beside_saves(folder, {"distributed_optimizer": True}, saves=4)
    assert planned.call_count == (2 if torch.distributed.get_rank() == 0 else 0)
    return same


def test_later_saves_reuse_the_plan(pool, tmp_path: Path) -> None:
    for same in pool(2).run(plan_as_before, tmp_path):
        assert all(same)


def test_a_plan_is_not_reused_for_other_tensors(one_process: None, tmp_path: Path) -> None:
    """An optimizer that has made no step has no state yet."""
    job = Job(config_from_dict(CONFIG))
    writer = CheckpointWriter(CheckpointFolder(tmp_path), job.config)
    for step in range(3):
        job.start(writer, step)
        writer.finish()
    job.train(range(3, 4))
    job.start(writer, 3)
    with_state = writer.finish()
    job.train(range(4, 6))
    other = Job(job.config)
    other.load(with_state)
    other.train(range(4, 6))
    assert all(map(torch.equal, other.parameters(), job.parameters()))


@pytest.fixture
def job(one_process: None) -> Job:
    """One on this process."""
    return Job(config_from_dict(CONFIG))


def test_a_writer_that_is_killed_leaves_the_checkpoint_before(job: Job, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    writer = CheckpointWriter(folder, job.config)
    job.start(writer, 1)
    first = writer.finish()
    write = background._write
    with mock.patch.object(background, "_write", lambda *given: (write(*given), time.sleep(600))):  # it never says so
        job.start(writer, 2)
    os.kill(writer._write._process.pid, signal.SIGKILL)
    with pytest.raises(SaveError, match="step_00000002 could not be saved .*was killed"):
        writer.finish()
    assert folder.latest() == first and find_problem(first) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    job.start(writer, 3)
    assert writer.finish().name == "step_00000003"  # and the next one is saved as if nothing had been


def test_writing_starts_no_process(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a process that is forked already, beside threads whose locks another fork might inherit."""
    config = replace(job.config, checkpoint=replace(job.config.checkpoint, asynchronous=False))
    writer = CheckpointWriter(CheckpointFolder(tmp_path), config)
    monkeypatch.setattr(os, "fork", mock.Mock(side_effect=AssertionError("a process")))
    job.start(writer, 1)
    assert find_problem(writer.finish()) is None


def orphan_a_writer(folder: Path) -> int:
    """Starts a save whose outcome is longer than a pipe holds, and dies; the number of the writing process."""
    request = AsyncRequest(lambda rank, buckets, answers: answers.put({0: "x" * 300_000}), [0, [], None], [])
    print(BackgroundWrite(request, HostMemory(), asynchronous=True)._process.pid, flush=True)
    os._exit(0)


def test_a_writer_whose_parent_died_ends(tmp_path: Path) -> None:
    program = "from tests.checkpoint.test_writer import orphan_a_writer as f; f(None)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=120)
    writer = Path("/proc") / done.stdout.split()[-1]
    for _ in range(600):
        if not writer.exists():
            return
        time.sleep(0.1)
    os.kill(int(writer.name), signal.SIGKILL)
    pytest.fail("the writing process outlives its parent")


@contextlib.contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own at ``path``; the test is skipped where it may not be mounted."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_costs_the_save_only(job: Job, tmp_path: Path, asynchronous: bool) -> None:
    config = replace(job.config, checkpoint=replace(job.config.checkpoint, asynchronous=asynchronous))
    writer = CheckpointWriter(CheckpointFolder(tmp_path / "elsewhere"), config)
    job.train(range(1, 2))
    job.start(writer, 1)
    whole = sum(path.stat().st_size for path in writer.finish().iterdir()) // 1024
    with small_disk(tmp_path / "disk", 2 * whole):
        folder = CheckpointFolder(tmp_path / "disk")
        writer = CheckpointWriter(folder, config)
        job.start(writer, 1)
        first = writer.finish()
        with pytest.raises(SaveError, match="it needs .* GB and .*disk has room for"):
            (tmp_path / "disk" / "filler").write_bytes(bytes(1024 * whole // 2))
            job.start(writer, 2)
        (tmp_path / "disk" / "filler").unlink()
        job.start(writer, 3)
        free = shutil.disk_usage(tmp_path / "disk").free
        with contextlib.suppress(OSError):  # filled by someone else, while it is written or before it is completed
            (tmp_path / "disk" / "filler").write_bytes(bytes(free))
        reason = "No space left on device|OSError|RuntimeError"  # Megatron-Core 0.19 names only the kind of an error
        with pytest.raises(SaveError, match=f"step_00000003 could not be saved .*({reason})"):
            writer.finish()
        assert folder.latest() == first and find_problem(first) is None
        assert folder.steps() == [1]
