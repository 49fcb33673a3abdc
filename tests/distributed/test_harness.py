"""The pool of worker processes: values, failures with every rank's traceback, hangs, isolation of jobs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import DistributedError, WorkerPool, run_distributed

Pool = Callable[[int], WorkerPool]


def sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value


def use_tensor_parallelism(tensor: int) -> int:
    from megatron.core import parallel_state

    from megatron_implicit.comm.groups import start_model_parallel
    from megatron_implicit.config import ParallelConfig

    assert not parallel_state.model_parallel_is_initialized()
    start_model_parallel(ParallelConfig(tensor=tensor))
    return parallel_state.get_tensor_model_parallel_rank()


def process_id() -> int:
    return os.getpid()


def fail_on_rank_1_while_the_others_wait() -> None:
    if dist.get_rank() == 1:
        print("words before the failure")
        raise ValueError("rank 1 went wrong")
    dist.barrier()


def fail_everywhere() -> None:
    raise ValueError(f"wrong on rank {dist.get_rank()}")


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def leave_traces() -> None:
    os.environ["LEFT_BEHIND"] = "yes"
    os.chdir("/")


def find_traces() -> tuple[str | None, str, float]:
    return os.environ.get("LEFT_BEHIND"), os.getcwd(), float(torch.rand(1))


def start_a_program() -> int:
    return subprocess.Popen(["sleep", "60"]).pid


def return_what_cannot_be_pickled() -> object:
    return lambda: None


def test_values_come_back_in_order_of_ranks(pool: Pool) -> None:
    replies = pool(2).run(sum_of_ranks, offset=10)
    assert [rank for rank, _ in replies] == [0, 1]
    assert [float(value) for _, value in replies] == [21.0, 21.0]


def test_processes_are_kept_and_each_job_chooses_its_own_layout() -> None:
    with WorkerPool(2) as fresh:  # the shared one may be about to replace its processes
        before = fresh.run(process_id)
        assert fresh.run(use_tensor_parallelism, 2) == [0, 1]
        assert fresh.run(use_tensor_parallelism, 1) == [0, 0]
        assert fresh.run(process_id) == before
    assert os.getpid() not in before and len(set(before)) == 2


def test_a_job_leaves_nothing_to_the_next(pool: Pool) -> None:
    first = pool(2).run(find_traces)
    pool(2).run(leave_traces)
    assert pool(2).run(find_traces) == first
    assert first[0][0] is None


def test_a_failure_shows_the_rank_that_failed_and_where_the_others_waited(pool: Pool) -> None:
    with pytest.raises(DistributedError) as failure:
        pool(2).run(fail_on_rank_1_while_the_others_wait)
    errors = failure.value.errors
    assert "ValueError: rank 1 went wrong" in errors[1] and "words before the failure" in errors[1]
    assert "still running when another rank failed" in errors[0]
    assert "fail_on_rank_1_while_the_others_wait" in errors[0]
    assert "rank 1 went wrong" in str(failure.value)
    assert [float(value) for _, value in pool(2).run(sum_of_ranks, 0)] == [1.0, 1.0]


def test_processes_survive_a_job_that_fails_on_every_rank() -> None:
    with WorkerPool(2) as fresh:
        before = fresh.run(process_id)
        with pytest.raises(DistributedError, match="failed on 2 of 2 ranks") as failure:
            fresh.run(fail_everywhere)
        assert fresh.run(process_id) == before
    assert "wrong on rank 0" in failure.value.errors[0] and "wrong on rank 1" in failure.value.errors[1]


def test_a_hang_ends_at_the_timeout_and_says_where() -> None:
    with WorkerPool(2) as own:
        own.run(process_id)
        began = time.monotonic()
        with pytest.raises(DistributedError, match="did not finish in time") as failure:
            own.run(hang_on_rank_0, timeout=10.0)
        assert time.monotonic() - began < 10 + 5 + 5  # the timeout, the grace, a loaded machine
    assert list(failure.value.errors) == [0]
    assert "in hang_on_rank_0" in failure.value.errors[0]


def test_a_dead_process_is_reported_with_its_code() -> None:
    with pytest.raises(DistributedError) as failure:
        run_distributed(die_on_rank_0, 2)
    assert "ended with code 7" in failure.value.errors[0]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_a_job_started_ends_with_the_pool() -> None:
    with WorkerPool(1) as own:
        (program,) = own.run(start_a_program)
        assert is_running(program)
    deadline = time.monotonic() + 60
    while is_running(program) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(program)


def test_functions_and_values_that_cannot_travel_are_refused(pool: Pool) -> None:
    with pytest.raises(TypeError, match="define it at a module's top"):
        pool(2).run(lambda: None)
    with pytest.raises(DistributedError, match="pickle"):
        pool(2).run(return_what_cannot_be_pickled)
