"""Prepares Megatron-Core for this machine, and holds every difference between its versions.

``prepare_megatron()`` runs before the first import of ``megatron.core``: it checks the version, installs the CPU shim
where there is no GPU (``cpu_shim``) and the repairs that any machine needs (``torch_adam``, ``bucket_padding``,
``optimizer_shards``). Every other module imports Megatron-Core as it is; where 0.16 (Python 3.11) and 0.19 (Python 3.12)
differ, it asks here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import logging
import queue
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch

from megatron_implicit.errors import LaunchError

OLDEST, NEWEST = (0, 16), (0, 19)


@functools.lru_cache(maxsize=1)
def prepare_megatron() -> None:
    """Makes ``import megatron.core`` usable on this machine; later calls do nothing.

    Raises:
        LaunchError: Megatron-Core is missing or of an untested version.
    """
    _check_version()
    _quiet_imports()
    if not torch.cuda.is_available():
        from megatron_implicit.device.cpu_shim import install_cpu_shim

        install_cpu_shim()
    from megatron_implicit.device.bucket_padding import repair_bucket_padding
    from megatron_implicit.device.optimizer_shards import save_optimizer_in_pieces
    from megatron_implicit.device.torch_adam import repair_distributed_optimizer

    repair_distributed_optimizer()
    repair_bucket_padding()
    save_optimizer_in_pieces()


def megatron_version() -> tuple[int, int]:
    """(major, minor) of the installed Megatron-Core.

    Raises:
        LaunchError: it is not installed.
    """
    try:
        text = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError("megatron-core is not installed: run bash launch/setup.sh") from None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _check_version() -> None:
    version = megatron_version()
    if not OLDEST <= version <= NEWEST:
        raise LaunchError(
            f"megatron-core {version[0]}.{version[1]} is not supported: install one from "
            f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} (bash launch/setup.sh)"
        )


def _quiet_imports() -> None:
    """Megatron-Core warns at import about every optional package that is absent; kernels.describe() says it once."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        for module in (r"megatron\.core", r"torch\.distributed", r"torch\.jit"):
            warnings.filterwarnings("ignore", category=category, module=module)
    for name in ("megatron.core", "torch.utils.cpp_extension"):  # the latter: a CUDA toolkit without a GPU
        logging.getLogger(name).setLevel(logging.ERROR)


def mamba_stack_module() -> Any:
    """The module that defines MambaStack's layers: ``mamba_block`` up to 0.17, ``hybrid_block`` since 0.18."""
    try:
        return importlib.import_module("megatron.core.ssm.mamba_block")
    except ImportError:
        return importlib.import_module("megatron.core.models.hybrid.hybrid_block")


def accepted_arguments(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that this version's ``function`` takes: newer keywords are dropped on older versions."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


@dataclass
class CheckpointPlan:
    """What this rank has to write of a checkpoint, and what rank 0 needs to complete it."""

    request: Any
    """Megatron-Core's AsyncRequest; its finalize functions are not used."""
    bytes: int
    """Tensor data this rank writes."""
    strategy: Any
    """Megatron-Core's save strategy; a next plan with the same divides the work as before."""
    folder: Path

    def complete(self, results: list[Any]) -> None:
        """Writes the index of all shards; for rank 0, once everything is written.

        Args:
            results: of each rank: write results by file.
        """
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        writer, metadata = getattr(self.strategy, "base_strategy", self.strategy).planned
        writer.finish(metadata, [list(itertools.chain.from_iterable(share.values())) for share in results if share])
        save_config(CheckpointingConfig(self.strategy.backend, self.strategy.version), str(self.folder))


def plan_checkpoint(
    shards: dict[str, Any], folder: Path, group: torch.distributed.ProcessGroup, earlier: Optional[CheckpointPlan]
) -> tuple[Optional[CheckpointPlan], Optional[str]]:
    """Plans a checkpoint whose replicated shards are written by the ranks of ``group`` together; a collective.

    Megatron-Core's own finalization is left out: a rank that fails in it leaves the others waiting for ever. What it
    does is in :meth:`CheckpointPlan.complete`, and the caller sees to it that all ranks learn of a failure.

    Args:
        shards: sharded state dict of this rank.
        folder: exists on rank 0.
        group: ranks that hold the same shards.
        earlier: plan of a checkpoint of the same ``checkpoint_structure`` on all ranks.

    Returns:
        the plan, and the problem this rank met, if any.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    _collect_checkpoint_writes_in_process()
    strategy = earlier.strategy if earlier else _save_strategy()
    if not earlier and group.size() > 1:  # alone, it would find anew each time that nothing is to be divided
        strategy = FullyParallelSaveStrategyWrapper(strategy, group, True)
    with _keeping_errors_of_rank_0() as errors:
        request = dist_checkpointing.save(
            shards, str(folder), strategy, validate_access_integrity=earlier is None, async_sharded_save=True,
            **accepted_arguments(dist_checkpointing.save, async_strategy="mcore"),
        )  # fmt: skip
    buckets = request.async_fn_args[1] if request.async_fn is not None else []
    size = sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors)
    return CheckpointPlan(request, size, strategy, folder), (str(errors[0]) if errors else None)


def checkpoint_structure(shards: dict[str, Any]) -> list[tuple]:
    """What this rank's plan of a checkpoint depends on: which part of which tensor or object each shard is, in order."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    fields = ("key", "global_shape", "global_offset", "local_shape", "dtype", "replica_id")
    return [
        tuple(getattr(shard, field, None) for field in fields)
        for shard in nested_values(shards)
        if isinstance(shard, ShardedBase)
    ]


def _save_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class Strategy(TorchDistSaveShardedStrategy):
        """Keeps what its finalization would have used; from the third plan on, ranks need not tell each other theirs."""

        def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
            metadata = planned[1]
            if hasattr(metadata, "all_local_plans"):
                del metadata.all_local_plans  # every rank's plan, which loading has no use for
            self.planned = (writer, metadata)
            _, _, arguments = writer.get_save_function_and_args()
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            function = functools.partial(_write_buckets, transforms) if arguments else None
            return AsyncRequest(function, arguments, [])

    arguments = accepted_arguments(TorchDistSaveShardedStrategy.__init__, backend="torch_dist", version=1)
    return Strategy(**arguments, cached_metadata=True)


def _write_buckets(transforms: list[Any], rank: int, buckets: list[Any], answers: "queue.Queue[Any]") -> None:
    """Writes this rank's files, each in a thread, and answers with write results by file or with an exception.

    Megatron-Core 0.16 does this in forked processes, which it waits for without end if one dies. This runs in a
    process that is forked already, and a fork beside the threads of such queues may inherit a lock that is never released.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(number: int) -> tuple[int, Any]:
        outcome: "queue.Queue[Any]" = queue.Queue()
        begun: "queue.Queue[int]" = queue.Queue()
        begun.put(number)  # taken back when the file is there
        FileSystemWriterAsync.write_preloaded_data(transforms, number, buckets[number], outcome, begun, True)
        return outcome.get_nowait()

    with ThreadPoolExecutor(len(buckets)) as pool:
        results = dict(pool.map(write, range(len(buckets))))
    answers.put(next((result for result in results.values() if isinstance(result, Exception)), results))


@contextlib.contextmanager
def _keeping_errors_of_rank_0() -> Iterator[list[Exception]]:
    """Up to 0.17 rank 0 writes a file of its own amid the planning: were it to raise, the others would wait for ever."""
    from megatron.core.dist_checkpointing.strategies import common

    errors: list[Exception] = []
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:
        yield errors
        return
    save_common = strategy.save_common

    def keeping(self: Any, *arguments: Any) -> None:
        try:
            save_common(self, *arguments)
        except Exception as error:
            errors.append(error)

    strategy.save_common = keeping
    try:
        yield errors
    finally:
        strategy.save_common = save_common


def _collect_checkpoint_writes_in_process() -> None:
    """Makes dist_checkpointing plan without a Manager for the results of writing, which the caller hands over itself.

    A Manager is a process that costs seconds to start, since it imports the main program again, and that outlives a
    rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
