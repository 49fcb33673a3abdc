"""State tracking: what is trained, what is measured, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_implicit import load_pretrained
from megatron_implicit.config import load_config
from megatron_implicit.data.tasks.groups import monoid_named
from megatron_implicit.errors import ConfigError, MachineError
from megatron_implicit.evaluation.studies import StudyContext, state_tracking, state_tracking_parts
from megatron_implicit.evaluation.studies.state_tracking import SIZES
from megatron_implicit.evaluation.studies.state_tracking_runs import (
    Curriculum,
    Stage,
    implicit_trainings,
    timed_trainings,
)
from megatron_implicit.evaluation.studies.training import ROOT, Trained, Training, train_all
from megatron_implicit.evaluation.word_problems import measure_accuracy
from tests.launch.conftest import Runs

STAGES = (Stage(4, 30, 0.2, 8), Stage(8, 20, 0.1, 16))


def _curriculum(**changes) -> Curriculum:
    return dataclasses.replace(Curriculum("here", "state_tracking_a5_tiny", STAGES, 7, {"data.group": "S3"}), **changes)


def test_each_length_goes_on_from_the_one_before() -> None:
    short, long = implicit_trainings(_curriculum(), warmup_steps=10)
    assert short.after is None and long.after is short
    assert [each.overrides["data.sequence_length"] for each in (short, long)] == [4, 8]
    assert [each.overrides["train.steps"] for each in (short, long)] == [30, 50]
    assert [each.overrides["solver.max_iterations"] for each in (short, long)] == [8, 16]
    warmup = [each.overrides["schedule.warmup_fraction"] * each.overrides["train.steps"] for each in (short, long)]
    assert warmup == pytest.approx([10, 10], abs=0.01)


def test_trainings_that_differ_have_folders_of_their_own() -> None:
    def name(**changes) -> str:
        return implicit_trainings(_curriculum(**changes), 10)[-1].name

    others = [{}, {"seed": 8}, {"overrides": {"data.group": "A5"}}, {"config": "state_tracking_a5"},
              {"stages": (Stage(4, 31, 0.2, 8), STAGES[1])}, {"stages": STAGES[1:]}]  # fmt: skip
    assert len({name(**changes) for changes in others}) == len(others)
    assert name() == name()


def test_a_given_time_is_shared_by_the_lengths() -> None:
    stages = (*STAGES, Stage(16, 1, 0.1, 16))
    trainings = timed_trainings(_curriculum(stages=stages), minutes=8.0, warmup_steps=10)
    assert [each.minutes for each in trainings] == [2.0, 2.0, 4.0]


@pytest.mark.parametrize("size", SIZES)
def test_implicit_and_explicit_models_have_equal_parameters(size: str) -> None:
    settings = SIZES[size]
    counts = {}
    for preset, changes in ((settings.implicit, {}), (settings.explicit, settings.explicit_overrides)):
        overrides = [f"--{key}={value}" for key, value in changes.items()]
        config = load_config(["--config", str(ROOT / f"launch/configs/{preset}.yaml"), *overrides])
        counts[config.implicit] = _parameters(config)
        assert config.model.num_layers == 1
    assert counts[False] == pytest.approx(counts[True], rel=0.02)


def _parameters(config) -> int:
    """Of one layer of Mamba2 and the embedding of 60 elements."""
    model = config.model
    inner = model.expand * model.hidden_size
    heads, channels = inner // model.head_dim, inner + 2 * model.num_groups * model.state_size
    rows = inner + channels + heads
    matrices = model.hidden_size * (60 + rows + inner) + channels * model.conv_width
    vectors = channels + 3 * heads + inner + 2 * model.hidden_size
    if config.implicit:
        matrices += model.hidden_size * rows
        vectors += rows + model.hidden_size + 2 * rows + model.hidden_size + channels  # injection; gains of weight norm
    return matrices + vectors


def test_accuracy_is_the_share_of_labels_that_the_model_names(words: Runs) -> None:
    lm = load_pretrained(words.folder / "learned")
    found = measure_accuracy(lm, 6, 10, seed=3, batch_size=4)
    assert len(found["by_position"]) == 6 and found["words"] == 10 and found["evaluations"] >= 1
    assert found["accuracy"] == pytest.approx(sum(found["by_position"]) / 6)
    assert found == measure_accuracy(lm, 6, 10, seed=3, batch_size=10)
    assert measure_accuracy(lm, 6, 10, mode="sequential")["by_position"][0] > 0.4

    class Oracle(torch.nn.Module):
        config, trace = lm.config, None

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, mode):
            labels = torch.zeros_like(tokens)
            for row, word in enumerate(tokens.tolist()):
                running = 0
                for position, element in enumerate(word):
                    running = int(monoid_named("Z5").table[running, element]) if position < 3 else 0
                    labels[row, position] = running
            logits = torch.nn.functional.one_hot(labels, 5).float()
            trace = type("Trace", (), {"evaluations": torch.ones(len(tokens))})
            return type("Output", (), {"logits": logits, "trace": trace})

    knowing = measure_accuracy(Oracle(), 6, 50, seed=3)
    assert knowing["by_position"][:3] == [1.0, 1.0, 1.0] and knowing["by_position"][5] < 0.5


def test_the_study_says_what_it_found(
    words: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All parts on one model that stands for all: the study's own trainings take half an hour."""
    asked: list[Training] = []

    def train(trainings, context):
        asked.extend(trainings)
        return [Trained(words.folder / "learned", 60.0) for _ in trainings]

    monkeypatch.setattr(state_tracking_parts, "train_all", train)
    settings = dataclasses.replace(
        SIZES["tiny"], seeds=(1, 2), stages=(Stage(4, 3, 0.1, 4), Stage(6, 3, 0.1, 4)), longer=Stage(8, 3, 0.1, 4),
        beyond=(8, 10), caps=(2, 8), cap_stages={"S3": (Stage(5, 3, 0.1, 4),), "A5": (Stage(5, 3, 0.1, 4),)},
        unrolled_groups=("S3",), layers=(2,), shares=(0.5, 1.0), words=8,
    )  # fmt: skip
    context = StudyContext("state-tracking", "tiny", tmp_path)
    result = state_tracking.run(settings, context)
    assert [table.title.split(":")[0] for table in result.tables][0] == "A5, words of 6"
    assert len(result.tables[0].rows) == 4, "two kinds with two seeds"
    for figure in result.figures:
        assert (context.folder / figure.file).stat().st_size > 5000
    assert {"A5", "beyond", "S5", "caps", "layers", "shares"} == set(result.numbers)
    json.dumps(result.numbers)
    assert "(refuted)" in result.finding, "the model of this test has learned little"
    explicit = [each for each in asked if "explicit" in each.name]
    assert {each.minutes for each in explicit} == {0.5} and explicit[0].after.minutes == 0.5
    asked.clear()
    monkeypatch.setattr("megatron_implicit.api.load_pretrained", None)
    assert state_tracking.run(settings, context) == result, "nothing is measured again"


def test_a_checkpoint_is_refused(tmp_path: Path) -> None:
    context = StudyContext("state-tracking", "tiny", tmp_path, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="drop --checkpoint"):
        state_tracking.run(SIZES["tiny"], context)


def test_a_training_ends_with_its_time(words: Runs, tmp_path: Path) -> None:
    said: list[str] = []
    context = StudyContext("times", "tiny", tmp_path, say=said.append)
    timed = Training("timed", str(words.config), {"train.steps": 10**7, "train.target_loss": "null"}, minutes=0.05)
    (trained,) = train_all([timed], context)
    assert 2.7 < trained.seconds < 60 and 0 < trained.metrics[-1]["step"] < 10**7
    assert train_all([timed], context) == [trained], "it is done"
    untimed = Training("untimed", str(words.config), {"train.steps": 10**7, "run.time_limit_minutes": 0.01})
    with pytest.raises(MachineError, match="training of untimed ended with code 75"):
        train_all([untimed], context)


@pytest.mark.acceptance
def test_a5_is_learned_in_ten_minutes(tmp_path: Path) -> None:
    settings, context = dataclasses.replace(SIZES["tiny"], seeds=(1,)), StudyContext("state-tracking", "tiny", tmp_path)
    implicit = state_tracking_parts.learn(settings, context)
    result = state_tracking_parts.compare(settings, context, implicit)
    numbers = result.numbers["A5"]
    assert numbers["implicit-seed1"]["accuracy"] >= 0.95
    assert numbers["implicit-seed1"]["seconds"] <= 600
    assert numbers["explicit-seed1"]["by_position"][-1] < 0.2
    assert numbers["explicit-seed1"]["seconds"] >= 0.9 * numbers["implicit-seed1"]["seconds"]
