"""Fills every field that other fields determine, so that a resolved configuration says everything explicitly."""

from __future__ import annotations

import copy
import math
from pathlib import Path

from megatron_implicit.config.schema import Config, PhaseConfig, SolverConfig
from megatron_implicit.config.sizes import LEARNING_RATES, SIZES
from megatron_implicit.errors import ConfigError


def resolve(config: Config) -> Config:
    """A copy of ``config`` without derived ``None`` fields. ``model.vocab_size`` may stay None: the tokenizer sets it.

    Raises:
        ConfigError: a field that nothing determines is missing.
    """
    config = copy.deepcopy(config)
    _resolve_model(config)
    _resolve_steps(config)
    _resolve_inference(config)
    if not config.curriculum:
        config.curriculum = [PhaseConfig()]
    if config.optimizer.learning_rate is None:
        rate = LEARNING_RATES.get(config.model.size)
        if rate is None:
            raise ConfigError("optimizer.learning_rate is not set and model.size=custom has no default: set it")
        config.optimizer.learning_rate = rate
    if config.train.precision == "bf16":
        # Megatron-Core's plain mixed-precision optimizer cannot save parameters that are fp32 themselves, as our gains,
        # norms and biases are; the distributed one can, on one replica too.
        config.parallel.distributed_optimizer = True
    if config.parallel.layers_per_stage is None:
        config.parallel.layers_per_stage = even_stages(config.model.num_layers, config.parallel.pipeline)
    if config.parallel.microbatches_in_flight is None:
        config.parallel.microbatches_in_flight = 2 * config.parallel.pipeline
    if config.health.hang_minutes is None:
        config.health.hang_minutes = 0.8 * config.parallel.timeout_minutes
    if config.run.name is None:
        config.run.name = Path(config.run.dir).name
    return config


def even_stages(layers: int, stages: int) -> list[int]:
    """Layers of each stage; the first stages have one more where they do not divide: the last also has the head."""
    share, left_over = divmod(layers, max(stages, 1))
    return [share + (stage < left_over) for stage in range(stages)]


def _resolve_model(config: Config) -> None:
    model, mamba = config.model, config.architecture == "mamba2"
    for name, value in SIZES[config.architecture].get(model.size, {}).items():
        if getattr(model, name) is None:
            setattr(model, name, value)
    if mamba and model.scan_chunk_size is None:
        model.scan_chunk_size = 256
    if not mamba and model.hidden_size is not None:
        if model.ffn_size is None:
            model.ffn_size = int(2 * 4 * model.hidden_size / 3)
        if model.num_query_groups is None:
            model.num_query_groups = model.num_heads
    needed = ["num_layers", "hidden_size"] + (["state_size", "head_dim"] if mamba else ["num_heads"])
    for name in needed:
        if getattr(model, name) is None:
            raise ConfigError(f"model.{name} is not set and model.size={model.size} does not define it: set it")


def _resolve_steps(config: Config) -> None:
    train, tokens_per_step = config.train, config.train.global_batch_size * config.data.sequence_length
    if train.steps is None and train.tokens is None:
        raise ConfigError("train.steps and train.tokens are both unset: set one of them")
    steps_of_tokens = None if train.tokens is None else math.ceil(train.tokens / max(tokens_per_step, 1))
    if train.steps is None:
        train.steps = steps_of_tokens
    elif steps_of_tokens not in (None, train.steps):
        raise ConfigError(
            f"train.steps={train.steps} and train.tokens={train.tokens:g} ({steps_of_tokens} steps) disagree: "
            "set one of them and the other to null"
        )
    train.tokens = float(train.steps * tokens_per_step)


def _resolve_inference(config: Config) -> None:
    inference, solver = config.inference, config.solver
    if inference.max_iterations is None:
        inference.max_iterations = 4 * solver.max_iterations
    if inference.tolerance is None:
        inference.tolerance = solver.tolerance
    if inference.damping is None:
        inference.damping = solver.phantom_damping


def solver_of_phase(solver: SolverConfig, phase: PhaseConfig) -> SolverConfig:
    """The solver section with the values that ``phase`` overrides."""
    merged = copy.copy(solver)
    for name in vars(solver):
        value = getattr(phase, name)
        if value is not None:
            setattr(merged, name, value)
    return merged
