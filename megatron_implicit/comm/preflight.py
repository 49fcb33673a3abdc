"""Before a run starts: every rank computes and communicates a little, and a rank that is wrong or slow is named.

A GPU that computes wrong numbers, a link that runs at a tenth of its speed or a node whose clocks are down would cost
days before anybody sees it in a loss curve.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_implicit.device import current_platform
from megatron_implicit.errors import MachineError

SIZES = {"cuda": (4096, 2**24), "cpu": (256, 2**14)}
"""Width of the matrices and count of the numbers that are sent, by type of device: milliseconds on either."""
REPEATS = 5
"""Measurements of each; the fastest counts, which leaves out a neighbour's interference."""
NAMED = 4
"""Wrong ranks that are named; where one is wrong all others may receive a wrong sum."""
SLOW = 3.0
"""A rank that takes this many times the median of all ranks is an outlier."""
NOTICEABLE_S = 0.02
"""Differences of less than this say nothing about a machine."""


@dataclass(frozen=True)
class RankReport:
    """What a rank found."""

    rank: int
    host: str
    device: int
    product: int
    """Checksum of the matrix product: exact, since all its numbers are integers."""
    reduced: float
    """The largest deviation of the all-reduced numbers from their sum."""
    product_s: float
    receive_s: float
    """Of the numbers of the rank before this one, while every rank sends to the next: a slow link delays its end alone,
    where it would delay all ranks of an all-reduce."""

    @property
    def place(self) -> str:
        """Where that is, for messages."""
        return f"rank {self.rank} on {self.host} (device {self.device})"


def check_ranks(device: torch.device, local_rank: int) -> list[str]:
    """Runs the checks on every rank; all ranks must call it.

    Returns:
        a line for each rank that is slow, the same on all ranks.

    Raises:
        MachineError: a rank computes or communicates wrong numbers; on every rank, naming the machine.
    """
    report = measure(device, local_rank)
    reports: list[RankReport] = [report] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return judge(reports)


def judge(reports: Sequence[RankReport]) -> list[str]:
    """The slow ranks, a line each.

    Raises:
        MachineError: a rank is wrong.
    """
    wrong = _wrong(reports)
    if wrong:
        more = f" and {len(wrong) - NAMED} more ranks" if len(wrong) > NAMED else ""
        raise MachineError(
            f"pre-flight: {'; '.join(wrong[:NAMED])}{more}: leave that machine out "
            "(sbatch --exclude=HOST) and have it examined"
        )
    return [
        *_slow(reports, "a matrix product", lambda report: report.product_s),
        *_slow(reports, "receiving from the rank before", lambda report: report.receive_s),
    ]


def measure(device: torch.device, local_rank: int) -> RankReport:
    """This rank's report."""
    width, count = SIZES[device.type]
    left = (torch.arange(width * width, device=device) % 7 - 3).to(torch.float32).view(width, width)
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(count, device=device) % 5
    total = (numbers + rank).to(torch.float32)
    dist.all_reduce(total)
    expected = (numbers * world + world * (world - 1) // 2).to(torch.float32)
    return RankReport(
        rank,
        socket.gethostname(),
        local_rank,
        int((left @ left).double().abs().sum().item()),
        float((total - expected).abs().max()),
        _fastest(lambda: left @ left),
        _fastest(lambda: _pass_on(total, torch.empty_like(total))) if world > 1 else 0.0,
    )


def _pass_on(outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    """Sends to the next rank and receives from the one before."""
    rank, world = dist.get_rank(), dist.get_world_size()
    operations = [
        dist.P2POp(dist.isend, outgoing, (rank + 1) % world),
        dist.P2POp(dist.irecv, incoming, (rank - 1) % world),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some repetitions, after one that does not count."""
    platform, times = current_platform(), []
    for _ in range(REPEATS + 1):
        platform.synchronize()
        began = time.perf_counter()
        work()
        platform.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wrong(reports: Sequence[RankReport]) -> list[str]:
    """Ranks whose product differs from most others', or whose sum is not the sum."""
    usual = statistics.mode(report.product for report in reports)
    found = [f"{report.place} computes a wrong matrix product" for report in reports if report.product != usual]
    return found + [
        f"{report.place} receives a wrong sum (off by {report.reduced:g})" for report in reports if report.reduced != 0
    ]


def _slow(reports: Sequence[RankReport], what: str, seconds: Callable[[RankReport], float]) -> list[str]:
    usual = statistics.median(seconds(report) for report in reports)
    return [
        f"{report.place}: {what} takes {1e3 * seconds(report):.1f} ms, {1e3 * usual:.1f} ms is usual"
        for report in reports
        if seconds(report) > SLOW * usual and seconds(report) - usual > NOTICEABLE_S
    ]
