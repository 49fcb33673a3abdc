from __future__ import annotations

import pytest

from megatron_implicit.cli import run_command
from megatron_implicit.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("broken\n  file"), 1, "error: broken file\n"),
        (ConfigError("wrong key"), 2, "error: wrong key\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(28, "No space left on device", "out.bin"), 1, "error: No space left on device: out.bin\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == line


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_the_result_of_main_is_the_exit_code() -> None:
    for result, code in ((None, 0), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: result)
        assert ended.value.code == code
