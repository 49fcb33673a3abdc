"""The study of stories: what it concludes from answers, and the whole of it under --acceptance."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_implicit.config import Config, load_config
from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.studies import StudyContext, catbabi
from megatron_implicit.evaluation.studies.catbabi import EXPLICIT, IMPLICIT, SIZES
from megatron_implicit.evaluation.studies.catbabi_results import Measurements, draw_lengths, draw_tasks, tables
from megatron_implicit.evaluation.studies.training import Training
from megatron_implicit.planning.parameters import stage_parameters
from megatron_implicit.training.curriculum import Curriculum
from tests.launch.conftest import REPOSITORY, Runs


def _read(right: dict[int, int], evaluations: float) -> dict[str, Any]:
    """What a model answered of 100 questions of each of two tasks, by multiple of the training length."""
    tasks = {
        multiple: {
            "people": {"questions": 100, "right": count, "evaluations": evaluations * multiple, "unconverged": 0.0},
            "turns": {"questions": 100, "right": count - 10, "evaluations": evaluations * multiple, "unconverged": 0.5},
        }
        for multiple, count in right.items()
    }
    return {"parameters": 1000, "tasks": tasks}


def _measured(implicit: tuple[int, ...], explicit: tuple[int, ...], evaluations: float = 10.0) -> Measurements:
    measured = Measurements(12, (1, 4))
    for far in implicit:
        measured.add(IMPLICIT, _read({1: 90, 4: far}, evaluations), 60.0)
    for far in explicit:
        measured.add(EXPLICIT, _read({1: 90, 4: far}, 0.0), 90.0)
    return measured


def test_the_claim_is_confirmed_only_where_every_seed_is_above_and_evaluations_grow() -> None:
    finding = catbabi._finding(_measured((80, 70), (60, 50)))
    assert finding.startswith("Confirmed: at 4 times the training length 75.0% and 65.0% of the answers")
    assert "takes 10.0 evaluations, one 4 times as long 40.0" in finding
    assert catbabi._finding(_measured((80, 55), (60, 50))).startswith("Not confirmed")
    assert catbabi._finding(_measured((80, 70), (60, 50), evaluations=0.0)).startswith("Not confirmed")


def test_tables_and_figures_show_every_length_and_task(tmp_path: Path) -> None:
    measured = _measured((80, 70), (60, 50))
    models, by_length, by_task = tables(measured, far=4)
    assert models.rows == [[IMPLICIT, "1,000", "1.0"], [EXPLICIT, "1,000", "1.5"]]
    assert by_length.rows[1] == [
        "48 (4x)", "70.0% (65.0% to 75.0%)", "50.0% (45.0% to 55.0%)", "40.0 (25%)", "0.0 (25%)"
    ]  # fmt: skip
    assert [row[0] for row in by_task.rows] == ["people", "turns"]
    draw_lengths(measured, tmp_path / "lengths.png")
    draw_tasks(measured, tmp_path / "tasks.png")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000 < (tmp_path / "tasks.png").stat().st_size
    json.dumps(measured.numbers())


@pytest.mark.parametrize("size", SIZES)
def test_both_models_have_the_same_parameters_stories_and_recipe(size: str) -> None:
    configs = {
        name: load_config(["--config", str(REPOSITORY / f"launch/configs/{preset}.yaml"), "--model.vocab_size", "48"])
        for name, preset in SIZES[size].presets.items()
    }
    counts = [stage_parameters(c, 1, c.model.num_layers, first=True, last=True).total for c in configs.values()]
    assert max(counts) <= 1.02 * min(counts)
    implicit, explicit = configs[IMPLICIT], configs[EXPLICIT]
    assert implicit.data == explicit.data and implicit.data.story_statements == SIZES[size].statements
    assert implicit.optimizer == explicit.optimizer


def test_stages_go_on_from_one_another_and_only_the_implicit_model_unrolls() -> None:
    solvers = {}
    for name in (IMPLICIT, EXPLICIT):
        last = catbabi._training(SIZES["tiny"], name, seed=1)
        stages = [last.after.after, last.after, last]
        configs = [_config_of(training) for training in stages]
        assert stages[0].after is None and len({training.name for training in stages}) == 3
        assert [config.data.story_statements for config in configs] == [3, 8, 8]
        steps = [config.train.steps for config in configs]
        assert steps == sorted(steps) and steps[-1] == sum(
            stage.steps if name == IMPLICIT else stage.explicit_steps for stage in SIZES["tiny"].stages
        )
        assert all(len(config.curriculum) == 1 for config in configs)
        phases = [Curriculum(config).phase(0, 0).solver for config in configs]
        solvers[name] = [(solver.gradient, solver.max_iterations, solver.phantom_damping) for solver in phases]
    assert solvers[IMPLICIT] == [("unrolled", 2, 1.0), ("unrolled", 4, 1.0), ("phantom", 16, 0.8)]
    assert len(set(solvers[EXPLICIT])) == 1


def _config_of(training: Training) -> Config:
    arguments = ["--config", str(REPOSITORY / f"launch/configs/{training.config}.yaml")]
    return load_config(arguments + [f"--{key}={value}" for key, value in training.overrides.items()])


def test_a_training_with_other_settings_is_another_one() -> None:
    tiny = SIZES["tiny"]
    longer = dataclasses.replace(tiny, stages=(dataclasses.replace(tiny.stages[0], steps=1001), *tiny.stages[1:]))
    names = {catbabi._training(settings, IMPLICIT, seed).name for settings in (tiny, longer) for seed in (1, 2)}
    assert len(names) == 4


def test_the_presets_of_the_paper_have_its_recipe() -> None:
    for name in ("catbabi_implicit_mamba2", "catbabi_implicit_llama"):
        config = load_config(["--config", str(REPOSITORY / f"launch/configs/{name}.yaml")])
        assert [phase.gradient for phase in config.curriculum] == ["unrolled", None]
        first, second = config.curriculum
        assert (first.max_iterations, round(second.start * config.train.steps)) == (32, 5000)
        assert (config.train.steps, config.train.global_batch_size) == (15_000, 128)
        solver = config.solver
        assert (solver.max_iterations, solver.tolerance) == (50, 0.03)
        assert (solver.phantom_steps, solver.phantom_damping) == (6, 0.5)
        assert (config.inference.max_iterations, config.inference.tolerance) == (200, 0.03)


def test_a_model_that_never_saw_stories_is_refused(tmp_path: Path, runs: Runs) -> None:
    context = StudyContext("catbabi", "tiny", tmp_path, checkpoint=runs.folder / "whole")
    with pytest.raises(ConfigError, match="was trained on text, not on stories: give a run with data.task=stories"):
        catbabi.run(SIZES["tiny"], context)


@pytest.mark.acceptance
def test_the_study_of_the_tiny_size_confirms_the_claim_with_its_first_seed(tmp_path: Path) -> None:
    """With its second one too, docs/catbabi.md, which would take as long again."""
    context = StudyContext("catbabi", "tiny", tmp_path, workers=2)
    result = catbabi.run(dataclasses.replace(SIZES["tiny"], seeds=(1,)), context)
    assert result.finding.startswith("Confirmed"), result.finding
    assert len(result.figures) == 2 and all((context.folder / figure.file).is_file() for figure in result.figures)
