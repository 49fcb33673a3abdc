"""Pretrains a model: ``torchrun --nproc-per-node N launch/pretrain.py --config launch/configs/NAME.yaml [--KEY VALUE]``

``--dry-run`` builds the model without allocating it and prints parameters, memory a rank and FLOPs a token.
The same ``run.dir`` resumes; a new one with ``checkpoint.load`` branches.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_implicit.errors import MegatronImplicitError, NonFiniteIterateError  # noqa: E402


def main() -> None:
    """Runs the job; its errors are one line."""
    arguments = sys.argv[1:]
    rank = int(os.environ.get("RANK", 0))
    try:
        if "--dry-run" in arguments:
            _dry_run([argument for argument in arguments if argument != "--dry-run"])
        else:
            _pretrain(arguments)
    except MegatronImplicitError as error:
        # All ranks find the same fault but for a diverged solve, which may be one replica's own.
        if rank == 0 or isinstance(error, NonFiniteIterateError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        os._exit(1)  # other ranks may wait in a collective: leave without joining them
    except KeyboardInterrupt:
        os._exit(130)


def _pretrain(arguments: list[str]) -> None:
    from megatron_implicit.comm.groups import place_from_environment, stop_process_group
    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.training.session import configure, open_session

    place = place_from_environment()
    config = configure(arguments, prog="launch/pretrain.py")
    open_session(config, place).run()
    stop_process_group()


def _dry_run(arguments: list[str]) -> None:
    from megatron_implicit.config import load_config
    from megatron_implicit.training.dry_run import print_plan

    print_plan(load_config(arguments, prog="launch/pretrain.py"))


if __name__ == "__main__":
    main()
