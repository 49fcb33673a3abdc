"""Decides whether a run starts, resumes or branches, and builds everything it needs."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from pathlib import Path
from typing import Optional, Sequence

import torch.distributed as dist

from megatron_implicit.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_training_state,
    locate_checkpoint,
    read_checkpoint_config,
)
from megatron_implicit.checkpoint.fingerprint import refuse_changes, refuse_other_model
from megatron_implicit.checkpoint.layout import CONFIG_FILE, read_state
from megatron_implicit.comm.groups import Place, start_model_parallel, start_process_group
from megatron_implicit.config import Config, load_config, save_config
from megatron_implicit.config.load import peek_run_dir
from megatron_implicit.config.validate import validate_world
from megatron_implicit.device import current_platform
from megatron_implicit.errors import CheckpointError, ConfigError, LaunchError
from megatron_implicit.models import build_model
from megatron_implicit.training.callbacks import (
    Callback,
    Checkpointing,
    Console,
    Events,
    Faults,
    Metrics,
    Plots,
    Reporting,
    Validation,
)
from megatron_implicit.training.data import TrainingData, open_run_tokenizer
from megatron_implicit.training.optimizer import TrainingParts, keeping_hyperparameters, prepare_training
from megatron_implicit.training.trainer import EVENTS_FILE, Origin, Trainer

from megatron.core import parallel_state  # isort: skip


def resumable_checkpoint(run_dir: str) -> Optional[Path]:
    """The checkpoint that a run in this folder goes on from; None for a new run."""
    return CheckpointFolder(Path(run_dir) / "checkpoints").latest()


def configure(arguments: Sequence[str], prog: str | None = None) -> Config:
    """The configuration of a job: of its arguments, on top of the checkpoint's where the run's folder has one.

    Raises:
        ConfigError: as ``load_config``.
        CheckpointError: a changed key that would alter the training of a resumed run, by name.
    """
    checkpoint = resumable_checkpoint(peek_run_dir(arguments, prog))
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
        ConfigError, DataError, CheckpointError: nothing of the run has been written then.
    """
    validate_world(config, place.world_size)
    tokenizer = open_run_tokenizer(config)
    resumed = resumable_checkpoint(config.run.dir)
    source = resumed or (locate_checkpoint(Path(config.checkpoint.load)) if config.checkpoint.load else None)
    saved = read_checkpoint_config(source) if source else None
    if saved is not None:
        (refuse_changes if resumed else refuse_other_model)(saved, config, str(source))
    start_process_group(place, config.parallel.timeout_minutes)
    _refuse_disagreement(source)
    start_model_parallel(config.parallel, config.train.seed)
    data = TrainingData(
        config, tokenizer, parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    )
    device = current_platform().device(place.local_rank)
    parts = prepare_training(config, build_model(config, initialise=source is None).to(device))
    state, origin = TrainingState(data_fingerprint=data.fingerprint), Origin("start", f"new run in {config.run.dir}")
    if source is not None:
        state, origin = _restore(config, source, parts, data, branch=resumed is None)
    state.attempt, state.run_id = _next_attempt(config), _agreed_run_id(state.run_id)
    _prepare_folder(config)
    trainer = Trainer(config, parts, data, state, origin, device, callbacks or standard_callbacks(config))
    trainer.restore_callbacks()
    return trainer


def standard_callbacks(config: Config) -> list[Callback]:
    """What a run does around its steps, in order."""
    faults = [Faults(config.debug.inject)] if config.debug.inject else []
    return [*faults, Validation(), Metrics(), Console(), Reporting(), Checkpointing(), Plots(), Events()]


def _refuse_disagreement(source: Optional[Path]) -> None:
    """Ranks look for the checkpoint on their own: on a shared file system one may see it later than another.

    Raises:
        LaunchError: they found different ones.
    """
    found: list[Optional[str]] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(source))
    if len(set(found)) > 1:
        raise LaunchError(f"ranks see different checkpoints ({', '.join(sorted(set(found)))}): start the job again")


def _next_attempt(config: Config) -> int:
    """How many jobs have already worked in the run's folder, by its events; read by rank 0."""
    attempts = [-1]
    events = Path(config.run.dir) / EVENTS_FILE
    if dist.get_rank() == 0 and events.is_file():
        for line in events.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                attempts.append(int(json.loads(line)["attempt"]))
    message = [max(attempts) + 1]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def _agreed_run_id(known: str) -> str:
    """The run's, or rank 0's new one."""
    message = [known or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def _restore(
    config: Config, source: Path, parts: TrainingParts, data: TrainingData, *, branch: bool
) -> tuple[TrainingState, Origin]:
    state = TrainingState(**read_state(source))
    if state.data_fingerprint != data.fingerprint and not branch:
        raise CheckpointError(
            f"data.path={config.data.path} does not hold the data {source} was trained on: point data.path to it, or "
            "branch with a new run.dir and checkpoint.load"
        )
    if branch:
        _refuse_short_branch(config, state, source)
    with keeping_hyperparameters(parts.optimizer):
        load_training_state(
            source, parts.model.module, parts.optimizer, parts.scheduler, same_layout=_same_layout(config, state)
        )
    state.data_fingerprint = data.fingerprint
    if branch:
        state.parent, state.callbacks, state.run_id = str(source), {}, ""
        return state, Origin("branch", f"from {source} at step {state.step}")
    return state, Origin("resume", f"from {source.name}")


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


def _prepare_folder(config: Config) -> None:
    """Creates the run's folder and writes the resolved configuration, by rank 0."""
    if dist.get_rank() == 0:
        run_dir = Path(config.run.dir)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / CONFIG_FILE)
    dist.barrier()
