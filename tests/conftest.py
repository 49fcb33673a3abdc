"""Fixtures and options of all tests."""

from __future__ import annotations

import os
from typing import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads and the workers' would fight for the cores

import pytest

from tests.distributed.harness import WorkerPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--acceptance", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what this call or this machine cannot run, with the reason."""
    if not config.getoption("--acceptance"):
        _skip(items, "acceptance", "takes minutes: run with --acceptance")
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        _skip(items, "gpu", "needs a CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], WorkerPool]]:
    """pool(world_size): processes for distributed jobs, shared by all tests (see ``tests.distributed.harness``)."""
    pools: dict[int, WorkerPool] = {}
    yield lambda world_size: pools.setdefault(world_size, WorkerPool(world_size))
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def one_process() -> None:
    """This process as a job of its own: a process group of one."""
    from megatron_implicit.comm.groups import Place, start_process_group

    start_process_group(Place())
