"""Ranks that are wrong or slow are named before a run starts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_implicit.comm import preflight
from megatron_implicit.errors import MachineError
from tests.distributed.harness import WorkerPool

CPU = torch.device("cpu")


def _healthy() -> list[str]:
    return preflight.check_ranks(CPU, dist.get_rank())


def _slow_rank(slow: int) -> list[str]:
    """One rank's every product takes a quarter of a second more, as on a machine whose clocks are down."""
    product = torch.Tensor.__matmul__

    def slowly(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        time.sleep(0.25)
        return product(left, right)

    with mock.patch.object(torch.Tensor, "__matmul__", slowly if dist.get_rank() == slow else product):
        return preflight.check_ranks(CPU, dist.get_rank())


def _wrong_rank(wrong: int) -> str:
    """One number of one rank's product is off by one."""
    product = torch.Tensor.__matmul__

    def off_by_one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = product(left, right)
        result[7, 7] += 1
        return result

    with mock.patch.object(torch.Tensor, "__matmul__", off_by_one if dist.get_rank() == wrong else product):
        with pytest.raises(MachineError) as raised:
            preflight.check_ranks(CPU, dist.get_rank())
    return str(raised.value)


def test_healthy_ranks_pass(pool: Callable[[int], WorkerPool]) -> None:
    for lines in pool(2).run(_healthy):
        assert not [line for line in lines if "wrong" in line]


def test_a_slow_rank_is_named_on_all_ranks(pool: Callable[[int], WorkerPool]) -> None:
    first, second = pool(4).run(_slow_rank, 2)[:2]
    assert first == second
    assert [line for line in first if re.match(r"rank 2 on .* a matrix product takes [2-9]\d\d\.", line)]


def test_a_rank_that_computes_wrong_numbers_ends_the_job_everywhere(pool: Callable[[int], WorkerPool]) -> None:
    messages = pool(4).run(_wrong_rank, 1)
    assert len(set(messages)) == 1
    assert messages[0].startswith("pre-flight: rank 1 on ") and "computes a wrong matrix product" in messages[0]
    assert "--exclude=HOST" in messages[0]


def _report(rank: int, **found: float) -> preflight.RankReport:
    values = {"product": 5, "reduced": 0.0, "product_s": 0.01, "receive_s": 0.01}
    return preflight.RankReport(rank, f"n{rank // 8}", rank % 8, **{**values, **found})


def test_a_slow_link_is_told_from_ordinary_differences() -> None:
    reports = [_report(rank) for rank in range(32)]
    assert preflight.judge(reports) == []
    assert preflight.judge([*reports[:31], _report(31, receive_s=0.025)]) == []  # 2.5 times, and 15 ms
    [line] = preflight.judge([*reports[:31], _report(31, receive_s=0.2)])
    assert line == "rank 31 on n3 (device 7): receiving from the rank before takes 200.0 ms, 10.0 ms is usual"


def test_a_wrong_sum_everywhere_names_a_few_ranks() -> None:
    with pytest.raises(
        MachineError, match=r"rank 3 on n0 \(device 3\) receives a wrong sum .* and 28 more ranks: leave"
    ):
        preflight.judge([_report(rank, reduced=1.0) for rank in range(32)])
