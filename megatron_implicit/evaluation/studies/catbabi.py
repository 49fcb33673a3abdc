"""CatbAbI: answers to questions about stories, and the iterations they take, by the length of the story.

Source: arXiv 2502.07827, whose recipe for CatbAbI the presets of the paper's size follow. Models are trained on short
stories and read longer ones; a story is read alone, from its beginning, and every question in it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.studies.catbabi_results import Measurements, draw_lengths, draw_tasks, tables
from megatron_implicit.evaluation.studies.study import Figure, StudyContext, StudyResult
from megatron_implicit.evaluation.studies.training import Training, train_all, training_mark

TITLE = "CatbAbI: questions about stories"
CLAIM = (
    "An implicit model answers questions about stories longer than those it was trained on better than an explicit "
    "model of its size, and takes more iterations the longer they are."
)
IMPLICIT, EXPLICIT, CHECKPOINT = "implicit Mamba2", "explicit Mamba2", "the checkpoint"
FAR = 4
"""The multiple of the training length that decides the claim."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training; each goes on from the one before it."""

    name: str
    """Of its run's folder."""
    steps: int
    """Of this stretch, for the implicit model."""
    explicit_steps: int
    """For the explicit one."""
    overrides: dict[str, Any]
    """Of both presets."""
    implicit_overrides: dict[str, Any] = field(default_factory=dict)
    """Of the implicit model's preset alone."""


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    presets: dict[str, str]
    """Of launch/configs/, by the name of the model."""
    stages: tuple[Stage, ...]
    """Of both models."""
    statements: int
    """Of the longest story in training, as the presets have it."""
    seeds: tuple[int, ...]
    """Of training."""
    multiples: tuple[int, ...] = (1, 2, FAR, 10)
    """Statements of the stories read, as multiples of that."""
    stories: int = 100
    """Read of each task and length."""
    threads: int = 2
    """Of the measurement on a CPU."""


_NO_CURRICULUM = {"curriculum": "[]"}
"""The preset's own is for a training in one stretch."""
_CONSTANT = {"schedule.decay_fraction": 0}
_SHORT = {"data.story_statements": 3, "data.sequence_length": 32}


def _unrolled(iterations: int) -> dict[str, Any]:
    """All iterations, undamped, carry the gradient."""
    gradient = {"solver.gradient": "unrolled", "solver.max_iterations": iterations, "solver.phantom_damping": 1.0}
    return _NO_CURRICULUM | gradient


SIZES = {
    "tiny": Settings(
        presets={IMPLICIT: "catbabi_implicit_mamba2_tiny", EXPLICIT: "catbabi_explicit_mamba2_tiny"},
        stages=(
            Stage("short", 1000, 1800, {**_SHORT, **_CONSTANT}, _unrolled(2)),
            Stage("whole", 600, 2000, _CONSTANT, _unrolled(4)),
            Stage("solved", 800, 2400, {"schedule.decay_fraction": 0.15}, _NO_CURRICULUM),
        ),
        statements=8,
        seeds=(1, 2),
    ),
    "paper": Settings(
        presets={IMPLICIT: "catbabi_implicit_mamba2", EXPLICIT: "catbabi_explicit_mamba2"},
        stages=(Stage("whole", 15_000, 15_000, {}),),
        statements=48,
        seeds=(1, 2, 3),
        stories=500,
    ),
}


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Trains the models, or takes the given one, and lets them read.

    Raises:
        ConfigError: a checkpoint that was not trained on stories.
        MachineError: a training failed.
    """
    measured = _measure_checkpoint(settings, context) if context.checkpoint else _measure_trained(settings, context)
    draw_lengths(measured, context.folder / "lengths.png")
    draw_tasks(measured, context.folder / "tasks.png")
    return StudyResult(
        _finding(measured),
        tables(measured, FAR),
        [
            Figure("lengths.png", "Right answers and evaluations of F by statements of a story; shaded: all seeds."),
            Figure("tasks.png", "Right answers by task, at the training length and beyond it."),
        ],
        measured.numbers(),
    )


def _measure_trained(settings: Settings, context: StudyContext) -> Measurements:
    trainings = {(name, seed): _training(settings, name, seed) for seed in settings.seeds for name in settings.presets}
    trained = dict(zip(trainings, train_all(list(trainings.values()), context)))
    measured = Measurements(settings.statements, settings.multiples)
    for (name, seed), run in trained.items():
        measured.add(name, _read(run.folder, f"{name}-{seed}".replace(" ", "-"), settings, context), run.seconds)
    return measured


def _training(settings: Settings, name: str, seed: int) -> Training:
    """The last stage's, which has the others before it."""
    preset, before, steps = settings.presets[name], None, 0
    for stage in settings.stages:
        steps += stage.steps if name == IMPLICIT else stage.explicit_steps
        overrides = {"train.seed": seed, "train.steps": steps, **stage.overrides}
        if name == IMPLICIT:
            overrides |= stage.implicit_overrides
        mark = training_mark(preset, overrides, before.name if before else "")
        before = Training(f"catbabi/{preset}-seed{seed}-{stage.name}-{mark}", preset, overrides, after=before)
    return before


def _measure_checkpoint(settings: Settings, context: StudyContext) -> Measurements:
    measured = Measurements(settings.statements, settings.multiples)
    measured.add(CHECKPOINT, _read(context.checkpoint, "checkpoint", settings, context))
    return measured


def _read(folder: Any, name: str, settings: Settings, context: StudyContext) -> dict[str, Any]:
    """Parameters of a model, and by multiple and task what it answered; each multiple is kept."""
    lm: list[Any] = []  # loaded once, and only where something is left to measure

    def measure(multiple: int) -> dict[str, Any]:
        if not lm:
            lm.append(_load(folder, settings.threads))
        return {
            "parameters": sum(parameter.numel() for parameter in lm[0].parameters()),
            "tasks": _answer(lm[0], multiple, settings),
        }

    found = {}
    for multiple in settings.multiples:
        found[multiple] = context.once(f"{name}-x{multiple}", lambda: measure(multiple))
        context.say(f"{name} has read stories of {multiple * settings.statements} statements")
    return {
        "parameters": found[settings.multiples[0]]["parameters"],
        "tasks": {multiple: values["tasks"] for multiple, values in found.items()},
    }


def _load(folder: Any, threads: int) -> Any:
    import torch

    from megatron_implicit.api import load_pretrained

    torch.set_num_threads(threads)
    lm = load_pretrained(folder)
    if lm.config.data.task != "stories":
        raise ConfigError(
            f"{folder} was trained on {lm.config.data.task}, not on stories: give a run with data.task=stories"
        )
    return lm


def _answer(lm: Any, multiple: int, settings: Settings) -> dict[str, dict[str, float]]:
    """By task: questions, right answers, mean evaluations a story, share of stories that did not converge."""
    from megatron_implicit.data.tasks import open_task
    from megatron_implicit.evaluation.answers import answer_stories

    task, found = open_task(lm.config.data), {}
    for name in task.tasks:
        stories = task.tell(name, multiple * settings.statements, settings.stories)
        if not stories:
            continue
        answers = answer_stories(lm, stories, task.vocabulary)
        found[name] = {
            "questions": sum(len(answer.right) for answer in answers),
            "right": sum(sum(answer.right) for answer in answers),
            "evaluations": sum(answer.evaluations for answer in answers) / len(answers),
            "unconverged": sum(not answer.converged for answer in answers) / len(answers),
        }
    return found


def _finding(measured: Measurements) -> str:
    if IMPLICIT not in measured.names:
        return " ".join(measured.sentence(name) for name in measured.names)
    ahead, behind = (measured.accuracies(name, FAR) for name in (IMPLICIT, EXPLICIT))
    first, last = (measured.evaluations(IMPLICIT, multiple) for multiple in (1, FAR))
    above, grows = min(ahead) > max(behind), last > first
    return (
        f"{'Confirmed' if above and grows else 'Not confirmed'}: at {FAR} times the training length "
        f"{_shares(ahead)} of the answers of the implicit models are right and {_shares(behind)} of the explicit ones' "
        f"({'every' if above else 'not every'} implicit seed above every explicit one); a story of the training length "
        f"takes {first:.1f} evaluations, one {FAR} times as long {last:.1f}."
    )


def _shares(values: list[float]) -> str:
    return " and ".join(f"{value:.1%}" for value in values)
