"""Pretrains a model: ``torchrun --nproc-per-node N launch/pretrain.py --config launch/configs/NAME.yaml [--KEY VALUE]``

Under srun (one task a rank) and mpirun it is the same command without torchrun. ``--dry-run`` builds the model without
allocating it and prints parameters, memory a rank and FLOPs a token. The same ``run.dir`` resumes; a new one with
``checkpoint.load`` branches. ``megatron_implicit/exits.py`` has its exit codes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.children import end_children_with_this_process  # noqa: E402
from launch.environment import enter  # noqa: E402
from megatron_implicit import exits  # noqa: E402
from megatron_implicit.errors import MegatronImplicitError  # noqa: E402

PATIENCE_S = 10.0
"""What another rank waits before it reports an error: where all ranks have it, the launcher ends it meanwhile."""

PARTING_S = 120
"""What leaving the process group and the interpreter may take once everything of the run is on disk."""


def main() -> None:
    """Runs the job; errors that a user can act on are one line, on the rank that has them."""
    arguments = sys.argv[1:]
    code = exits.DONE
    try:
        if "--dry-run" in arguments:
            _dry_run([argument for argument in arguments if argument != "--dry-run"])
        else:
            code = _pretrain(arguments)
    except MegatronImplicitError as error:
        code = error.exit_code
        _report(str(error))
    except OSError as error:
        code = exits.RESTART
        _report(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        code = exits.INTERRUPTED
        if not int(os.environ.get("RANK", 0)):
            _report("interrupted: the same command goes on from the last checkpoint")
    except SystemExit as end:
        code = end.code or exits.DONE
    except BaseException:
        code = exits.RESTART
        traceback.print_exc()
    if code:
        exits.leave(code)  # other ranks may wait in a collective: leave without joining them
    exits.record_exit(exits.DONE)


def _report(message: str) -> None:
    """Rank 0 at once; another rank after a pause and with its number."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run only takes note of it, to end in good order
        time.sleep(PATIENCE_S)
    place = f"rank {rank}: " if rank else ""
    print(f"error: {place}{' '.join(message.split())}", file=sys.stderr, flush=True)


def _pretrain(arguments: list[str]) -> int:
    end_children_with_this_process()
    enter()
    from megatron_implicit.comm.groups import place_from_environment, stop_process_group
    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.training.session import configure, open_session

    place = place_from_environment()
    config = configure(arguments, prog="launch/pretrain.py")
    trainer = open_session(config, place)
    trainer.run()
    exits.end_within(PARTING_S)
    stop_process_group()
    return exits.REQUEUE if trainer.interrupted else exits.DONE


def _dry_run(arguments: list[str]) -> None:
    from megatron_implicit.config import load_config
    from megatron_implicit.training.dry_run import print_plan

    print_plan(load_config(arguments, prog="launch/pretrain.py"))


if __name__ == "__main__":
    main()
