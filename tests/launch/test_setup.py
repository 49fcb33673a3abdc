"""launch/setup.sh on a stand-in interpreter, whose "pip" only writes down what it was asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "launch" / "setup.sh"

INTERPRETER = f"""#!/bin/bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv" >>"$CALLS" ;;
    "-m pip")
        echo "${{@:3}}" >>"$CALLS"
        while (($#)); do
            if [[ $1 == -r || $1 == -c ]]; then sed "s/^/$1 /" "$2" >>"$CALLS"; fi
            shift
        done
        eval "${{PIP:-true}}"
        ;;
    *_base_executable*) echo "$0" ;;
    *sys.executable*) echo "$0" ;;
    *purelib*) echo "$SITE" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Repository:
    """A clone with nothing but what set-up reads."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, root.parent / "calls"
        (root / "launch").mkdir(parents=True)
        shutil.copy(SETUP, root / "launch")
        (root / "pyproject.toml").touch()
        (root / "requirements.txt").write_text("torch==2.13.0\nnumpy>=1\n")
        self.python = root.parent / "python3.11"
        self.python.write_text(INTERPRETER)
        self.python.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"], "PYTHON": str(self.python), "CALLS": str(self.calls),
            "SITE": str(root.parent / "site"),
        }  # fmt: skip

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        command = ["bash", str(self.root / "launch" / "setup.sh"), *arguments]
        return subprocess.Popen(
            command, cwd="/", env=self.environment | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def set_up(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def take_calls(self) -> list[str]:
        """What was asked of the interpreter since the last time."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "a clone")


def test_the_second_set_up_does_nothing_and_is_quick(repository: Repository) -> None:
    code, out, err = repository.set_up()
    assert (code, err) == (0, "") and "making .venv" in out
    calls = repository.take_calls()
    assert calls[0] == "venv" and sum("install" in call for call in calls) == 2
    began = time.monotonic()
    code, out, _ = repository.set_up()
    assert (code, repository.take_calls()) == (0, []) and ".venv is ready" in out
    assert time.monotonic() - began < 2


def test_changed_requirements_are_installed_into_the_same_environment(repository: Repository) -> None:
    repository.set_up()
    repository.take_calls()
    (repository.root / "requirements.txt").write_text("torch==2.13.0\nnumpy>=2\n")
    assert repository.set_up()[0] == 0
    calls = repository.take_calls()
    assert "venv" not in calls and "-r numpy>=2" in calls


def test_a_moved_clone_gets_a_new_environment(repository: Repository) -> None:
    repository.set_up()
    repository.take_calls()
    repository.root = repository.root.rename(repository.root.parent / "elsewhere")
    assert repository.set_up()[0] == 0
    assert repository.take_calls()[0] == "venv"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_set_up_that_was_ended_halfway_is_made_anew(repository: Repository, ending: signal.Signals) -> None:
    process = repository.start(PIP="sleep 3")
    while not (repository.root / ".venv" / "setup.log").exists():
        time.sleep(0.05)
    process.send_signal(ending)
    _, err = process.communicate(timeout=60)
    if ending is signal.SIGTERM:
        assert process.returncode == 130 and err == "error: interrupted: the same command picks it up again\n"
    repository.take_calls()
    assert repository.set_up()[0] == 0
    assert "venv" in repository.take_calls()  # a pip that nobody ended may still write there


def test_a_failed_installation_shows_what_pip_said_and_can_be_repeated(repository: Repository) -> None:
    code, _, err = repository.set_up(PIP="echo ERROR: no such package; exit 1", TMPDIR=str(repository.root))
    assert code == 1
    assert err.startswith("ERROR: no such package\nerror: pip could not install requirements.txt")
    assert repository.set_up()[0] == 0


def test_two_set_ups_at_once_take_turns(repository: Repository) -> None:
    first, second = repository.start(PIP="sleep 1"), repository.start(PIP="sleep 1")
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert repository.take_calls().count("venv") == 1
    assert sum("waiting for another set-up" in output for output in outputs) == 1


def test_only_the_path_of_the_interpreter_is_on_stdout_for_scripts(repository: Repository) -> None:
    code, out, err = repository.set_up("--print-python")
    assert (code, out) == (0, f"{repository.root}/.venv/bin/python\n") and "making .venv" in err


def test_another_index_for_torch_makes_the_environment_anew(repository: Repository) -> None:
    repository.set_up()
    repository.take_calls()
    assert repository.set_up(TORCH_INDEX_URL="file:///builds")[0] == 0
    calls = repository.take_calls()
    assert calls[0] == "venv" and calls[1].endswith("--index-url file:///builds torch==2.13.0")
    repository.set_up()
    assert repository.take_calls() == []  # without the variable the choice stays


def test_other_versions_of_python_are_refused_in_one_line(repository: Repository) -> None:
    repository.python.write_text("#!/bin/bash\necho 3.10\n")
    code, out, err = repository.set_up()
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "is Python 3.10, and this needs Python 3.11 or 3.12" in err and "set PYTHON" in err
    code, _, err = repository.set_up(PYTHON="/nowhere/python3.11")
    assert code == 1 and "is not a Python that runs" in err and err.count("\n") == 1


def test_an_environment_of_someone_else_is_not_touched(repository: Repository) -> None:
    (repository.root / ".venv").mkdir()
    (repository.root / ".venv" / "precious").touch()
    code, _, err = repository.set_up()
    assert code == 1 and "did not make it" in err and err.count("\n") == 1
    assert [path.name for path in (repository.root / ".venv").iterdir()] == ["precious"]


def test_the_environment_of_another_repository_is_not_replaced(repository: Repository, tmp_path: Path) -> None:
    repository.set_up()
    stamp = repository.root / ".venv" / ".setup-stamp"
    stamp.write_text(stamp.read_text().replace(str(repository.root), "/home/other/repository"))
    (repository.root / ".venv").rename(tmp_path / "theirs")
    (repository.root / ".venv").symlink_to(tmp_path / "theirs")
    code, _, err = repository.set_up()
    assert code == 1 and "a link to the environment of /home/other/repository" in err and err.count("\n") == 1
    assert (tmp_path / "theirs" / ".setup-stamp").exists() and (tmp_path / "theirs" / "bin" / "python").exists()


def test_without_an_environment_the_torch_that_is_there_stays(repository: Repository) -> None:
    import torch

    code, out, err = repository.set_up("--no-venv")
    assert (code, err) == (0, ""), err
    calls = repository.take_calls()
    assert "venv" not in calls and "-r numpy>=1" in calls and "-r torch==2.13.0" not in calls
    assert f"-c torch=={torch.__version__}" in calls
    assert "is ready" in repository.set_up("--no-venv")[1]
    assert repository.take_calls() == []


def test_unknown_arguments_are_refused(repository: Repository) -> None:
    assert repository.set_up("--venv") == (
        2, "", "error: unknown argument '--venv' (see bash launch/setup.sh --help)\n"
    )  # fmt: skip
    assert repository.set_up("--help")[1].startswith("Usage: bash launch/setup.sh")
