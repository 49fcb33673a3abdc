"""State tracking: word problems in groups, which one layer learns when it is iterated and not when it is run once.

Source: section 4.1 of arXiv 2502.07827. Every model is trained on short words first and goes on to longer ones;
explicit models get the wall-clock time that the implicit model took, start-up included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.studies import state_tracking_parts as parts
from megatron_implicit.evaluation.studies.state_tracking_runs import Stage
from megatron_implicit.evaluation.studies.study import StudyContext, StudyResult

TITLE = "State tracking: word problems"
CLAIM = (
    "One layer of Mamba2, iterated to a fixed point, learns the word problem of A5 and S5 and goes on to longer words; "
    "the same layer run once does not, and few iterations while training suffice."
)


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    implicit: str
    """Preset of the implicit model."""
    explicit: str
    """Preset of the explicit model of the same size."""
    explicit_overrides: dict[str, Any]
    """What makes it one of the same size, where the preset is the implicit one's."""
    seeds: tuple[int, ...]
    """Of A5; every other part takes the first."""
    stages: tuple[Stage, ...]
    """Lengths A5 and S5 are learned with."""
    longer: Stage
    """The length that A5 is trained on to."""
    beyond: tuple[int, ...]
    """Lengths of evaluation after that."""
    caps: tuple[int, ...]
    """Most iterations of a training solve."""
    cap_stages: dict[str, tuple[Stage, ...]]
    """Lengths and steps of the trainings that differ by that cap, by group."""
    unrolled_groups: tuple[str, ...]
    """Groups of those that are trained with all iterations unrolled, too."""
    layers: tuple[int, ...]
    """Of the deeper explicit models."""
    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """Of non-identity elements in evaluation."""
    tolerance: float = 0.01
    """Of the solves of evaluation: a residual is a mean over the whole word, whose last element converges last."""
    words: int = 256
    """Test words of a measurement."""
    warmup_steps: int = 100
    """Of the learning rate, of implicit models."""


SIZES = {
    "tiny": Settings(
        implicit="state_tracking_a5_tiny",
        explicit="state_tracking_a5_explicit_tiny",
        explicit_overrides={},
        seeds=(1, 2, 3),
        stages=(Stage(4, 3000, 0.1, 16), Stage(8, 1500, 0.1, 16), Stage(16, 2000, 0.06, 16)),
        longer=Stage(32, 1500, 0.1, 64, learning_rate=1e-3, inference_tolerance=0.01),
        beyond=(32, 64, 128),
        caps=(2, 4, 8, 16, 32),
        cap_stages={"S3": (Stage(8, 600, 0.02, 16),), "A5": (Stage(4, 1500, 0.1, 16), Stage(8, 700, 0.1, 16))},
        unrolled_groups=("S3",),
        layers=(2, 4, 16),
    ),
    "paper": Settings(
        implicit="state_tracking_a5",
        explicit="state_tracking_a5",
        explicit_overrides={"model.family": "explicit_mamba2", "model.expand": 7},
        seeds=(1, 2, 3),
        stages=(Stage(16, 10_000, 0.05, 32), Stage(64, 10_000, 0.05, 32), Stage(256, 30_000, 0.05, 32)),
        longer=Stage(512, 10_000, 0.05, 32),
        beyond=(512, 1024, 2048),
        caps=(2, 4, 8, 16, 32),
        cap_stages={"A5": (Stage(16, 10_000, 0.05, 32), Stage(64, 10_000, 0.05, 32))},
        unrolled_groups=("A5",),
        layers=(2, 4, 8, 16),
        warmup_steps=500,
    ),
}


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Trains and measures; the part that decides the claim comes first.

    Raises:
        ConfigError: a checkpoint was given.
        MachineError: a training failed.
    """
    if context.checkpoint is not None:
        raise ConfigError("state-tracking trains models of its own and measures no others: drop --checkpoint")
    learned = parts.learn(settings, context)
    found = [
        parts.compare(settings, context, learned),
        parts.extrapolate(settings, context),
        parts.second_group(settings, context),
        parts.vary_iterations(settings, context),
        parts.vary_layers(settings, context, learned),
        parts.vary_share(settings, context),
    ]
    return StudyResult(
        " ".join(part.finding for part in found),
        [table for part in found for table in part.tables],
        [figure for part in found for figure in part.figures],
        {name: value for part in found for name, value in part.numbers.items()},
    )
