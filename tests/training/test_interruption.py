"""When a job has to have ended, by its configuration and its environment."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

from megatron_implicit.config import RunConfig
from megatron_implicit.training.callbacks.interruption import SIGNALS, Interruption, deadline


def test_the_key_wins_then_what_the_script_found_out_then_slurm() -> None:
    both = {"MEGATRON_IMPLICIT_END_TIME": "5000", "SLURM_JOB_END_TIME": "6000"}
    assert deadline(RunConfig(time_limit_minutes=2.0), both, now=1000.0) == 1120.0
    assert deadline(RunConfig(), both, now=1000.0) == 5000.0
    assert deadline(RunConfig(), {"SLURM_JOB_END_TIME": "6000"}, now=1000.0) == 6000.0


def test_without_a_limit_there_is_none() -> None:
    for environment in ({}, {"SLURM_JOB_END_TIME": "0"}, {"SLURM_JOB_END_TIME": "UNLIMITED"}):
        assert deadline(RunConfig(), environment, now=1000.0) is None


def test_another_signal_while_the_last_checkpoint_is_saved_is_only_noted() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interruption = Interruption(RunConfig(), environment={})
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        interruption.on_end(None)  # checkpoints are completed after this
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.proposals(SimpleNamespace(save_seconds=0.0)) == {"stop": signal.SIGUSR1}
    finally:
        interruption.on_exit(None)
    assert [signal.getsignal(number) for number in SIGNALS] == before
