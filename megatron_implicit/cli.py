"""What the commands in ``tools/`` share: one-line errors, exit codes, the check of an output file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_implicit import exits
from megatron_implicit.errors import ConfigError, MegatronImplicitError

PATIENCE_S = 10.0
"""What another rank of a job waits before it reports an error: where all ranks have it, the launcher ends it meanwhile."""


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help keeps the description's line breaks."""

    def __init__(self, description: str, prog: str | None = None, *, add_help: bool = True) -> None:
        super().__init__(
            prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            add_help=add_help,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(exits.USAGE, f"error: {message} (see {self.prog} --help)\n")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits: with what it returns, or with one line on stderr and 1 (2: a wrong configuration).

    Only errors that a user can act on become a line; a mistake in the program still shows its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except MegatronImplicitError as error:
        code = _complain(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output left; let the interpreter close stdout without a second complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = exits.FAILURE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code = _complain(f"{error.strerror or error}{where}", exits.FAILURE)
    except KeyboardInterrupt:
        code = _complain("interrupted", exits.INTERRUPTED)
    sys.exit(code)


def check_output_file(option: str, file: str | None) -> None:
    """Refuses a file that could not be written in the end, before the work begins.

    Raises:
        ConfigError: names option and file.
    """
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise ConfigError(f"{option} {file} is a folder: give a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {file}: there is no folder {path.parent}; make it, or give another file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{option} {file} cannot be written: give a file where you may write")


def _complain(message: str, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(PATIENCE_S)
    place = f"rank {rank}: " if rank else ""
    print(f"error: {place}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
