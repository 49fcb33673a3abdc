"""The parts of the state-tracking study: each trains what it needs, measures it and says what it found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional, Sequence

import numpy as np

from megatron_implicit.evaluation.studies import state_tracking_figures as draw
from megatron_implicit.evaluation.studies.state_tracking_runs import (
    Curriculum,
    Stage,
    implicit_trainings,
    timed_trainings,
)
from megatron_implicit.evaluation.studies.study import StudyContext, StudyResult, Table
from megatron_implicit.evaluation.studies.training import Trained, Training, train_all

if TYPE_CHECKING:
    from megatron_implicit.evaluation.studies.state_tracking import Settings
    from megatron_implicit.evaluation.word_problems import Measured

ENOUGH = 0.95
"""Share of all positions right with which a word problem counts as learned."""


@dataclass(frozen=True)
class Model:
    """A trained model and how to ask it."""

    training: Training
    trained: Trained
    context: StudyContext
    settings: Settings

    @property
    def seed(self) -> int:
        """Of its training."""
        return self.training.overrides["train.seed"]

    @property
    def minutes(self) -> float:
        """Of its training, from the first length on, start-up of its processes included."""
        return self.trained.seconds / 60

    def accuracy(
        self, length: int, mode: str = "simultaneous", cap: Optional[int] = None, share: Optional[float] = None
    ) -> Measured:
        """See ``measure_accuracy``; kept."""

        def measure() -> Measured:
            from megatron_implicit.api import load_pretrained
            from megatron_implicit.evaluation.word_problems import measure_accuracy

            return measure_accuracy(
                load_pretrained(self.trained.folder), length, self.settings.words, mode=mode, max_iterations=cap,
                tolerance=self.settings.tolerance, non_identity_share=share, seed=self.seed,
            )  # fmt: skip

        options = "".join(f"-{name}{value}" for name, value in (("cap", cap), ("share", share)) if value is not None)
        return self.context.once(f"{self.training.name}/{mode}-{length}{options}", measure)


def train(trainings: Sequence[Training], settings: Settings, context: StudyContext) -> list[Model]:
    """Trains them all, several at a time."""
    trained = train_all(trainings, context)
    return [Model(training, result, context, settings) for training, result in zip(trainings, trained, strict=True)]


def implicit_curriculum(settings: Settings, group: str, stages: Sequence[Stage], seed: int) -> Curriculum:
    """The implicit model on a group."""
    return Curriculum(f"{group}-implicit", settings.implicit, tuple(stages), seed, {"data.group": group})


def learn(settings: Settings, context: StudyContext) -> list[Model]:
    """The implicit models on A5, one a seed."""
    curricula = [implicit_curriculum(settings, "A5", settings.stages, seed) for seed in settings.seeds]
    return train([implicit_trainings(each, settings.warmup_steps)[-1] for each in curricula], settings, context)


def _explicit(settings: Settings, layers: int, minutes: float, seed: int) -> Training:
    overrides = {"data.group": "A5", **settings.explicit_overrides, "model.num_layers": layers}
    label = f"A5-explicit-{layers}-layers"
    curriculum = Curriculum(label, settings.explicit, settings.stages, seed, overrides)
    return timed_trainings(curriculum, minutes, settings.warmup_steps)[-1]


def time_of(models: Sequence[Model]) -> float:
    """Minutes that explicit models get: what implicit ones took on average, up to the next tenth."""
    return float(np.ceil(10 * np.mean([model.minutes for model in models])) / 10)


def compare(settings: Settings, context: StudyContext, implicit: list[Model]) -> StudyResult:
    """A5 at the length of training: implicit against explicit, every seed."""
    length = settings.stages[-1].length
    explicit = train([_explicit(settings, 1, time_of(implicit), seed) for seed in settings.seeds], settings, context)
    models = {"implicit": implicit, "explicit": explicit}
    rows, numbers = [], {}
    for kind, members in models.items():
        for model in members:
            found = model.accuracy(length)
            numbers[f"{kind}-seed{model.seed}"] = {**found, "seconds": model.trained.seconds, "steps": _steps(model)}
            rows.append([
                f"{kind}, 1 layer", str(model.seed), _percent(found["accuracy"]), _percent(found["by_position"][-1]),
                f"{model.minutes:.1f}", f"{_steps(model):,}",
            ])  # fmt: skip
    columns = ["model", "seed", "all positions", f"position {length}", "minutes", "steps"]
    table = Table(f"A5, words of {length}: share of positions right", columns, rows)
    curves = {
        kind: np.array([model.accuracy(length)["by_position"] for model in each]) for kind, each in models.items()
    }
    figure = draw.by_position(context, curves, length)
    best, worst = curves["explicit"][:, -1].max(), curves["implicit"].mean(axis=1).min()
    finding = (
        f"A5 at length {length}: the implicit layer has at least {_percent(worst)} of all positions right with every "
        f"seed, after {max(model.minutes for model in implicit):.1f} minutes at most; the explicit layer of the same "
        f"size at most {_percent(best)} at position {length} in the same time."
    )
    return StudyResult(finding, [table], [figure], {"A5": numbers})


def extrapolate(settings: Settings, context: StudyContext) -> StudyResult:
    """A5 trained on to longer words, and what is left of it beyond them."""
    longer = settings.longer
    before = learn(settings, context)
    curricula = [implicit_curriculum(settings, "A5", (*settings.stages, longer), seed) for seed in settings.seeds]
    after = train([implicit_trainings(each, settings.warmup_steps)[-1] for each in curricula], settings, context)
    rows, numbers = [], {}
    for trained_to, models in ((settings.stages[-1].length, before), (longer.length, after)):
        for model in models:
            for mode in ("simultaneous", "sequential"):
                found = [model.accuracy(length, mode, _cap(settings, length)) for length in settings.beyond]
                numbers[f"trained-to-{trained_to}-seed{model.seed}-{mode}"] = {
                    "seconds": model.trained.seconds,
                    "by_length": found,
                }
                rows.append([f"to {trained_to}", str(model.seed), mode, *(_percent(each["accuracy"]) for each in found),
                             f"{model.minutes:.1f}"])  # fmt: skip
    columns = ["trained", "seed", "evaluated", *(f"length {length}" for length in settings.beyond), "minutes"]
    table = Table("A5 beyond the length of training: share of all positions right", columns, rows)
    last = settings.beyond[-1]
    curves = {
        (trained_to, mode): np.array([m.accuracy(last, mode, _cap(settings, last))["by_position"] for m in models])
        for trained_to, models in ((settings.stages[-1].length, before), (longer.length, after))
        for mode in ("simultaneous", "sequential")
    }
    worst = min(model.accuracy(longer.length, cap=_cap(settings, longer.length))["accuracy"] for model in after)
    mean = {mode: float(curves[longer.length, mode].mean()) for mode in ("simultaneous", "sequential")}
    finding = (
        f"Trained on to length {longer.length}: at least {_percent(worst)} there; at length {last} it still has "
        f"{_percent(mean['simultaneous'])} right when solved simultaneously and {_percent(mean['sequential'])} token "
        "by token."
    )
    return StudyResult(finding, [table], [draw.beyond(context, curves)], {"beyond": numbers})


def second_group(settings: Settings, context: StudyContext) -> StudyResult:
    """S5, of twice the elements, with one seed."""
    length, seed = settings.stages[-1].length, settings.seeds[0]
    curriculum = implicit_curriculum(settings, "S5", settings.stages, seed)
    (model,) = train([implicit_trainings(curriculum, settings.warmup_steps)[-1]], settings, context)
    found = {mode: model.accuracy(length, mode) for mode in ("simultaneous", "sequential")}
    rows = [[mode, str(seed), _percent(each["accuracy"]), _percent(each["by_position"][-1]), f"{model.minutes:.1f}",
             f"{_steps(model):,}"] for mode, each in found.items()]  # fmt: skip
    columns = ["evaluated", "seed", "all positions", f"position {length}", "minutes", "steps"]
    numbers = {**found, "seconds": model.trained.seconds, "steps": _steps(model)}
    share = _percent(found["simultaneous"]["accuracy"])
    finding = f"S5 at length {length}: {share} after {model.minutes:.1f} minutes."
    return StudyResult(
        finding, [Table(f"S5, words of {length}, implicit, 1 layer", columns, rows)], [], {"S5": numbers}
    )


def vary_iterations(settings: Settings, context: StudyContext) -> StudyResult:
    """The cap on training iterations, with the phantom gradient and unrolled: an explicit stack with shared weights."""
    pairs = [(group, "phantom") for group in settings.cap_stages]
    pairs += [(group, "unrolled") for group in settings.unrolled_groups]
    keys = [(*pair, cap) for pair in pairs for cap in settings.caps]
    models = dict(zip(keys, train([_capped(settings, *key) for key in keys], settings, context), strict=True))
    rows, free, numbers = [], {}, {}
    for (group, gradient, cap), model in models.items():
        length = settings.cap_stages[group][-1].length
        found, capped = model.accuracy(length), model.accuracy(length, cap=cap + 1)
        free[group, gradient, cap] = found["accuracy"]
        numbers[f"{group}-{gradient}-{cap}"] = {
            "free": found, "capped": capped, "steps": _steps(model), "seconds": model.trained.seconds,
        }  # fmt: skip
        rows.append([f"{group}, {gradient}", str(length), str(cap), _percent(found["accuracy"]),
                     _percent(capped["accuracy"]), f"{_steps(model):,}", f"{model.minutes:.1f}"])  # fmt: skip
    columns = ["training", "length", "cap", "solved freely", "solved with the cap", "steps", "minutes"]
    table = Table("Cap on the iterations of a training solve: share of all positions right", columns, rows)
    figure = draw.by_cap(context, dict(zip(models, numbers.values(), strict=True)), settings.caps)
    return StudyResult(_cap_finding(settings, free), [table], [figure], {"caps": numbers})


def _capped(settings: Settings, group: str, gradient: str, cap: int) -> Training:
    stages = [replace(stage, max_iterations=cap) for stage in settings.cap_stages[group]]
    curriculum = implicit_curriculum(settings, group, stages, settings.seeds[0])
    if gradient == "unrolled":
        overrides = {**curriculum.overrides, "solver.gradient": gradient}
        curriculum = replace(curriculum, label=f"{group}-unrolled", overrides=overrides)
    curriculum = replace(curriculum, label=f"{curriculum.label}-cap{cap}")
    return implicit_trainings(curriculum, settings.warmup_steps)[-1]


def _cap_finding(settings: Settings, free: dict[tuple[str, str, int], float]) -> str:
    said = []
    for group in settings.cap_stages:
        enough = [cap for cap in settings.caps if free[group, "phantom", cap] >= ENOUGH]
        at_eight = free.get((group, "phantom", 8))
        verdict = (
            ""
            if at_eight is None
            else f", {_percent(at_eight)} with 8 ({'confirmed' if at_eight >= ENOUGH else 'refuted'})"
        )
        least = f"{min(enough)} iterations suffice" if enough else "no cap suffices"
        said.append(f"{group}: {least}{verdict}")
    return f"That 8 iterations suffice to learn: {'; '.join(said)}."


def vary_layers(settings: Settings, context: StudyContext, implicit: list[Model]) -> StudyResult:
    """Deeper explicit models in the time of the implicit one: how many layers A5 takes."""
    length, minutes, seed = settings.stages[-1].length, time_of(implicit), settings.seeds[0]
    depths = (1, *settings.layers)
    trainings = [_explicit(settings, layers, minutes, seed) for layers in depths]
    explicit = dict(zip(depths, train(trainings, settings, context), strict=True))
    found = {layers: model.accuracy(length) for layers, model in explicit.items()}
    rows = [
        [f"explicit, {layers} layers", _percent(each["accuracy"]), _percent(each["by_position"][-1]),
         f"{explicit[layers].minutes:.1f}", f"{_steps(explicit[layers]):,}"]
        for layers, each in found.items()
    ]  # fmt: skip
    own = implicit[0].accuracy(length)
    rows.insert(0, ["implicit, 1 layer", _percent(own["accuracy"]), _percent(own["by_position"][-1]),
                    f"{implicit[0].minutes:.1f}", f"{_steps(implicit[0]):,}"])  # fmt: skip
    table = Table(
        f"A5, words of {length}, by layers, seed {seed}",
        ["model", "all positions", f"position {length}", "minutes", "steps"],
        rows,
    )
    enough = [layers for layers, each in found.items() if each["accuracy"] >= ENOUGH]
    need = f"{min(enough)} layers" if enough else f"more than {max(found)} layers or more time"
    figure = draw.by_layers(
        context, {layers: each["by_position"] for layers, each in found.items()}, own["by_position"]
    )
    finding = (
        f"An explicit model needs {need} for {_percent(ENOUGH)} of A5 at length {length} in {minutes:.1f} minutes."
    )
    return StudyResult(finding, [table], [figure], {"layers": {str(layers): each for layers, each in found.items()}})


def vary_share(settings: Settings, context: StudyContext) -> StudyResult:
    """Words with fewer elements other than the identity, of a model that was trained with all of them."""
    stages, length = (*settings.stages, settings.longer), settings.beyond[-1]
    curriculum = implicit_curriculum(settings, "A5", stages, settings.seeds[0])
    (model,) = train([implicit_trainings(curriculum, settings.warmup_steps)[-1]], settings, context)
    found = {share: model.accuracy(length, cap=_cap(settings, length), share=share) for share in settings.shares}
    rows = [[f"{share:g}", _percent(each["accuracy"]), _percent(each["by_position"][-1]), f"{each['evaluations']:.0f}"]
            for share, each in found.items()]  # fmt: skip
    columns = ["share of non-identity elements", "all positions", f"position {length}", "evaluations"]
    table = Table(f"A5, words of {length}, by the share that is drawn (trained with 1)", columns, rows)
    least = min(settings.shares)
    finding = (
        f"With a share of {least:g} elements other than the identity {_percent(found[least]['accuracy'])} are right at "
        f"length {length}, in {found[least]['evaluations']:.0f} evaluations."
    )
    return StudyResult(finding, [table], [], {"shares": {f"{share:g}": each for share, each in found.items()}})


def _cap(settings: Settings, length: int) -> int:
    """Iterations of an evaluation: information may need one for every token."""
    return max(2 * length, 128)


def _steps(model: Model) -> int:
    return model.trained.metrics[-1]["step"]


def _percent(share: Any) -> str:
    return f"{100 * share:.1f}%"
