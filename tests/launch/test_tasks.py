"""Runs on tasks other than text, and runs that end when they are good enough."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit import load_pretrained
from megatron_implicit.config import load_config
from megatron_implicit.errors import ConfigError
from megatron_implicit.training.data import open_vocabulary
from tests.launch.conftest import Runs


def test_a_run_finishes_once_its_held_out_loss_is_low_enough(words: Runs) -> None:
    entries = words.metrics("learned")
    last = max(entries)
    assert last < 60 and last % 5 == 0
    assert entries[last]["validation_loss"] <= 1.3 < entries[last - 5]["validation_loss"]
    finish = words.events("learned")[-1]
    assert finish["kind"] == "finish" and "reached train.target_loss=1.3" in finish["message"]
    assert (words.folder / "learned/checkpoints/latest").read_text() == f"step_{last:08d}\n"


def test_a_run_that_reached_its_target_has_nothing_left_to_do(words: Runs) -> None:
    before = words.contents("learned")
    words.copy("learned", "again")
    job = words.start("again")
    assert job.code == 0, job.output
    assert words.contents("again")["metrics.jsonl"] == before["metrics.jsonl"]
    assert words.events("again")[-1]["kind"] == "finish"


def test_a_longer_length_goes_on_from_a_shorter_one_on_two_replicas(words: Runs) -> None:
    reached = max(words.metrics("learned"))
    job = words.start(
        "longer", "--checkpoint.load", str(words.folder / "learned"), "--data.sequence_length", "8",
        "--train.steps", str(reached + 3), "--train.target_loss", "null", processes=2,
    )  # fmt: skip
    assert job.code == 0, job.output
    entries = words.metrics("longer")
    assert sorted(entries) == [reached + 1, reached + 2, reached + 3]
    assert entries[reached + 3]["tokens"] == 32 * (4 * reached + 8 * 3)


def test_a_model_of_a_task_is_loaded_without_a_tokenizer(words: Runs) -> None:
    lm = load_pretrained(words.folder / "learned")
    assert lm(torch.zeros(2, 6, dtype=torch.int64)).logits.shape == (2, 6, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data.group", "Q8"), "data.group=Q8 is not a group or monoid offered here: use S3 to S6"),
        (("--train.validate_every", "0"), "train.target_loss=1.3 is compared with the held-out loss"),
        (("--model.vocab_size", "3"), "model.vocab_size=3 is smaller than the task's 5 entries"),
        (("--data.stories", "here"), "data.stories=here is read by data.task=stories only"),
    ],
)
def test_impossible_settings_are_refused_in_a_line(words: Runs, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        open_vocabulary(load_config(["--config", str(words.config), *arguments]))
    assert "\n" not in str(refusal.value)


def test_a_changed_group_is_refused_by_name(words: Runs) -> None:
    job = words.start("learned", "--data.group", "Z7")
    assert job.code != 0 and "data.group=Z7 differs from Z5" in job.errors[0]


STORIES = ("--data.task", "stories", "--data.sequence_length", "32", "--train.target_loss", "null",
           "--train.validate_every", "0", "--train.steps", "2")  # fmt: skip


def test_generated_stories_are_trained_on(words: Runs) -> None:
    job = words.start("told", *STORIES)
    assert job.code == 0, job.output
    assert sorted(words.metrics("told")) == [1, 2]


def test_stories_that_are_not_there_end_in_a_line(words: Runs, tmp_path: Path) -> None:
    job = words.start(str(tmp_path / "run"), *STORIES, "--data.stories", str(tmp_path))
    assert job.code != 0
    assert len(job.errors) == 1 and "has neither en-valid-10k_train.txt (CatbAbI) nor qa1_train.txt" in job.errors[0]
