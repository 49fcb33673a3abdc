"""Running the commands as a user does: real processes, in another folder, without the package installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

REPOSITORY = Path(__file__).parents[2]


class Workplace:
    """A folder that commands run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)

    def fails(self, words: str, *command: object, code: int = 1) -> None:
        """The command ends with ``code``, says ``words`` in a single line on stderr, and changes no file."""
        before = self.contents()
        done = self.run(*command)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr
        assert self.contents() == before

    def contents(self) -> dict[str, bytes]:
        """Every file in the folder and what is in it."""
        files = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def corpus() -> Path:
    """The corpus in the repository."""
    return REPOSITORY / "launch" / "corpus"


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """A small corpus in the workplace."""
    path = tmp_path / "small.jsonl"
    lines = (orjson.dumps({"text": f"line {i} of a small corpus, with words"}) for i in range(50))
    path.write_bytes(b"\n".join(lines))
    return path
