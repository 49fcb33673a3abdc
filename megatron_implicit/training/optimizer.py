"""Megatron-Core's data-parallel wrapper, AdamW and learning-rate schedule for a run's configuration."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from torch import nn

from megatron_implicit.config import Config
from megatron_implicit.device.megatron import accepted_arguments

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip


@dataclass
class TrainingParts:
    """What a step needs."""

    model: DistributedDataParallel
    """The wrapped model; ``model.module`` is what ``build_model`` returned."""
    optimizer: Any
    """Megatron-Core's optimizer: fp32 main parameters, clipping, optionally sharded."""
    scheduler: OptimizerParamScheduler
    """Counts steps from 1: it is advanced before the optimizer's step."""


def prepare_training(config: Config, model: nn.Module) -> TrainingParts:
    """Wraps a model that is on its device."""
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # Overlap learns once how often a parameter becomes ready; curricula change that from phase to phase.
            overlap_grad_reduce=False,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        module=model,
    )
    optimizer = get_megatron_optimizer(_optimizer_config(config), [wrapped])
    return TrainingParts(wrapped, optimizer, _scheduler(config, optimizer))


def _optimizer_config(config: Config) -> OptimizerConfig:
    optimizer = config.optimizer
    return OptimizerConfig(
        **accepted_arguments(
            OptimizerConfig,
            optimizer="adam",
            lr=optimizer.learning_rate,
            min_lr=_lowest_rate(config),
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            decoupled_weight_decay=True,
            clip_grad=optimizer.clip_grad_norm,
            bf16=config.train.precision == "bf16",
            params_dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        )
    )


def _lowest_rate(config: Config) -> float:
    """Where the decay ends; a rate that is lower from the start is not raised."""
    return min(config.schedule.min_learning_rate, config.optimizer.learning_rate)


def _scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up, constant, then lr_min + (lr - lr_min)(1 - sqrt y) over the last share of the run."""
    steps, decay = config.train.steps, config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=decay.learning_rate,
        min_lr=_lowest_rate(config),
        lr_warmup_steps=round(config.schedule.warmup_fraction * steps),
        lr_decay_steps=steps,
        lr_decay_style="WSD",
        lr_wsd_decay_style="minus_sqrt",
        wsd_decay_steps=round(config.schedule.decay_fraction * steps),
        start_wd=decay.weight_decay,
        end_wd=decay.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The configuration is the truth: a branch brings its own schedule, a resumed run has the same one.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


_HYPERPARAMETERS = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay", "wd_mult", "start_wd", "end_wd")


@contextlib.contextmanager
def keeping_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Loading an optimizer's state inside this keeps the configured rates, betas and decay of every group."""
    kept = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, kept):
        group.update(values)
