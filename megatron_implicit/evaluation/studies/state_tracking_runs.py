"""What the state-tracking study trains: curricula over the length of the words, each going on from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

from megatron_implicit.evaluation.studies.training import Training, training_mark


@dataclass(frozen=True)
class Stage:
    """A stretch of a curriculum."""

    length: int
    """Elements of a word."""
    steps: int
    """Most steps of this stage."""
    target_loss: float
    """Held-out loss (nats a token) that ends it earlier."""
    max_iterations: int
    """Of the training solve."""
    learning_rate: Optional[float] = None
    """None takes the preset's."""
    inference_tolerance: Optional[float] = None
    """Of the held-out loss's solves; None takes the preset's."""


@dataclass(frozen=True)
class Curriculum:
    """A model and the words it is trained on."""

    label: str
    """Folder of its runs, below state-tracking/; it need not be unique."""
    config: str
    """A preset of launch/configs/."""
    stages: tuple[Stage, ...]
    seed: int
    overrides: Mapping[str, Any]
    """Of all stages."""


def implicit_trainings(curriculum: Curriculum, warmup_steps: int) -> list[Training]:
    """The trainings of an implicit model's stages, in order; a stage ends at its target or with its steps."""
    trainings: list[Training] = []
    steps = 0
    for stage in curriculum.stages:
        steps += stage.steps
        values = {
            "train.steps": steps,
            "train.target_loss": stage.target_loss,
            "solver.max_iterations": stage.max_iterations,
            "schedule.warmup_fraction": round(warmup_steps / steps, 6),
        }
        changes = {"optimizer.learning_rate": stage.learning_rate, "inference.tolerance": stage.inference_tolerance}
        values |= {key: value for key, value in changes.items() if value is not None}
        trainings.append(_training(curriculum, stage.length, values, None, trainings))
    return trainings


def timed_trainings(curriculum: Curriculum, minutes: float, warmup_steps: int) -> list[Training]:
    """The trainings of an explicit model in a given time: half of it at the last length, the rest shared by the others.

    A stage that reaches its target ends before its time, which no other stage gets.
    """
    trainings: list[Training] = []
    lengths = [stage.length for stage in curriculum.stages]
    shares = [0.5 / (len(lengths) - 1)] * (len(lengths) - 1) + [0.5] if len(lengths) > 1 else [1.0]
    for stage, share in zip(curriculum.stages, shares):
        values = {"train.steps": MANY_STEPS, "train.target_loss": stage.target_loss,
                  "schedule.warmup_fraction": round(warmup_steps / MANY_STEPS, 8)}  # fmt: skip
        trainings.append(_training(curriculum, stage.length, values, round(share * minutes, 2), trainings))
    return trainings


MANY_STEPS = 10_000_000
"""Of a run that ends with its time."""


def _training(
    curriculum: Curriculum, length: int, values: dict[str, Any], minutes: Optional[float], before: Sequence[Training]
) -> Training:
    overrides = {**curriculum.overrides, "train.seed": curriculum.seed, "data.sequence_length": length, **values}
    after = before[-1] if before else None
    mark = training_mark(curriculum.config, overrides, minutes, after.name if after else "")
    name = f"state-tracking/{curriculum.label}-seed{curriculum.seed}/length{length}-{mark}"
    return Training(name, curriculum.config, overrides, after, minutes)
