"""Decides whether a run starts, resumes or branches, and builds everything it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Optional, Sequence

import torch.distributed as dist

from megatron_implicit.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_model_weights,
    load_training_state,
    locate_checkpoint,
    read_checkpoint_config,
)
from megatron_implicit.checkpoint.fingerprint import refuse_changes, refuse_other_model
from megatron_implicit.checkpoint.integrity import find_obvious_problem, find_problem, verify_manifest
from megatron_implicit.checkpoint.layout import CONFIG_FILE, read_state
from megatron_implicit.comm.agreement import control_group
from megatron_implicit.comm.groups import Place, start_model_parallel, start_process_group
from megatron_implicit.comm.preflight import check_ranks
from megatron_implicit.comm.ring import refuse_few_queues
from megatron_implicit.config import Config, load_config, save_config
from megatron_implicit.config.load import peek_run_dir
from megatron_implicit.config.validate import validate_world
from megatron_implicit.device import current_platform
from megatron_implicit.device.determinism import fix_order_of_sums
from megatron_implicit.errors import CheckpointError, ConfigError, MachineError
from megatron_implicit.models import build_model
from megatron_implicit.training.callbacks import (
    Callback,
    Checkpointing,
    Console,
    Desync,
    Events,
    Faults,
    Interruption,
    Metrics,
    Plots,
    Reporting,
    SpectralRadius,
    TargetLoss,
    Validation,
)
from megatron_implicit.training.data import TrainingData, open_vocabulary
from megatron_implicit.training.optimizer import TrainingParts, keeping_hyperparameters, prepare_training
from megatron_implicit.training.run_folder import RunFolder
from megatron_implicit.training.trainer import Origin, Trainer

from megatron.core import parallel_state  # isort: skip


def configure(arguments: Sequence[str], prog: str | None = None) -> Config:
    """The configuration of a job: of its arguments, on top of the checkpoint's where the run's folder has one.

    Raises:
        ConfigError: as ``load_config``.
        CheckpointError: a changed key that would alter the training of a resumed run, by name.
    """
    checkpoint = _apparent_checkpoint(peek_run_dir(arguments, prog))
    if checkpoint is None:
        return load_config(arguments, prog=prog)
    saved = read_checkpoint_config(checkpoint)
    config = load_config(arguments, prog=prog, base=checkpoint / CONFIG_FILE)
    refuse_changes(saved, config, str(checkpoint))
    return config


def open_session(config: Config, place: Place, callbacks: Optional[Sequence[Callback]] = None) -> Trainer:
    """A trainer that is ready to run; every rank must call it.

    Args:
        config: resolved.
        place: this process in the job.
        callbacks: None takes the standard ones.

    Raises:
        ConfigError, DataError, CheckpointError, LaunchError: no file of the run but its lease and a damaged
            checkpoint's name has changed then.
    """
    callbacks = callbacks or standard_callbacks(config)  # first: from here on a signal is a request to stop
    if config.train.deterministic:
        fix_order_of_sums()
    validate_world(config, place.world_size)
    if config.implicit and config.parallel.pipeline > 1 and config.parallel.pipeline_transport == "device":
        refuse_few_queues(os.environ)
    vocabulary = open_vocabulary(config)
    resumed = _apparent_checkpoint(config.run.dir)
    source = resumed or (locate_checkpoint(Path(config.checkpoint.load)) if config.checkpoint.load else None)
    if source is not None:
        (refuse_changes if resumed else refuse_other_model)(read_checkpoint_config(source), config, str(source))
    start_process_group(place, config.parallel.timeout_minutes)
    control_group(config.parallel.timeout_minutes)
    _warn_of_slow_ranks(place)
    _refuse_disagreement(source)
    start_model_parallel(config.parallel, config.train.seed)
    data = TrainingData(
        config, vocabulary, parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    )
    device = current_platform().device(place.local_rank)
    parts = prepare_training(config, build_model(config, initialise=source is None).to(device))
    if resumed is None:
        state, origin = _begin(config, source, parts, data)
        folder = RunFolder.take(Path(config.run.dir))
    else:
        folder = RunFolder.take(Path(config.run.dir), read_state(source).get("run_id", ""))
        state, origin = _resume(config, folder, parts, data)
    state.run_id, state.attempt = folder.lease.run_id, folder.lease.attempt
    if dist.get_rank() == 0:
        save_config(config, folder.path / CONFIG_FILE)
    trainer = Trainer(config, parts, data, folder, state, origin, device, callbacks)
    trainer.restore_callbacks()
    return trainer


def standard_callbacks(config: Config) -> list[Callback]:
    """What a run does around its steps, in order."""
    faults = [Faults(config.debug.inject)] if config.debug.inject else []
    spectrum = [SpectralRadius()] if config.telemetry.spectral_radius_every else []
    return [
        Interruption(config.run), *faults, Validation(), TargetLoss(), Metrics(), *spectrum, Console(), Reporting(),
        Desync(), Checkpointing(), Plots(), Events(),
    ]  # fmt: skip


def _warn_of_slow_ranks(place: Place) -> None:
    """Lets every rank compute and communicate a little before anything is built.

    Raises:
        MachineError: a rank is wrong.
    """
    for line in check_ranks(current_platform().device(place.local_rank), place.local_rank):
        if place.rank == 0:
            print(f"warning: pre-flight: {line}", file=sys.stderr, flush=True)


def _refuse_disagreement(source: Optional[Path]) -> None:
    """Ranks look for the checkpoint on their own: on a shared file system one may see it later than another.

    Raises:
        MachineError: they found different ones.
    """
    found: list[Optional[str]] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(source))
    if len(set(found)) > 1:
        raise MachineError(f"ranks see different checkpoints ({', '.join(sorted(set(found)))}): start the job again")


def _apparent_checkpoint(run_dir: str) -> Optional[Path]:
    """The checkpoint that a run in this folder seems to go on from, without reading all of it; None for a new run.

    Raises:
        CheckpointError: the folder has checkpoints and none can be used.
    """
    candidates = CheckpointFolder(Path(run_dir) / "checkpoints").candidates()
    problems = []
    for candidate in candidates:
        problem = find_obvious_problem(candidate)
        if problem is None:
            return candidate
        problems.append(problem)
    if problems:
        raise CheckpointError(_none_is_whole(problems))
    return None


def _none_is_whole(problems: Sequence[str]) -> str:
    return (
        f"{problems[0]}, and no earlier checkpoint is whole: put one back, or start anew in another run.dir"
    )


def _begin(
    config: Config, source: Optional[Path], parts: TrainingParts, data: TrainingData
) -> tuple[TrainingState, Origin]:
    """A new run, from its first step or off another run's checkpoint."""
    if source is None:
        return TrainingState(data_fingerprint=data.fingerprint), Origin("start", f"new run in {config.run.dir}")
    verify_manifest(source)
    state = TrainingState(**read_state(source))
    if state.weights_only:
        load_model_weights(parts.model.module, source)
        parts.optimizer.reload_model_params()
        fresh = TrainingState(data_fingerprint=data.fingerprint, parent=str(source))
        return fresh, Origin("start", f"from the weights of {source}")
    _refuse_short_branch(config, state, source)
    _load(config, source, state, parts)
    state.data_fingerprint = data.fingerprint
    state.parent, state.callbacks, state.health = str(source), {}, {}
    return state, Origin("branch", f"from {source} at step {state.step}")


def _resume(
    config: Config, folder: RunFolder, parts: TrainingParts, data: TrainingData
) -> tuple[TrainingState, Origin]:
    """The run goes on from its newest whole checkpoint; damaged ones are reported and set aside."""
    source = _newest_whole_checkpoint(folder)
    state = TrainingState(**read_state(source))
    if state.data_fingerprint != data.fingerprint:
        raise CheckpointError(
            f"{_data_words(config)} does not hold the data {source} was trained on: point it to that, or branch with a "
            "new run.dir and checkpoint.load"
        )
    _load(config, source, state, parts)
    return state, Origin("resume", f"from {source.name}")


def _data_words(config: Config) -> str:
    data = config.data
    return f"data.stories={data.stories}" if data.task == "stories" else f"data.path={data.path}"


def _newest_whole_checkpoint(folder: RunFolder) -> Path:
    """Verifies checkpoints, the newest first, all ranks together; takes the first whole one for ``latest``.

    Raises:
        CheckpointError: there is none; nothing has changed then.
    """
    checkpoints, damaged = CheckpointFolder(folder.path / "checkpoints"), {}
    listing = [checkpoints.candidates() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(listing, src=0, group=control_group())
    for candidate in listing[0]:
        problem = find_problem(candidate)
        if problem is not None:
            damaged[candidate] = problem
            continue
        if dist.get_rank() == 0 and damaged:
            checkpoints.point_to(candidate)
            for path, text in damaged.items():
                checkpoints.set_aside(path)
                folder.warn("damaged_checkpoint", f"{text}: going on from {candidate.name} instead", 0)
        return candidate
    raise CheckpointError(_none_is_whole(list(damaged.values())))


def _load(config: Config, source: Path, state: TrainingState, parts: TrainingParts) -> None:
    with keeping_hyperparameters(parts.optimizer):
        load_training_state(
            source, parts.model.module, parts.optimizer, parts.scheduler, same_layout=_same_layout(config, state)
        )


def _refuse_short_branch(config: Config, state: TrainingState, source: Path) -> None:
    """A branch goes on with the parent's step and sample counts: its own run must reach beyond them."""
    train = config.train
    if train.steps <= state.step:
        raise ConfigError(f"train.steps={train.steps} must exceed step {state.step} of {source}: raise train.steps")
    needed = state.consumed_samples + (train.steps - state.step) * train.global_batch_size
    if needed > train.steps * train.global_batch_size:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is smaller than that of {source}: {train.steps} "
            f"steps do not cover the {state.consumed_samples} samples it has read: keep its batch size"
        )


def _same_layout(config: Config, state: TrainingState) -> bool:
    """Whether every rank finds its own random generator in the checkpoint."""
    return state.layout == [dist.get_world_size(), config.parallel.tensor, config.parallel.pipeline]
