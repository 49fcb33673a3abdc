"""When a job has to have ended, by its configuration and its environment."""

from __future__ import annotations

from megatron_implicit.config import RunConfig
from megatron_implicit.training.callbacks.interruption import deadline


def test_the_key_wins_then_what_the_script_found_out_then_slurm() -> None:
    both = {"MEGATRON_IMPLICIT_END_TIME": "5000", "SLURM_JOB_END_TIME": "6000"}
    assert deadline(RunConfig(time_limit_minutes=2.0), both, now=1000.0) == 1120.0
    assert deadline(RunConfig(), both, now=1000.0) == 5000.0
    assert deadline(RunConfig(), {"SLURM_JOB_END_TIME": "6000"}, now=1000.0) == 6000.0


def test_without_a_limit_there_is_none() -> None:
    for environment in ({}, {"SLURM_JOB_END_TIME": "0"}, {"SLURM_JOB_END_TIME": "UNLIMITED"}):
        assert deadline(RunConfig(), environment, now=1000.0) is None
