"""Bad input ends every rank with one line that names the thing and the remedy; nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.launch.conftest import Runs, largest_shard, make_dataset


def _copy_data(runs: Runs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs.folder / "data", tmp_path / "data"))


def _refused(runs: Runs, message: str, *arguments: str, processes: int = 1) -> None:
    job = runs.start("refused", *arguments, processes=processes)
    assert job.code != 0
    assert len(job.errors) == 1, job.output
    assert message in job.errors[0]
    assert processes > 1 or "Traceback" not in job.output  # torchrun prints one of its own
    assert not (runs.folder / "refused").exists()


def test_missing_data(runs: Runs, tmp_path: Path) -> None:
    _refused(runs, f"{tmp_path / 'nothing'}", "--data.path", str(tmp_path / "nothing"))


def test_an_empty_folder(runs: Runs, tmp_path: Path) -> None:
    _refused(runs, "no dataset", "--data.path", str(tmp_path))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_corrupt_index(runs: Runs, tmp_path: Path, processes: int) -> None:
    data = _copy_data(runs, tmp_path)
    index = data / "corpus.idx"
    index.write_bytes(b"\0" * index.stat().st_size)
    _refused(runs, "corpus.idx", "--data.path", str(data), processes=processes)


def test_a_truncated_dataset(runs: Runs, tmp_path: Path) -> None:
    data = _copy_data(runs, tmp_path)
    tokens = (data / "corpus.bin").read_bytes()
    (data / "corpus.bin").write_bytes(tokens[: len(tokens) // 2])
    _refused(runs, "corpus.bin", "--data.path", str(data))


def test_the_wrong_tokenizer(runs: Runs, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", ["a quite different text " * 30, "and another one, with other words " * 30])
    _refused(runs, "tokenizer", "--data.tokenizer", str(tmp_path / "other" / "tokenizer.model"))


def test_a_checkpoint_of_another_model(runs: Runs) -> None:
    _refused(
        runs, "holds another model: model.hidden_size is 64 there and 128 here",
        "--checkpoint.load", str(runs.folder / "whole"), "--model.hidden_size", "128",
    )  # fmt: skip


def test_a_checkpoint_that_is_not_there(runs: Runs, tmp_path: Path) -> None:
    _refused(runs, "holds no checkpoint", "--checkpoint.load", str(tmp_path))


def test_other_data_under_a_resumed_run(runs: Runs, tmp_path: Path) -> None:
    runs.copy("whole", "moved")
    make_dataset(tmp_path / "data", [f"Sentence {i} tells of other things.\n" * 9 for i in range(90)])
    job = runs.start("moved", "--data.path", str(tmp_path / "data"))
    assert job.code != 0
    assert len(job.errors) == 1 and "does not hold the data" in job.errors[0], job.output


def test_a_batch_that_does_not_divide_is_refused_before_any_process_group(runs: Runs) -> None:
    _refused(
        runs,
        "train.global_batch_size=6 is not a multiple",
        "--train.global_batch_size",
        "6",
        "--train.micro_batch_size",
        "4",
    )


def test_a_world_that_does_not_fit(runs: Runs) -> None:
    _refused(runs, "needs a multiple of 2 processes, but the job has 1", "--parallel.tensor", "2")


def test_a_diverging_solve_names_step_microbatch_and_evaluation(runs: Runs) -> None:
    job = runs.start("diverged", "--debug.inject", "nonfinite_iterate@5")
    assert job.code != 0
    assert len(job.errors) == 1
    assert "step 5, microbatch 0, evaluation 1: the fixed-point iterate of sample 0" in job.errors[0]
    assert sorted(runs.metrics("diverged")) == [0, 1, 2, 3, 4]
    last = json.loads((runs.folder / "diverged/events.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "error" and "evaluation 1" in last["message"]


def test_a_lost_pointer_to_the_latest_checkpoint(runs: Runs) -> None:
    (runs.copy("whole", "lost") / "checkpoints" / "latest").unlink()
    before = runs.contents("lost")
    job = runs.start("lost")
    assert job.code == 1
    assert len(job.errors) == 1 and "holds checkpoints but no 'latest'" in job.errors[0]
    assert runs.contents("lost") == before


def test_a_run_whose_checkpoints_are_all_damaged(runs: Runs) -> None:
    for step in (runs.copy("whole", "lost_all") / "checkpoints").glob("step_*"):
        largest_shard(step).write_bytes(b"short")
    before = runs.contents("lost_all")
    job = runs.start("lost_all")
    assert job.code == 1
    assert len(job.errors) == 1 and "has 5 bytes instead of" in job.errors[0]
    assert "no earlier checkpoint is whole" in job.errors[0]
    assert runs.contents("lost_all") == before


def test_unknown_keys_and_files(runs: Runs) -> None:
    _refused(runs, "unknown configuration key 'parallel.tensr'", "--parallel.tensr", "2")
