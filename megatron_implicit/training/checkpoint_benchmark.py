"""What saving a checkpoint costs training: waited for, and in the background."""

from __future__ import annotations

import gc
import itertools
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_implicit.checkpoint import CheckpointFolder, CheckpointWriter, TrainingState
from megatron_implicit.comm.groups import place_from_environment, start_model_parallel, start_process_group
from megatron_implicit.config import Config
from megatron_implicit.data.sampling import Batch
from megatron_implicit.device import current_platform
from megatron_implicit.models import build_model
from megatron_implicit.training.optimizer import prepare_training
from megatron_implicit.training.step import StepRunner


class CheckpointBenchmark:
    """Training steps of a model with and without saves between them.

    Args:
        config: resolved; its batch and sequence length make a step.
        folder: where checkpoints are written; what the benchmark wrote is removed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        place = place_from_environment()
        start_process_group(place)
        start_model_parallel(config.parallel, config.train.seed)
        self._config, self._folder = config, folder
        self._device = current_platform().device(place.local_rank)
        self._parts = prepare_training(config, build_model(config).to(self._device))
        self._runner = StepRunner(config, self._parts, on_gradients=self._before_update)
        self._step = 0
        self._writing: Optional[CheckpointWriter] = None
        self._calls = 0.0

    def run(self, repeats: int) -> dict[str, Any]:
        """Medians over ``repeats`` saves of both kinds, which take turns.

        The stall of a save is what its calls hold up training, plus what the steps beside the writing take longer than
        steps without; a synchronous save stalls for all of its time.
        """
        waited = self._writer(asynchronous=False, name="synchronous")
        background = self._writer(asynchronous=True, name="asynchronous")
        self._timed_step(), self._save(waited), self._save_beside_steps(background)  # all of it once: caches, plans
        gc.freeze()  # as a training run does
        plain, synchronous, beside = [], [], []
        for _ in range(repeats):
            plain += [self._timed_step() for _ in range(3)]
            synchronous.append(self._save(waited))
            beside.append(self._save_beside_steps(background))
        gc.unfreeze()
        step, save = statistics.median(plain), statistics.median(synchronous)
        calls = statistics.median(entry["calls_s"] for entry in beside)
        slowdown = statistics.median(max(0.0, sum(t - step for t in entry["steps_s"])) for entry in beside)
        shutil.rmtree(self._folder, ignore_errors=True)
        return {
            "device": current_platform().name,
            "torch": torch.__version__,
            "processes": dist.get_world_size(),
            "parameters": sum(p.numel() for p in self._parts.model.parameters()),
            "checkpoint_bytes": self._bytes,
            "repeats": repeats,
            "step_s": step,
            "synchronous_save_s": save,
            "asynchronous_calls_s": calls,
            "asynchronous_write_s": statistics.median(entry["write_s"] for entry in beside),
            "steps_beside_a_write": statistics.median(len(entry["steps_s"]) for entry in beside),
            "slower_steps_s": slowdown,
            "stall_ratio": calls / save,
            "stall_ratio_with_slower_steps": (calls + slowdown) / save,
        }

    def _writer(self, *, asynchronous: bool, name: str) -> CheckpointWriter:
        checkpoint = replace(self._config.checkpoint, asynchronous=asynchronous)
        return CheckpointWriter(CheckpointFolder(self._folder / name), replace(self._config, checkpoint=checkpoint))

    def _timed_step(self) -> float:
        self._step += 1
        current_platform().synchronize()
        began = time.perf_counter()
        self._runner.run(self._step, itertools.repeat(self._batch()), self._device)
        current_platform().synchronize()
        return time.perf_counter() - began

    def _save(self, writer: CheckpointWriter) -> float:
        """Seconds of a save that is waited for."""
        began = time.perf_counter()
        self._start(writer)
        self._finish(writer)
        return time.perf_counter() - began

    def _save_beside_steps(self, writer: CheckpointWriter) -> dict[str, Any]:
        """Times of a save's calls, of the writing, and of the steps made meanwhile."""
        began = time.perf_counter()
        self._start(writer)
        self._writing, self._calls, steps = writer, time.perf_counter() - began, []
        while not writer.done():
            before = self._calls
            steps.append(self._timed_step() - (self._calls - before))
        self._writing, written = None, time.perf_counter()
        self._finish(writer)
        calls = self._calls + time.perf_counter() - written
        return {"calls_s": calls, "write_s": written - began, "steps_s": steps}

    def _before_update(self, step: int) -> None:
        """The call of a save amid a step."""
        if self._writing is not None:
            began = time.perf_counter()
            self._writing.finish_copy()
            self._calls += time.perf_counter() - began

    def _start(self, writer: CheckpointWriter) -> None:
        parts, state = self._parts, TrainingState(step=self._step)
        writer.start(state, parts.model.module, parts.optimizer, parts.scheduler)

    def _finish(self, writer: CheckpointWriter) -> None:
        folder: Optional[Path] = writer.finish()
        self._bytes = sum(path.stat().st_size for path in folder.iterdir())
        CheckpointFolder(folder.parent).prune(keep_last=1, keep_every=0)

    def _batch(self) -> Batch:
        shape = (self._config.train.micro_batch_size, self._config.data.sequence_length)
        tokens = torch.randint(0, self._config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        return {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape)}
