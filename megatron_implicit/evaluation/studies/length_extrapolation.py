"""Perplexity by token position, beyond the length that the models were trained at.

Texts differ, so the same tokens are compared with themselves: read behind all of the text before them, and with the
text cut at the training length. A model that keeps its perplexity loses nothing by reading on; both sides see at
least the larger part of a training length before each token that is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.api import PretrainedModel
from megatron_implicit.evaluation.studies.figures import FAMILY_COLOURS, drawing
from megatron_implicit.evaluation.studies.language_models import (
    NAMES,
    PAPER,
    TINY,
    LanguageModels,
    held_out_text,
    open_models,
    verdict,
)
from megatron_implicit.evaluation.studies.study import Figure, StudyContext, StudyResult, Table

TITLE = "Length extrapolation"
CLAIM = "Implicit models keep their perplexity at positions beyond the length they were trained at."


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: LanguageModels
    factor: int
    """Length of the held-out sequences by that of the training's."""
    sequences: int
    """Most held-out sequences."""
    bins_per_length: int
    """Bins of positions within one training length; the last of each is compared with and without earlier text."""
    batch: int
    """Sequences at a time."""
    holds: float = 1.02
    """Perplexity behind all text by that of cut text, up to which a model is said to keep it."""


SIZES = {
    "tiny": Settings(TINY, factor=4, sequences=80, bins_per_length=4, batch=16),
    "paper": Settings(PAPER, factor=4, sequences=512, bins_per_length=8, batch=4),
}


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Measures all four families, or the user's model."""
    models = open_models(settings.models, context)
    measured = {}
    for family, lm in models.items():
        measured[family] = context.once(family, lambda lm=lm: _measure(lm, settings))
        context.say(f"{NAMES[family]}: measured on {measured[family]['sequences']} sequences")
    _draw(measured, settings, context)
    return StudyResult(
        _finding(measured, settings),
        [_table(measured, settings)],
        [Figure("positions.png", "Held-out perplexity by position; and what reading on costs: perplexity of the same "
                                 "tokens behind all of the text, by that behind text cut at the training length (bars "
                                 "are two standard errors over sequences)")],
        measured,
    )  # fmt: skip


@torch.no_grad()
def token_losses(lm: PretrainedModel, rows: Tensor, batch: int, **options: Any) -> Tensor:
    """Cross-entropy of every token but the first, [n, s], of rows [n, s + 1]; options as of a call of the model."""
    losses = []
    for part in rows.split(batch):
        logits = lm(part[:, :-1], **options).logits
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:].to(logits.device), reduction="none").cpu())
    return torch.cat(losses)


def binned_perplexity(losses: Tensor, width: int) -> list[float]:
    """exp of the mean loss in bins of ``width`` positions, of losses [n, s] with s a multiple of it."""
    return losses.double().unflatten(1, (-1, width)).mean(dim=(0, 2)).exp().tolist()


def cut(rows: Tensor, length: int) -> Tensor:
    """Rows [n, k * length + 1] as k times as many texts [k * n, length + 1] that begin anew."""
    return rows.unfold(1, length + 1, length).flatten(0, 1)


def cost_of_reading_on(whole: Tensor, restarted: Tensor, width: int) -> dict[str, list[float]]:
    """Perplexity of the last ``width`` tokens of each training length, behind all text by that behind cut text.

    Args:
        whole, restarted: [n, k, length] losses of the same tokens.

    Returns:
        ratio [k], error [k] (its standard error over sequences), and over all lengths but the first: overall [2], the
        ratio and its error.
    """
    difference = (whole - restarted)[:, :, -width:].double().mean(dim=2)
    beyond = difference[:, 1:].mean(dim=1)

    def ratio(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean(dim=0).exp()
        return mean, mean * values.std(dim=0) / len(values) ** 0.5

    ratios, errors = ratio(difference)
    return {"ratio": ratios.tolist(), "error": errors.tolist(), "overall": [float(part) for part in ratio(beyond)]}


def _measure(lm: PretrainedModel, settings: Settings) -> dict[str, Any]:
    length = lm.config.data.sequence_length
    width, shape = length // settings.bins_per_length, (-1, settings.factor, length)
    rows = held_out_text(lm, settings.factor * length, settings.sequences)
    options = {"residual_norm": "token"} if lm.config.implicit else {}  # a tolerance that means the same at any length
    whole = token_losses(lm, rows, settings.batch, **options)
    restarted = token_losses(lm, cut(rows, length), settings.batch * settings.factor, **options)
    return {
        "training_length": length,
        "sequences": len(rows),
        "perplexity": binned_perplexity(whole, width),
        "restarted_perplexity": binned_perplexity(restarted, width),
        "reading_on": cost_of_reading_on(whole.view(shape), restarted.view(shape), width),
    }


def _finding(measured: dict[str, Any], settings: Settings) -> str:
    parts, met = [], {}
    for family, values in measured.items():
        ratio, error = values["reading_on"]["overall"]
        if family.startswith("implicit"):
            met[family] = ratio <= settings.holds
        parts.append(f"{NAMES[family]} {ratio - 1:+.1%} (± {2 * error:.1%})")
    return (
        f"Reading on to {settings.factor}x the training length changes the perplexity, against the same tokens behind "
        f"text cut at the training length, by: {'; '.join(parts)}. That implicit models keep it (within "
        f"{settings.holds - 1:.0%}): {verdict(met)}."
    )


def _table(measured: dict[str, Any], settings: Settings) -> Table:
    inside, rows = settings.bins_per_length, []
    for family, values in measured.items():
        logs, ratios = np.log(values["perplexity"]).reshape(settings.factor, inside), values["reading_on"]["ratio"]
        spans = [f"{np.exp(span.mean()):.1f}" for span in logs]
        rows.append([NAMES[family], *spans, *(f"{ratio - 1:+.1%}" for ratio in ratios[1:])])
    columns = ["model", *(f"{k}x to {k + 1}x" for k in range(settings.factor))]
    columns += [f"reading on to {k + 1}x" for k in range(1, settings.factor)]
    length = next(iter(measured.values()))["training_length"]
    title = f"Perplexity by position, in training lengths of {length} tokens, and what reading on costs"
    return Table(title, columns, rows)


def _draw(measured: dict[str, Any], settings: Settings, context: StudyContext) -> None:
    with drawing(context.folder / "positions.png", panels=2, height=4.0) as (left, right):
        for family, values in measured.items():
            length, perplexity, cost = values["training_length"], values["perplexity"], values["reading_on"]
            width, colour = length // settings.bins_per_length, FAMILY_COLOURS[family]
            style = {"color": colour, "marker": "o", "linestyle": "-" if family.startswith("implicit") else "--"}
            x = (np.arange(len(perplexity)) + 0.5) * width
            left.plot(x, perplexity, markersize=3, label=NAMES[family], **style)
            ends = np.arange(1, settings.factor + 1) * length
            right.errorbar(ends, cost["ratio"], 2 * np.array(cost["error"]), markersize=4, capsize=2, **style)
        for axes in (left, right):
            axes.axvline(length, color="#6B6B6B", linestyle=":", linewidth=1.2)
            axes.set(xlabel="position", xlim=(0, (settings.factor + 0.15) * length))
            axes.set_xticks(np.arange(settings.factor + 1) * length)
        left.annotate("trained up to here", (length, 0), (4, 4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color="#6B6B6B", fontsize=9.5)  # fmt: skip
        left.set(title="held-out perplexity", ylim=(0, None))
        left.legend(loc="upper left", ncols=2, fontsize=8.5)
        left.set_ylim(0, 1.25 * left.get_ylim()[1])
        right.axhline(1.0, color="#6B6B6B", linewidth=1.0)
        right.set(title="perplexity by that behind cut text")
