"""Starting, resuming and branching runs with launch/pretrain.py."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_implicit import load_pretrained
from megatron_implicit.conversion.convert import convert, open_source
from megatron_implicit.data.tokenizers import train_sentencepiece
from megatron_implicit.errors import DataError
from megatron_implicit.inference.text import find_tokenizer
from tests.checkpoint.late_copies import copy_late
from tests.launch.conftest import Runs, train

METRICS = {
    "step", "time", "attempt", "tokens", "loss", "grad_norm", "learning_rate", "phase", "iterations_mean",
    "iterations_max", "evaluations_mean", "evaluations_max", "residual_mean", "residual_max",
    "unconverged_fraction",
    "evaluations_skew", "token_residual_p99", "step_time_s", "tokens_per_s", "model_flops_per_s", "mfu", "memory_bytes",
}  # fmt: skip


def test_a_run_writes_its_folder(runs: Runs) -> None:
    files = set(runs.contents("whole"))
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints/latest"} <= files
    assert "checkpoints/step_00000008/manifest.json" in files
    metrics = runs.metrics("whole")
    assert sorted(metrics) == list(range(9))
    assert "validation_loss" in metrics[0]
    for step in range(1, 9):
        assert METRICS <= set(metrics[step])
        assert metrics[step]["tokens"] == step * 4 * 32
        assert metrics[step]["phase"] == ("bounded" if step <= 4 else "free")
    assert metrics[1]["evaluations_mean"] == 3
    assert metrics[8]["evaluations_max"] <= 12
    assert metrics[8]["loss"] < metrics[1]["loss"]
    events = [json.loads(line)["kind"] for line in (runs.folder / "whole/events.jsonl").read_text().splitlines()]
    assert events[0] == "start" and "phase" in events and events[-2:] == ["checkpoint", "finish"]
    assert sorted(p.name for p in (runs.folder / "whole/checkpoints").glob("step_*")) == [
        "step_00000006",
        "step_00000008",
    ]


def test_a_stopped_run_resumes_bit_for_bit(runs: Runs) -> None:
    assert runs.start("stopped", "--train.stop_after_steps", "4").code == 0
    resumed = runs.start("stopped", config=False)  # the checkpoint's configuration is all it needs
    assert resumed.code == 0 and "leaked" not in resumed.output, resumed.output
    assert runs.losses("stopped") == runs.losses("whole")
    assert runs.metrics("stopped")[8]["attempt"] == 1


def test_a_run_that_crashes_twice_resumes_bit_for_bit_from_its_last_checkpoint(runs: Runs) -> None:
    assert runs.start("crashed", "--debug.inject", "crash@2").code != 0
    assert runs.start("crashed", "--debug.inject", "crash@6").code != 0
    assert runs.start("crashed").code == 0
    assert runs.losses("crashed") == runs.losses("whole")
    assert [runs.metrics("crashed")[step]["attempt"] for step in (0, 1, 3, 4, 8)] == [1, 1, 1, 2, 2]


def train_with_late_copies(arguments: list[str]) -> str:
    """``train``, with checkpoints copied as late as from a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        copy_late(patch)
        return train(arguments)


def test_a_checkpoint_is_of_its_step_however_late_it_is_copied(runs: Runs, pool) -> None:
    """Copies of a GPU's tensors may be made until the next step's update."""
    assert runs.run_in(pool, "late", job=train_with_late_copies) == ["", ""]
    again = runs.copy("late", "again")
    (again / "checkpoints/latest").write_text("step_00000006\n")
    assert runs.run_in(pool, "again") == ["", ""]
    assert runs.metrics("again")[7]["attempt"] == 1
    assert runs.losses("again") == runs.losses("late")


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_run_resumes_on_two_ranks(runs: Runs, layout: str) -> None:
    name, sequence = f"on two {layout} ranks", ("--parallel.sequence", "true") if layout == "tensor" else ()
    runs.start(name, "--train.stop_after_steps", "3")
    job = runs.start(name, f"--parallel.{layout}", "2", *sequence, processes=2)
    assert job.code == 0, job.output
    for (loss, norm, held_out), expected in zip(runs.losses(name), runs.losses("whole"), strict=True):
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-4)
        assert (held_out is None) == (expected[2] is None)
        assert held_out is None or held_out == pytest.approx(expected[2], rel=1e-5)
    for step, metrics in runs.metrics(name).items():
        for key in ("iterations_max", "evaluations_mean", "residual_mean") if step else ():
            assert metrics[key] == pytest.approx(runs.metrics("whole")[step][key], rel=1e-3), key


def test_a_finished_run_has_nothing_left_to_do(runs: Runs) -> None:
    before = runs.contents("whole")
    runs.copy("whole", "finished")
    assert runs.start("finished").code == 0
    after = runs.contents("finished")
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["checkpoints/latest"] == before["checkpoints/latest"]


def test_a_changed_key_that_alters_training_is_refused_by_name(runs: Runs) -> None:
    before = runs.contents("whole")
    job = runs.start("whole", "--optimizer.learning_rate", "0.5")
    assert job.code != 0
    assert len(job.errors) == 1 and "optimizer.learning_rate=0.5 differs from 0.003" in job.errors[0]
    assert runs.contents("whole") == before


def test_a_branch_takes_the_weights_and_its_own_configuration(runs: Runs) -> None:
    job = runs.start(
        "branch", "--checkpoint.load", str(runs.folder / "whole/checkpoints/step_00000006"),
        "--optimizer.learning_rate", "1e-4", "--curriculum",
        "[{start: 0.0, name: unrolled, gradient: unrolled, max_iterations: 4}]",
    )  # fmt: skip
    assert job.code == 0, job.output
    metrics = runs.metrics("branch")
    assert sorted(metrics) == [7, 8]
    assert metrics[7]["phase"] == "unrolled" and metrics[7]["unconverged_fraction"] is None
    # The decay that begins after step 6 has covered half of its two steps: 1e-5 + (1e-4 - 1e-5)(1 - sqrt 1/2).
    assert metrics[7]["learning_rate"] == pytest.approx(1e-5 + 9e-5 * (1 - 0.5**0.5))
    event = json.loads((runs.folder / "branch/events.jsonl").read_text().splitlines()[0])
    assert event["kind"] == "branch" and "step_00000006" in event["message"]
    state = json.loads((runs.folder / "branch/checkpoints/step_00000008/state.json").read_text())
    assert state["parent"].endswith("step_00000006")


def test_a_branch_that_cannot_go_on_is_refused(runs: Runs) -> None:
    job = runs.start("too_short", "--checkpoint.load", str(runs.folder / "whole"))
    assert job.code == 2
    assert len(job.errors) == 1 and "train.steps=8 must exceed step 8" in job.errors[0]
    job = runs.start(
        "smaller", "--checkpoint.load", str(runs.folder / "whole/checkpoints/step_00000006"),
        "--train.global_batch_size", "2",
    )  # fmt: skip
    assert job.code == 2
    assert len(job.errors) == 1 and "train.global_batch_size=2 is smaller" in job.errors[0]
    assert not (runs.folder / "too_short").exists() and not (runs.folder / "smaller").exists()


def test_the_saved_configuration_is_resolved(runs: Runs) -> None:
    saved = yaml.safe_load((runs.folder / "whole/config.yaml").read_text())
    assert saved["model"]["vocab_size"] == 320
    assert saved["inference"]["max_iterations"] == 96
    assert saved["train"]["tokens"] == 8 * 4 * 32


def test_a_dry_run_prints_parameters_memory_and_flops(runs: Runs) -> None:
    job = runs.start("dry", "--dry-run", "--model.family", "implicit_mamba2", "--parallel.tensor", "2")
    assert job.code == 0, job.output
    for words in ("injection", "total", "bounded (3+1)", "free (12+2)", "FLOPs"):
        assert words in job.output
    assert not (runs.folder / "dry").exists()


def test_a_dry_run_counts_every_parameter_once_on_stages(runs: Runs) -> None:
    model = ("--model.family", "implicit_mamba2", "--model.num_layers", "3")
    jobs = [runs.start("dry", "--dry-run", *model, "--parallel.pipeline", stages) for stages in ("1", "2")]
    assert [job.code for job in jobs] == [0, 0], jobs[1].output
    one, two = (re.search(r"total +│ +([\d,]+) │ +([\d,]+) │(?: +([\d,]+) │)?", job.output).groups() for job in jobs)
    assert one[0] == one[1] == two[0]  # the whole model
    whole, first, last = (int(count.replace(",", "")) for count in two)
    assert first + last > whole > first > last  # copies of embedding and injection; the last stage has a layer less
    assert "pipeline 2 (4 microbatches solving)" in jobs[1].output


def test_a_run_starts_from_converted_weights(runs: Runs, one_process: None) -> None:
    for source, target, read, written in (("megatron", "reference", "whole", "exported"),
                                          ("reference", "megatron", "exported", "imported")):  # fmt: skip
        convert(open_source(runs.folder / read, source), target, runs.folder / written)
    job = runs.start("from_weights", "--checkpoint.load", str(runs.folder / "imported"), "--parallel.tensor", "2",
                     processes=2)  # fmt: skip
    assert job.code == 0, job.output
    metrics = runs.metrics("from_weights")
    assert sorted(metrics) == [*range(9)], "the run has its own steps, from the first"
    held_out = runs.metrics("whole")[8]["validation_loss"]
    assert metrics[0]["validation_loss"] == pytest.approx(held_out, abs=1e-5)
    event = json.loads((runs.folder / "from_weights/events.jsonl").read_text().splitlines()[0])
    assert event["kind"] == "start" and "from the weights of" in event["message"]


OTHER_TEXTS = [f"other words, {i} of them, with letters of all kinds: jkqvwxyz" for i in range(90)]


def test_an_exported_run_takes_its_tokenizer_along(runs: Runs, one_process: None, tmp_path: Path) -> None:
    source, data = open_source(runs.folder / "whole", "megatron"), runs.folder / "data"
    report = convert(source, "hf", tmp_path / "exported")
    assert report.tokenizer == str(data / "tokenizer.model")
    assert (tmp_path / "exported/tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
    convert(open_source(tmp_path / "exported", "hf"), "megatron", tmp_path / "imported")
    lm = load_pretrained(tmp_path / "imported")
    assert find_tokenizer(lm, tmp_path / "imported").fingerprint == source.tokenizer_fingerprint

    shutil.copytree(data, tmp_path / "data")
    train_sentencepiece(OTHER_TEXTS, tmp_path / "data/tokenizer.model", 320, overwrite=True)
    moved = dataclasses.replace(source.config.data, path=str(tmp_path / "data"))
    source = dataclasses.replace(source, config=dataclasses.replace(source.config, data=moved))
    report = convert(source, "hf", tmp_path / "bare")
    assert report.tokenizer is None and not list((tmp_path / "bare").glob("tokenizer*")), "that is another one"


def test_a_run_takes_the_tokenizer_of_its_data_and_no_other(runs: Runs, one_process: None, tmp_path: Path) -> None:
    lm = load_pretrained(runs.folder / "whole")
    assert find_tokenizer(lm, runs.folder / "whole").fingerprint == lm.tokenizer_fingerprint
    other = tmp_path / "other.model"
    train_sentencepiece(OTHER_TEXTS, other, 320)
    with pytest.raises(DataError, match="trained with another tokenizer .* than .*other.model .320 entries") as caught:
        find_tokenizer(lm, runs.folder / "whole", str(other))
    assert "name the model's own with --tokenizer" in str(caught.value) and "\n" not in str(caught.value)
