"""One model, solved simultaneously, in chunks and token by token: the same function, at different cost.

Compared is what *converged* solves give, so the solves here stop by token (``residual_norm="token"``): a norm over all
tokens solved together would let single tokens stay far behind in simultaneous mode, which sequential mode cannot, and
one tolerance would mean different things. The damping is smaller than in training, since a few tokens of trained
models have eigenvalues of dF/dz that a larger step does not settle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.api import PretrainedModel
from megatron_implicit.evaluation.studies.figures import FAMILY_COLOURS, drawing
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

TITLE = "Duality of the modes"
CLAIM = "An implicit model is the same function evaluated in parallel over a sequence and as an RNN, token by token."
LOGIT_BAR, PERPLEXITY_BAR = 1e-3, 1e-3
"""Largest difference of a logit; largest relative difference of perplexities."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: LanguageModels
    sequences: int
    tokens: Optional[int]
    """Of a sequence; None takes the training length."""
    chunks: tuple[int, ...]
    """Tokens solved together, from few to many; 1 is sequential mode."""
    tolerance: float = 1e-5
    """Relative residual, by token, at which the modes are compared."""
    damping: float = 0.5
    max_iterations: int = 400


SIZES = {
    "tiny": Settings(TINY, sequences=8, tokens=None, chunks=(1, 4, 16, 64)),
    "paper": Settings(PAPER, sequences=8, tokens=512, chunks=(1, 16, 128)),
}


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Compares the modes of the implicit models, or of the user's."""
    measured = {}
    for family, lm in open_models(settings.models, context, IMPLICIT).items():
        measured[family] = context.once(family, lambda lm=lm: measure(lm, _rows(lm, settings), settings))
        context.say(f"{NAMES[family]}: compared {len(settings.chunks) + 1} modes")
    _draw(measured, settings, context)
    return StudyResult(
        _finding(measured, settings),
        [_table(measured, settings)],
        [Figure("modes.png", "By tokens solved together: the largest difference of a logit from the simultaneous "
                             f"solve (tolerance {settings.tolerance:g}; the line is the bar), and evaluations of F a "
                             "token, at that tolerance (solid) and at the model's own (dashed)")],
        measured,
    )  # fmt: skip


@torch.no_grad()
def measure(lm: PretrainedModel, rows: Tensor, settings: Settings) -> dict[str, Any]:
    """Every mode's perplexity, evaluations a token and largest logit difference from the simultaneous solve.

    Args:
        lm: an implicit model in eval mode.
        rows: [b, s + 1] tokens and the last one's label.
        settings: modes, tolerance and damping.
    """
    tight = {"tolerance": settings.tolerance, "damping": settings.damping, "max_iterations": settings.max_iterations}
    own, modes, reference = {}, {}, None
    for chunk in (None, *settings.chunks):
        name, mode = _named(chunk)
        out = lm(rows[:, :-1], residual_norm="token", **mode, **tight)
        reference = out.logits if reference is None else reference
        modes[name] = {
            "perplexity": _perplexity(out.logits, rows),
            "logit_difference": float((out.logits - reference).abs().max()),
            "evaluations": float(out.trace.evaluations.double().mean()),
            "unconverged": float((~out.trace.converged).double().mean()),
        }
        out = lm(rows[:, :-1], residual_norm="token", **mode)
        own[name] = {
            "perplexity": _perplexity(out.logits, rows),
            "evaluations": float(out.trace.evaluations.double().mean()),
        }
    return {
        "tokens": rows.shape[1] - 1, "sequences": len(rows), "largest_logit": float(reference.abs().max()),
        "own_tolerance": lm.config.inference.tolerance, "modes": modes, "own": own,
    }  # fmt: skip


def _named(chunk: Optional[int]) -> tuple[str, dict[str, Any]]:
    if chunk is None:
        return "simultaneous", {"mode": "simultaneous"}
    if chunk == 1:
        return "sequential", {"mode": "sequential"}
    return f"chunks of {chunk}", {"mode": "chunked", "chunk_size": chunk}


def _rows(lm: PretrainedModel, settings: Settings) -> Tensor:
    return held_out_text(lm, settings.tokens or lm.config.data.sequence_length, settings.sequences)


def _perplexity(logits: Tensor, rows: Tensor) -> float:
    labels = rows[:, 1:].to(logits.device)
    return float(F.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).exp())


def _finding(measured: dict[str, Any], settings: Settings) -> str:
    parts, met = [], {}
    for family, values in measured.items():
        logit, perplexity = differences(values)
        met[family] = logit <= LOGIT_BAR and perplexity <= PERPLEXITY_BAR
        parts.append(f"{NAMES[family]} {logit:.1e} and {perplexity:.4%}")
    return (
        f"Largest differences between the modes at tolerance {settings.tolerance:g}, of a logit and of the perplexity: "
        f"{'; '.join(parts)} (bars: {LOGIT_BAR:g} and {PERPLEXITY_BAR:.1%}). That the modes are one function: "
        f"{verdict(met)}."
    )


def differences(values: dict[str, Any]) -> tuple[float, float]:
    """(largest logit difference, largest relative difference of perplexities) over the modes of a model."""
    modes = values["modes"].values()
    perplexities = [mode["perplexity"] for mode in modes]
    return max(mode["logit_difference"] for mode in modes), max(perplexities) / min(perplexities) - 1


def _table(measured: dict[str, Any], settings: Settings) -> Table:
    rows = []
    for family, values in measured.items():
        for name, mode in values["modes"].items():
            own = values["own"][name]
            rows.append([
                f"{NAMES[family]}, {name}", f"{mode['perplexity']:.4f}", f"{mode['logit_difference']:.1e}",
                f"{mode['evaluations']:.1f}", f"{own['perplexity']:.3f}", f"{own['evaluations']:.1f}",
            ])  # fmt: skip
    columns = ["model, mode", "perplexity", "logits", "evaluations", "perplexity (own)", "evaluations (own)"]
    title = (
        f"Perplexity, largest logit difference and evaluations a token at tolerance {settings.tolerance:g}, and at the "
        "models' own"
    )
    return Table(title, columns, rows)


def _draw(measured: dict[str, Any], settings: Settings, context: StudyContext) -> None:
    names = [_named(chunk)[0] for chunk in settings.chunks] + ["simultaneous"]
    ticks, x = ["1", *map(str, settings.chunks[1:]), "all"], np.arange(len(names))
    with drawing(context.folder / "modes.png", panels=2, height=3.6) as (left, right):
        for family, values in measured.items():
            colour = FAMILY_COLOURS[family]
            gaps = [values["modes"][name]["logit_difference"] for name in names[:-1]]
            left.plot(x[:-1], gaps, color=colour, marker="o", label=NAMES[family])
            for key, dash in (("modes", "-"), ("own", "--")):
                counts = [values[key][name]["evaluations"] for name in names]
                right.plot(x, counts, dash, color=colour, marker="o")
        left.axhline(LOGIT_BAR, color="#6B6B6B", linestyle=":", linewidth=1.2)
        left.annotate("bar", (0, LOGIT_BAR), (0, 3), textcoords="offset points", color="#6B6B6B", fontsize=9.5)
        low, high = left.get_ylim()
        left.set(yscale="log", title="largest logit difference", xlabel="tokens solved together")
        left.set_ylim(min(LOGIT_BAR / 100, max(low, LOGIT_BAR / 1000)), max(3 * LOGIT_BAR, high))
        left.set_xticks(x[:-1], ticks[:-1])
        left.legend(loc="lower left")
        right.set(title="evaluations of F a token", xlabel="tokens solved together", ylim=(0, None))
        right.set_xticks(x, ticks)

