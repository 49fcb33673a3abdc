"""Studies are run once, kept, gone on with after an interruption, and shown on one page."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Callable

import pytest

from megatron_implicit.checkpoint.integrity import write_manifest
from megatron_implicit.errors import ConfigError, MachineError
from megatron_implicit.evaluation.studies import Figure, StudyContext, StudyResult, Table, command
from megatron_implicit.evaluation.studies.figures import COLOURS, drawing
from megatron_implicit.evaluation.studies.training import Training, train_all
from tests.launch.conftest import Runs


@dataclass(frozen=True)
class Settings:
    """Of the study of this test."""

    points: int


class Counting(ModuleType):
    """A study that counts how often it measures, and fails behind its first measurement where it is told to."""

    TITLE, CLAIM, SIZES = "Counting <things>", "Counting goes up.", {"tiny": Settings(3), "paper": Settings(300)}
    broken, measured = False, 0

    def run(self, settings: Settings, context: StudyContext) -> StudyResult:
        def measure() -> list[int]:
            self.measured += 1
            return list(range(settings.points))

        values = context.once("values", measure)
        if self.broken:
            raise MachineError("the power went out")
        with drawing(context.folder / "curve.png") as (axes,):
            axes.plot(values, color=COLOURS[0])
        rows = [[str(value)] for value in values]
        tables, figures = [Table("Values", ["value"], rows)], [Figure("curve.png", "Up")]
        return StudyResult("It does.", tables, figures, {"values": values})


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    module = Counting("tests.counting")
    monkeypatch.setitem(sys.modules, "tests.counting", module)
    monkeypatch.setattr(command, "STUDIES", {"counting": "tests.counting"})
    return module


def arguments(folder: Path, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--output", str(folder), *given])


def test_a_study_is_run_once_and_its_report_has_the_numbers(
    tmp_path: Path, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert command.run_paper(arguments(tmp_path)) == 0
    assert counting.measured == 1 and "from before" in capsys.readouterr().out
    page, text = (tmp_path / "tiny" / "report.html").read_text(), (tmp_path / "tiny" / "report.md").read_text()
    assert "Counting &lt;things&gt;" in page and "data:image/png;base64," in page and "<td>2</td>" in page
    assert "| 2 |" in text and "(counting/curve.png)" in text and "**It does.**" in text
    result = json.loads((tmp_path / "tiny" / "counting" / "result.json").read_text())
    assert result["numbers"] == {"values": [0, 1, 2]} and result["settings"] == {"points": 3}


def test_an_interrupted_study_goes_on_behind_what_it_measured(tmp_path: Path, counting: Counting) -> None:
    counting.broken = True
    with pytest.raises(MachineError):
        command.run_study("counting", arguments(tmp_path))
    counting.broken = False
    command.run_study("counting", arguments(tmp_path))
    assert counting.measured == 1


def test_a_study_with_other_settings_is_run_again(tmp_path: Path, counting: Counting) -> None:
    command.run_study("counting", arguments(tmp_path))
    counting.SIZES = {"tiny": Settings(4)}
    command.run_study("counting", arguments(tmp_path))
    assert json.loads((tmp_path / "tiny" / "counting" / "result.json").read_text())["numbers"]["values"] == [0, 1, 2, 3]


def _checkpoint(folder: Path, contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(contents)
    write_manifest(folder, {})
    return folder


def _reference_folder(folder: Path, contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "model.safetensors").write_text(contents)
    return folder


@pytest.mark.parametrize("make", [_checkpoint, _reference_folder])
def test_a_model_of_the_users_own_is_known_by_what_it_holds(
    make: Callable[[Path, str], Path], tmp_path: Path, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for the study's own models nor for another one in a folder of the same name."""
    for number, (folder, contents) in enumerate((("a", "one"), ("b", "two"), ("a", "later")), start=1):
        path = make(tmp_path / folder / "mine", contents)
        command.run_study("counting", arguments(tmp_path, "--checkpoint", str(path)))
        assert counting.measured == number and "from before" not in capsys.readouterr().out
    moved = make(tmp_path / "c" / "mine", "two")
    command.run_study("counting", arguments(tmp_path, "--checkpoint", str(moved)))
    assert counting.measured == 3 and "from before" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "counting").exists()
    assert len(list((tmp_path / "tiny" / "checkpoints").glob("mine-*/counting/result.json"))) == 3


def test_a_study_shown_again_says_that_it_was_measured_before(
    tmp_path: Path, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run_study("counting", arguments(tmp_path))
    assert "from before" not in capsys.readouterr().out
    command.run_study("counting", arguments(tmp_path))
    assert f"from before: {tmp_path / 'tiny' / 'counting'} holds" in capsys.readouterr().out


def test_a_size_that_is_not_there_is_refused(tmp_path: Path, counting: Counting) -> None:
    with pytest.raises(ConfigError, match="--size huge: counting has tiny, paper"):
        command.run_study("counting", arguments(tmp_path, "--size", "huge"))


def test_trainings_follow_one_another_and_are_not_repeated(tmp_path: Path, runs: Runs) -> None:
    context = StudyContext("study", "tiny", tmp_path, workers=2)
    config = str(runs.config)
    first = Training("first", config, {"train.steps": 2})
    second = Training("second", config, {"train.steps": 4}, after=first)
    trained = train_all([second], context)
    assert [record["step"] for record in trained[0].metrics][-2:] == [3, 4]
    assert train_all([first, second], context)[1].seconds == trained[0].seconds
    wrong = Training("wrong", config, {"train.steps": 2, "model.hidden_size": 33})
    with pytest.raises(MachineError, match="training of wrong ended with code 2: error: model.head_dim=16 does not"):
        train_all([wrong], context)
