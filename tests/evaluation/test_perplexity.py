"""Held-out perplexity: on the data of the model's run, or on data that was named and fits the model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_implicit.cli import CommandParser
from megatron_implicit.errors import DataError
from megatron_implicit.evaluation import perplexity_command
from tests.conversion.folders import converted
from tests.launch.conftest import Runs, make_dataset


def measure(folder: Path, *arguments: str) -> None:
    parser = CommandParser("perplexity")
    perplexity_command.add_arguments(parser)
    perplexity_command.run(parser.parse_args(["--checkpoint", str(folder), "--max-sequences", "2", *arguments]))


@pytest.fixture(scope="module")
def models(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """A run, the same model in other formats, and data of another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    hf = converted(runs.folder / "whole", "megatron", "hf", folder / "hf")
    back = converted(hf, "hf", "megatron", folder / "back")
    copy = converted(runs.folder / "whole", "megatron", "megatron", folder / "copy")
    make_dataset(folder / "other", [f"{i} other words, such as jkqvwxyz, and {i**3} numbers.\n" for i in range(300)])
    return argparse.Namespace(
        run=runs.folder / "whole", data=runs.folder / "data", hf=hf, back=back, copy=copy, folder=folder
    )


def test_it_says_what_was_measured(models: argparse.Namespace, one_process: None, tmp_path: Path, capsys) -> None:
    measured = {}
    for name, path in (("run", []), ("copy", ["--data-path", str(models.data)])):
        measure(getattr(models, name), *path, "--json", str(tmp_path / "result.json"))
        measured[name] = json.loads((tmp_path / "result.json").read_text())
        assert measured[name]["data"] == str(models.data)
        assert measured[name]["tokenizer"] == json.loads((models.data / "corpus.json").read_text())["tokenizer"]
        shown = capsys.readouterr().out.replace("\n", "")
        assert "data " in shown and measured[name]["tokenizer"][:8] in shown
    assert measured["copy"] == measured["run"]


def test_a_model_that_comes_from_no_run_needs_its_data_named(models: argparse.Namespace, one_process: None) -> None:
    for folder in (models.hf, models.back, models.copy):
        with pytest.raises(DataError, match="brings no data of its own.*with --data-path") as caught:
            measure(folder)
        assert "\n" not in str(caught.value)


def test_data_of_another_tokenizer_is_refused(models: argparse.Namespace, one_process: None, tmp_path: Path) -> None:
    other = str(models.folder / "other")
    with pytest.raises(DataError, match="trained with another tokenizer .* than the tokenizer of .*other"):
        measure(models.run, "--data-path", other)
    for folder in (models.hf, models.back):
        with pytest.raises(DataError, match="was made with another tokenizer .* than .*tokenizer.model: prepare it"):
            measure(folder, "--data-path", other)
