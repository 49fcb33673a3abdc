"""What the commands in ``tools/`` share: one-line errors, exit codes, progress bars."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_implicit.errors import ConfigError, MegatronImplicitError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
"""Finished, but something of the input had to be left out."""
EXIT_INTERRUPTED = 130


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help keeps the description's line breaks."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message} (see {self.prog} --help)\n")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits: with what it returns, or with one line on stderr and 1 (2: a wrong configuration).

    Only errors that a user can act on become a line; a mistake in the program still shows its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except MegatronImplicitError as error:
        code = _complain(str(error), EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE)
    except BrokenPipeError:
        # The reader of our output left; let the interpreter close stdout without a second complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILURE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code = _complain(f"{error.strerror or error}{where}", EXIT_FAILURE)
    except KeyboardInterrupt:
        code = _complain("interrupted", EXIT_INTERRUPTED)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
