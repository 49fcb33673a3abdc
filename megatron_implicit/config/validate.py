"""Cross-field validation of a resolved configuration: every message names the key, its value and the remedy."""

from __future__ import annotations

import math
import typing

from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.config.schema import Config, InferenceConfig, SolverConfig, TelemetryConfig
from megatron_implicit.errors import ConfigError


def validate(config: Config) -> None:
    """Checks everything that does not depend on the number of processes.

    Raises:
        ConfigError: the first impossible value or combination.
    """
    _validate_parallel(config)
    _validate_model(config)
    _validate_stages(config)
    validate_solver("solver", config.solver)
    _validate_curriculum(config)
    validate_inference("inference", config.inference)
    _validate_data(config)
    _validate_training(config)
    _validate_health(config)
    _validate_debug(config)


def validate_world(config: Config, world_size: int) -> None:
    """Checks the layout against the number of processes of the job.

    Raises:
        ConfigError: the world does not hold a whole number of model replicas, or the batch does not divide over them.
    """
    parallel, train = config.parallel, config.train
    ranks_per_replica = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % ranks_per_replica:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} needs a multiple of "
            f"{ranks_per_replica} processes, but the job has {world_size}: change the layout or --nproc-per-node"
        )
    replicas = world_size // ranks_per_replica
    samples = train.micro_batch_size * replicas
    if train.global_batch_size % samples:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel replicas = {samples}: "
            f"use {_nearest_multiple(train.global_batch_size, samples)} or change train.micro_batch_size"
        )


def _one_of(section: str, values: object, *names: str) -> None:
    """A field annotated with a Literal holds one of its values (the parser checks files, not calls)."""
    hints = typing.get_type_hints(type(values))
    for name in names:
        allowed = typing.get_args(hints[name])
        value = getattr(values, name)
        _require(value in allowed, f"{section}.{name}={value} must be one of {', '.join(allowed)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(section: str, values: object, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        _require(value is not None and value > 0, f"{section}.{name}={value} must be positive")


def _fraction(name: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, f"{name}={value} must lie between 0 and 1")


def _nearest_multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _divides(config: Config, name: str, value: int, by: int, why: str) -> None:
    _require(
        value % by == 0,
        f"{name}={value} is not divisible by {why}={by}: use {_nearest_multiple(value, by)} or change {why}",
    )


def _validate_model(config: Config) -> None:
    model = config.model
    _positive("model", model, "num_layers", "hidden_size", "expand", "num_groups", "conv_width", "norm_eps")
    if model.vocab_size is not None:
        _positive("model", model, "vocab_size")
    _fraction("model.dropout", model.dropout)
    _require(
        not (model.dropout > 0 and config.parallel.recompute != "none"),
        f"model.dropout={model.dropout} with parallel.recompute={config.parallel.recompute} is refused: the recomputed "
        "pass would draw another mask; set parallel.recompute=none",
    )
    _require(
        not (config.implicit and model.dropout > 0),
        f"model.dropout={model.dropout} is refused for {model.family}: every pass of the solve would draw another "
        "mask, so there is no fixed point; set it to 0",
    )
    if config.architecture == "mamba2":
        _validate_mamba2(config)
    else:
        _validate_llama(config)


def _validate_mamba2(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    _positive("model", model, "state_size", "head_dim", "scan_chunk_size")
    chunk = model.scan_chunk_size
    _require(
        chunk & (chunk - 1) == 0, f"model.scan_chunk_size={chunk} must be a power of two: the compiled scan needs one"
    )
    inner = model.expand * model.hidden_size
    _require(
        inner % model.head_dim == 0,
        f"model.head_dim={model.head_dim} does not divide the inner width model.expand x model.hidden_size = {inner}: "
        "change one of them",
    )
    heads = inner // model.head_dim
    _divides(config, "the number of Mamba2 heads (model.expand x model.hidden_size / model.head_dim)", heads,
             model.num_groups, "model.num_groups")  # fmt: skip
    _divides(config, "the number of Mamba2 heads (model.expand x model.hidden_size / model.head_dim)", heads,
             tensor, "parallel.tensor")  # fmt: skip
    _require(
        model.num_groups == 1 or model.num_groups % tensor == 0,
        f"model.num_groups={model.num_groups} must be 1 or a multiple of parallel.tensor={tensor}",
    )


def _validate_llama(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    _positive("model", model, "num_heads", "num_query_groups", "ffn_size", "rope_base")
    _divides(config, "model.hidden_size", model.hidden_size, model.num_heads, "model.num_heads")
    _divides(config, "model.num_heads", model.num_heads, model.num_query_groups, "model.num_query_groups")
    _divides(config, "model.num_heads", model.num_heads, tensor, "parallel.tensor")
    _divides(config, "model.num_query_groups", model.num_query_groups, tensor, "parallel.tensor")
    head = model.hidden_size // model.num_heads
    _require(head % 2 == 0, f"model.hidden_size / model.num_heads = {head} must be even for the rotary embedding")


def _validate_parallel(config: Config) -> None:
    parallel = config.parallel
    _positive("parallel", parallel, "tensor", "pipeline", "context", "timeout_minutes", "microbatches_in_flight")
    _one_of("parallel", parallel, "pipeline_transport")
    _require(
        not parallel.sequence or parallel.tensor > 1,
        f"parallel.sequence=true needs parallel.tensor > 1, not {parallel.tensor}: drop it or raise parallel.tensor",
    )
    if parallel.sequence:
        _divides(config, "data.sequence_length", config.data.sequence_length, parallel.tensor, "parallel.tensor")
    _require(
        parallel.context == 1,
        f"parallel.context={parallel.context} is not supported: set it to 1 and use parallel.sequence",
    )


def _validate_stages(config: Config) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    split = parallel.layers_per_stage
    _require(
        parallel.pipeline <= layers,
        f"parallel.pipeline={parallel.pipeline} exceeds model.num_layers={layers}: every stage needs a layer; lower it",
    )
    _require(
        len(split) == parallel.pipeline,
        f"parallel.layers_per_stage={split} has {len(split)} entries for parallel.pipeline={parallel.pipeline}: give "
        "one a stage, or null",
    )
    _require(
        min(split) >= 1, f"parallel.layers_per_stage={split} leaves a stage without layers: give each at least one"
    )
    _require(
        sum(split) == layers,
        f"parallel.layers_per_stage={split} adds up to {sum(split)}, not to model.num_layers={layers}: correct it, or "
        "set it to null",
    )


def validate_solver(section: str, solver: SolverConfig) -> None:
    """Checks a solver section, of the configuration or of a call.

    Raises:
        ConfigError: the first impossible value.
    """
    _one_of(section, solver, "stop", "gradient")
    _positive(section, solver, "max_iterations", "damping", "phantom_damping")
    _require(solver.tolerance >= 0, f"{section}.tolerance={solver.tolerance} must not be negative")
    _require(
        solver.phantom_steps >= 1 or solver.gradient == "unrolled",
        f"{section}.phantom_steps={solver.phantom_steps} leaves the model without gradient: use at least 1",
    )
    for name in ("damping", "phantom_damping", "fallback_damping"):
        value = getattr(solver, name)
        _require(value is None or 0 < value <= 1, f"{section}.{name}={value} must lie in (0, 1]")


def _validate_curriculum(config: Config) -> None:
    phases = config.curriculum
    _require(phases[0].start == 0.0, f"curriculum[0].start={phases[0].start} must be 0: the first phase begins the run")
    for index, phase in enumerate(phases):
        _fraction(f"curriculum[{index}].start", phase.start)
        validate_solver(f"curriculum[{index}]", solver_of_phase(config.solver, phase))
        if index:
            _require(
                phase.start > phases[index - 1].start,
                f"curriculum[{index}].start={phase.start} must be larger than the phase before it "
                f"({phases[index - 1].start}): put the phases in order",
            )


def validate_inference(section: str, inference: InferenceConfig) -> None:
    """Checks an inference section, of the configuration or of a call.

    Raises:
        ConfigError: the first impossible value.
    """
    _one_of(section, inference, "stop")
    _require(
        inference.max_iterations >= 2,
        f"{section}.max_iterations={inference.max_iterations} must be at least 2: one solver pass and the output pass",
    )
    _require(inference.tolerance >= 0, f"{section}.tolerance={inference.tolerance} must not be negative")
    _require(0 < inference.damping <= 1, f"{section}.damping={inference.damping} must lie in (0, 1]")
    _positive(section, inference, "patience")


def _validate_data(config: Config) -> None:
    data = config.data
    _positive("data", data, "sequence_length")
    _require(
        len(data.split) == 3 and all(share >= 0 for share in data.split) and data.split[0] > 0,
        f"data.split={data.split} must be three shares (train, validation, test), the first above 0",
    )
    _require(math.isclose(sum(data.split), 1.0, abs_tol=1e-6), f"data.split={data.split} must add up to 1")
    _one_of("data", data, "task")
    _fraction("data.non_identity_share", data.non_identity_share)
    _require(
        data.stories is None or data.task == "stories",
        f"data.stories={data.stories} is read by data.task=stories only, not by {data.task}: set data.task or drop it",
    )


def _validate_training(config: Config) -> None:
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    _positive("train", train, "steps", "global_batch_size", "micro_batch_size", "validation_batches")
    _positive("optimizer", optimizer, "learning_rate", "eps")
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1)")
    for section, values, names in (
        ("optimizer", optimizer, ("weight_decay", "clip_grad_norm")),
        ("schedule", schedule, ("min_learning_rate",)),
        ("train", train, ("validate_every", "seed")),
        ("checkpoint", config.checkpoint, ("save_every", "keep_every", "ephemeral_every")),
        ("run", config.run, ("time_margin_s",)),
    ):
        for name in names:
            value = getattr(values, name)
            _require(value >= 0, f"{section}.{name}={value} must not be negative")
    _validate_target(config)
    if train.stop_after_steps is not None:
        _positive("train", train, "stop_after_steps")
    if config.run.time_limit_minutes is not None:
        _positive("run", config.run, "time_limit_minutes")
    _positive("checkpoint", config.checkpoint, "keep_last")
    _validate_telemetry(config.telemetry)
    _validate_spectral_radius(config)
    _require(
        0 <= schedule.warmup_fraction < 1,
        f"schedule.warmup_fraction={schedule.warmup_fraction} must lie in [0, 1): some step must reach the peak",
    )
    _fraction("schedule.decay_fraction", schedule.decay_fraction)
    _require(
        schedule.warmup_fraction + schedule.decay_fraction <= 1.0,
        f"schedule.warmup_fraction={schedule.warmup_fraction} + schedule.decay_fraction={schedule.decay_fraction} "
        "exceed 1: shorten one of them",
    )


def _validate_target(config: Config) -> None:
    target = config.train.target_loss
    if target is None:
        return
    _positive("train", config.train, "target_loss")
    _require(
        config.train.validate_every > 0,
        f"train.target_loss={target} is compared with the held-out loss, which train.validate_every=0 never measures: "
        "set train.validate_every",
    )
    _require(
        config.data.task != "text" or config.data.split[1] > 0,
        f"train.target_loss={target} needs held-out documents: raise the second share of data.split={config.data.split}",
    )


def _validate_telemetry(telemetry: TelemetryConfig) -> None:
    _positive("telemetry", telemetry, "console_every")
    _one_of("telemetry", telemetry, "wandb")
    every, port = telemetry.rank_file_every_s, telemetry.prometheus_port
    _require(every >= 0, f"telemetry.rank_file_every_s={every} must not be negative")
    _require(0 <= port < 65536, f"telemetry.prometheus_port={port} must be a port, or 0 for a free one")


def _validate_spectral_radius(config: Config) -> None:
    every = config.telemetry.spectral_radius_every
    name = f"telemetry.spectral_radius_every={every}"
    _require(every >= 0, f"{name} must not be negative")
    _require(not every or config.implicit, f"{name} needs an implicit model: {config.model.family} has no fixed point")
    _require(
        not every or config.parallel.pipeline == 1,
        f"{name} needs all of F on a rank: a pipeline stage has a part of it. Set it to 0 or parallel.pipeline=1",
    )


def _validate_health(config: Config) -> None:
    health, timeout = config.health, config.parallel.timeout_minutes
    _one_of("health", health, "nonfinite", "gradient_spike", "loss_spike", "divergence")
    _positive("health", health, "max_skipped")
    _require(health.window >= 8, f"health.window={health.window} must be at least 8: a spread needs some steps")
    for name in ("gradient_spike_sigmas", "loss_spike_sigmas", "retries", "desync_every", "hang_minutes"):
        value = getattr(health, name)
        _require(value >= 0, f"health.{name}={value} must not be negative")
    if health.unconverged_limit is not None:
        _fraction("health.unconverged_limit", health.unconverged_limit)
    if health.residual_limit is not None:
        _positive("health", health, "residual_limit")
    _require(
        config.implicit or (health.unconverged_limit is None and health.residual_limit is None),
        f"health.unconverged_limit and health.residual_limit need an implicit model: {config.model.family} has no solve",
    )
    _require(
        health.divergence == "log" or health.unconverged_limit is not None or health.residual_limit is not None,
        f"health.divergence={health.divergence} has no limit to go by: set health.unconverged_limit or "
        "health.residual_limit",
    )
    _require(
        health.hang_minutes < timeout,
        f"health.hang_minutes={health.hang_minutes:g} must be below parallel.timeout_minutes={timeout:g}, or "
        "collectives give up first and leave no stacks: lower it",
    )


def _validate_debug(config: Config) -> None:
    if config.debug.inject is not None:
        kind, _, _ = parse_fault(config.debug.inject)
        _require(
            config.implicit or kind not in ("nonfinite_iterate", "nonfinite_solve", "diverging_solve"),
            f"debug.inject={config.debug.inject} needs an implicit model: {config.model.family} has no solve",
        )


FAULTS = (
    "nonfinite_iterate", "nonfinite_solve", "nan_gradient", "gradient_spike", "loss_spike", "diverging_solve", "desync",
    "hang", "slow", "crash",
)  # fmt: skip
"""Kinds of ``debug.inject``."""


def parse_fault(text: str) -> tuple[str, int, int]:
    """(kind, step, rank) of ``debug.inject``; the rank defaults to 0.

    Raises:
        ConfigError: the text is not KIND@STEP or KIND@STEP:RANK with a known kind.
    """
    kind, _, place = text.partition("@")
    step, _, rank = place.partition(":")
    if kind not in FAULTS or not step.isdigit() or not (rank == "" or rank.isdigit()):
        raise ConfigError(
            f"debug.inject={text} must be KIND@STEP or KIND@STEP:RANK with KIND one of {', '.join(FAULTS)}"
        )
    return kind, int(step), int(rank or 0)
