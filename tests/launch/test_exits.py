"""A job that is over ends."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.launch.conftest import REPOSITORY


def end_with(last_words: str, seconds: int) -> "subprocess.CompletedProcess[str]":
    """A process that is to end within ``seconds``, and does ``last_words`` before."""
    program = f"import ctypes; from megatron_implicit import exits; exits.end_within({seconds}); {last_words}"
    return subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_a_process_that_holds_the_interpreter_for_ever_ends_with_its_stacks() -> None:
    done = end_with("ctypes.PyDLL(None).pause()", 1)
    assert done.returncode == -signal.SIGALRM
    assert "most recent call first" in done.stderr


def test_a_process_that_ends_in_time_says_nothing() -> None:
    done = end_with("print('over')", 50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
