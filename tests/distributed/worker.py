"""A process of a ``WorkerPool``: ``python -m tests.distributed.worker FILE_DESCRIPTOR``, started by ``harness``."""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from tests.distributed.harness import LEAVE, Job, Reply


def main() -> None:
    """Runs jobs until the other end is gone."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connection = Connection(int(sys.argv[1]))
    import torch

    from megatron_implicit.device import prepare_megatron

    torch.set_num_threads(1)
    prepare_megatron()
    import megatron.core.parallel_state  # noqa: F401

    connection.send_bytes(pickle.dumps(Reply()))
    environment, folder = dict(os.environ), os.getcwd()
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        if message != LEAVE:
            connection.send_bytes(_run(message))
            continue
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        connection.send_bytes(_leave())


def _end_with_parent(parent: int) -> None:
    """A killed pytest leaves no processes behind: neither this one, stuck or not, nor what a job started."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _run(message: bytes) -> bytes:
    """The job's value or its traceback, pickled."""
    try:
        job: Job = pickle.loads(message)
        _join(job)
        return pickle.dumps(Reply(value=job.function(*job.args, **job.kwargs)))
    except BaseException:  # SystemExit and pytest's outcomes too: all are failures here
        return pickle.dumps(Reply(error=traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _join(job: Job) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=job.timeout),
    )


def _leave() -> bytes:
    """Destroys every process group. All ranks do so only after all have ended their job: none is cut off."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    try:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        return pickle.dumps(Reply(error=traceback.format_exc()))
    return pickle.dumps(Reply())


if __name__ == "__main__":
    main()
