"""Saves checkpoints: planned by all ranks, written by all ranks, published by rank 0 when everything is on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Optional

import torch
import torch.distributed as dist
from torch import nn

from megatron_implicit.checkpoint.background import BackgroundWrite, Written
from megatron_implicit.checkpoint.integrity import write_manifest
from megatron_implicit.checkpoint.layout import CONFIG_FILE, STATE_FILE, CheckpointFolder, write_durably
from megatron_implicit.checkpoint.store import TrainingState, training_shards
from megatron_implicit.comm.agreement import control_group, first_problem, largest
from megatron_implicit.config import Config, config_to_yaml
from megatron_implicit.device.host_memory import HostMemory
from megatron_implicit.device.megatron import CheckpointPlan, checkpoint_structure, plan_checkpoint
from megatron_implicit.errors import CheckpointError, LeaseLostError

from megatron.core import parallel_state  # isort: skip


class SaveError(CheckpointError):
    """A checkpoint could not be written; the ones before are untouched."""


class CheckpointWriter:
    """Saves a run's checkpoints, one at a time; all ranks must call its methods together.

    Args:
        folder: the run's ``checkpoints/``.
        config: resolved.
        fence: called on rank 0 with what is about to be published; raises LeaseLostError where this job may not.
    """

    def __init__(
        self, folder: CheckpointFolder, config: Config, fence: Callable[[str], None] = lambda purpose: None
    ) -> None:
        self._folder, self._config, self._fence = folder, config, fence
        self._config_text = config_to_yaml(config)
        self._plan: Optional[CheckpointPlan] = None
        self._structure: list[tuple] = []
        self._write: Optional[BackgroundWrite] = None
        self._memory = HostMemory()
        self._partial = Path()
        self.pending: Optional[int] = None
        """Step of the checkpoint that is being written."""

    def start(self, state: TrainingState, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Takes the state as it is now and begins to write it; ``finish_copy`` must be called before the next update.

        Args:
            state: counters and callbacks' states.
            model: as ``build_model`` returns it (not wrapped).
            optimizer: Megatron-Core's.
            scheduler: Megatron-Core's OptimizerParamScheduler.

        Raises:
            SaveError: there is no room, or the folder cannot be written; on all ranks.
        """
        self._partial = self._folder.partial_folder(state.step, state.attempt)
        self._agree(self._prepare(state) if dist.get_rank() == 0 else None)
        shards = training_shards(model, optimizer, loading=False)
        shards["scheduler"] = scheduler.state_dict()
        structure = checkpoint_structure(shards)
        if largest(structure != self._structure):
            self._plan, self._structure = None, structure
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._plan, problem = plan_checkpoint(shards, self._partial, group, earlier=self._plan)
        self._agree(problem or self._shortage(self._plan.bytes))
        self._write = BackgroundWrite(
            self._plan.request, self._memory, asynchronous=self._config.checkpoint.asynchronous
        )
        self.pending = state.step

    def finish_copy(self) -> None:
        """Makes sure that the state of ``start`` is out of the way of an update; it does nothing a second time."""
        if self._write is not None:
            self._write.finish_copy()

    def done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._write is None or self._write.done()

    def finish(self) -> Path:
        """Waits until all ranks have written, completes the checkpoint and moves ``latest`` to it.

        Returns:
            the step's folder.

        Raises:
            SaveError: some rank could not write; on all ranks.
            LeaseLostError: this job may no longer publish; on all ranks.
        """
        step, written = self.pending, self._write.wait()
        self.pending = self._write = None
        shares: list[Optional[Written]] = [None] * dist.get_world_size()
        dist.gather_object(written, shares if dist.get_rank() == 0 else None, dst=0, group=control_group())
        outcome: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                outcome = [self._publish(step, shares)]
            except LeaseLostError as error:
                outcome = [error]
            except Exception as error:  # whatever it is, the run goes on with the checkpoint before
                outcome = [self._failure(str(error))]
        dist.broadcast_object_list(outcome, src=0, group=control_group())
        if isinstance(outcome[0], Exception):
            self._discard()
            raise outcome[0]
        return outcome[0]

    def abandon(self) -> None:
        """Stops writing; for a rank whose job cannot go on."""
        if self._write is not None:
            self._write.abandon()

    def _prepare(self, state: TrainingState) -> Optional[str]:
        """Makes the folder with what is no tensor in it; the problem, if there is one."""
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            write_durably(self._partial / CONFIG_FILE, self._config_text)
            write_durably(self._partial / STATE_FILE, json.dumps(asdict(state), indent=1))
            return None
        except OSError as error:
            return f"{error.strerror}: {error.filename or self._partial}"

    def _shortage(self, share: int) -> Optional[str]:
        """The problem that all shares together do not fit on the disk; every rank must call it."""
        needed = torch.tensor([share], dtype=torch.int64)
        dist.all_reduce(needed, group=control_group())
        free = shutil.disk_usage(self._folder.path).free
        if int(needed) > free:
            return f"it needs {int(needed) / 1e9:.3g} GB and {self._folder.path} has room for {free / 1e9:.3g} GB"
        return None

    def _publish(self, step: int, shares: list[Written]) -> Path:
        for rank, share in enumerate(shares):
            if isinstance(share.results, Exception):
                raise OSError(f"rank {rank}: {share.results}")
        self._plan.complete([share.results for share in shares])
        entries = {name: entry for share in shares for name, entry in share.entries.items()}
        write_manifest(self._partial, entries)
        return self._folder.publish(self._partial, step, self._fence)

    def _agree(self, problem: Optional[str]) -> None:
        """Raises SaveError on all ranks if any of them has a problem."""
        problem = first_problem(problem)
        if problem:
            self._discard()
            raise self._failure(problem)

    def _failure(self, reason: str) -> SaveError:
        return SaveError(
            f"the checkpoint {self._partial.name.partition('.')[0]} could not be saved ({' '.join(reason.split())}): "
            "the ones before are untouched; make room on the disk"
        )

    def _discard(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)


def save_checkpoint(
    folder: CheckpointFolder, config: Config, state: TrainingState, model: nn.Module, optimizer: Any, scheduler: Any
) -> Path:
    """Saves one checkpoint and waits for it; all ranks must call it. Arguments and errors as of CheckpointWriter."""
    writer = CheckpointWriter(folder, config)
    writer.start(state, model, optimizer, scheduler)
    return writer.finish()
