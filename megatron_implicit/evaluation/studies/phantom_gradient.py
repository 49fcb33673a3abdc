"""How good the phantom gradient is: against the exact implicit gradient, by number of steps and damping, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_implicit.api import PretrainedModel
from megatron_implicit.evaluation.implicit_gradient import (
    GradientProblem,
    exact_gradient,
    phantom_gradients,
    unsolved,
)
from megatron_implicit.evaluation.open_model import OpenModel
from megatron_implicit.evaluation.studies.figures import COLOURS, drawing
from megatron_implicit.evaluation.studies.language_models import (
    IMPLICIT,
    NAMES,
    PAPER,
    TINY,
    LanguageModels,
    held_out_text,
    open_models,
    verdict,
)
from megatron_implicit.evaluation.studies.study import Figure, StudyContext, StudyResult, Table

TITLE = "Phantom-gradient quality"
CLAIM = "A few phantom steps point along the exact gradient of the fixed point; the more, the closer."


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: LanguageModels
    sequences: int
    tokens: int
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    dampings: tuple[float, ...] = (1.0, 0.8, 0.5)
    bounded: int = 4
    """Evaluations of the solve that does not converge, as in the bounded phase of training."""
    solver_damping: float = 0.5
    """Of the solves that do: of the fixed point and of the exact gradient."""


SIZES = {"tiny": Settings(TINY, sequences=4, tokens=64), "paper": Settings(PAPER, sequences=1, tokens=256)}
TRAINED = 0.8
"""Damping of the phantom steps in the presets."""


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Measures the implicit models, or the user's."""
    measured = {}
    for family, lm in open_models(settings.models, context, IMPLICIT).items():
        measured[family] = context.once(family, lambda lm=lm: _measure(lm, settings))
        context.say(f"{NAMES[family]}: {len(settings.steps) * len(settings.dampings) * 2} gradients")
    _draw(measured, settings, context)
    return StudyResult(
        _finding(measured, settings),
        [_table(measured, settings)],
        [Figure("cosine.png", "Cosine to the exact implicit gradient by phantom steps: from the fixed point (solid) "
                              f"and from {settings.bounded} evaluations, as in the bounded phase (dashed)")],
        measured,
    )  # fmt: skip


def _measure(lm: PretrainedModel, settings: Settings) -> dict[str, Any]:
    rows = held_out_text(lm, settings.tokens, settings.sequences)
    problem = GradientProblem(OpenModel(lm, settings.solver_damping), rows)
    return measure(problem, settings)


def measure(problem: GradientProblem, settings: Settings) -> dict[str, Any]:
    """Cosine and relative norm of every phantom gradient: by start ("fixed point", "bounded"), damping and steps."""
    solved = problem.solve()
    exact = exact_gradient(problem, solved)
    found: dict[str, Any] = {"exact_norm": float(exact.norm())}
    for name, start in (("fixed point", solved), ("bounded", unsolved(problem, settings.bounded))):
        found[name] = {}
        for damping in settings.dampings:
            gradients = phantom_gradients(problem, start, settings.steps, damping)
            found[name][f"{damping:g}"] = {
                "cosine": [float(g @ exact / (g.norm() * exact.norm())) for g in gradients.values()],
                "norm": [float(g.norm() / exact.norm()) for g in gradients.values()],
            }
    return found


def _finding(measured: dict[str, Any], settings: Settings) -> str:
    parts, met, most = [], {}, settings.steps[-1]
    for family, values in measured.items():
        solved, bounded = (
            dict(zip(settings.steps, values[start][f"{TRAINED:g}"]["cosine"])) for start in ("fixed point", "bounded")
        )
        rising = list(solved.values()) == sorted(solved.values())
        met[family] = solved[4] > 0.8 and solved[most] > 0.95 and rising
        parts.append(
            f"{NAMES[family]} {solved[1]:.2f}, {solved[4]:.2f} and {solved[most]:.3f} after 1, 4 and {most} steps from "
            f"the fixed point, {bounded[1]:.2f} for the bounded phase's {settings.bounded}+1"
        )
    return f"Cosine to the exact gradient at damping {TRAINED:g}: {'; '.join(parts)}. The claim: {verdict(met)}."


def _table(measured: dict[str, Any], settings: Settings) -> Table:
    rows = []
    for family, values in measured.items():
        for start in ("fixed point", "bounded"):
            for damping, found in values[start].items():
                cells = [f"{cosine:.3f} ({norm:.2f})" for cosine, norm in zip(found["cosine"], found["norm"])]
                rows.append([f"{NAMES[family]}, {_start(start, settings)}, {damping}", *cells])
    columns = ["model, start, damping", *(f"{count} step{'s' * (count > 1)}" for count in settings.steps)]
    return Table("Cosine to the exact gradient (and norm, by its norm)", columns, rows)


def _start(name: str, settings: Settings) -> str:
    return name if name == "fixed point" else f"{settings.bounded} evaluations"


def _draw(measured: dict[str, Any], settings: Settings, context: StudyContext) -> None:
    with drawing(context.folder / "cosine.png", panels=len(measured), height=3.8) as panels:
        lowest = 1.0
        for axes, (family, values) in zip(panels, measured.items()):
            for start, dash in (("fixed point", "-"), ("bounded", "--")):
                for (damping, found), colour in zip(values[start].items(), COLOURS):
                    style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": dash}
                    label = f"damping {damping}" if start == "fixed point" else None
                    axes.plot(settings.steps, found["cosine"], label=label, **style)
                    lowest = min(lowest, *found["cosine"])
            axes.set(title=NAMES[family], xlabel="phantom steps", xscale="log")
            axes.set_xticks(settings.steps, [str(count) for count in settings.steps])
            axes.minorticks_off()
        for axes in panels:
            axes.set_ylim(max(0.0, lowest - 0.05), 1.01)
        panels[0].set_ylabel("cosine to the exact gradient")
        panels[0].legend(loc="lower right")
