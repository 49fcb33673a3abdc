"""Where an implicit model spends its evaluations: by position, class of word, surprise; and what more of them buy.

Every token is solved by itself (sequential mode), so that its evaluations are its own. A token is looked at from two
sides: the surprise of reading it (its loss, given what came before) and the loss of the prediction made there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.api import PretrainedModel
from megatron_implicit.data.datasets import open_tokenizer
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
from megatron_implicit.evaluation.studies.length_extrapolation import token_losses
from megatron_implicit.evaluation.studies.study import Figure, StudyContext, StudyResult, Table
from megatron_implicit.evaluation.studies.word_classes import CLASSES, classify

TITLE = "Adaptive compute"
CLAIM = "An implicit model spends more evaluations where a text is harder."

CORRELATED = 0.1
"""Rank correlation above which evaluations are said to follow a loss; its standard error at 4,096 tokens is 0.016."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: LanguageModels
    sequences: int
    tokens: Optional[int]
    """Of a sequence; None takes the training length."""
    tolerance: float = 1e-3
    """Relative residual that ends a token's solve; the models' own is so loose that nearly all tokens take the same."""
    max_iterations: int = 100
    position_bins: int = 8
    loss_bins: int = 8
    """Bins with equally many tokens."""
    caps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Evaluations before the output pass, for loss against iterations."""
    batch: int = 16


SIZES = {
    "tiny": Settings(TINY, sequences=32, tokens=None),
    "paper": Settings(PAPER, sequences=32, tokens=512, batch=8),
}


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Measures the implicit models, or the user's."""
    measured = {}
    for family, lm in open_models(settings.models, context, IMPLICIT).items():
        rows = held_out_text(lm, settings.tokens or lm.config.data.sequence_length, settings.sequences)
        measured[family] = context.once(family, lambda lm=lm, rows=rows: _measure(lm, rows, settings))
        context.say(f"{NAMES[family]}: {rows[:, 1:].numel()} tokens")
    _draw_where(measured, context)
    _draw_difficulty(measured, context)
    return StudyResult(
        _finding(measured),
        [_class_table(measured), _cap_table(measured)],
        [
            Figure(
                "where.png",
                "Evaluations of F a token, by position and by class of word; bars are two standard errors",
            ),
            Figure(
                "difficulty.png",
                "Evaluations by the surprise of the token that is read (solid) and by the loss of the prediction made "
                "there (dashed), in bins of equally many tokens; held-out loss by evaluations (dotted: solved)",
            ),
        ],
        measured,
    )  # fmt: skip


@torch.no_grad()
def _measure(lm: PretrainedModel, rows: Tensor, settings: Settings) -> dict[str, Any]:
    overrides = {"tolerance": settings.tolerance, "max_iterations": settings.max_iterations}
    counts, losses = [], []
    for part in rows.split(settings.batch):
        out = lm(part[:, :-1], mode="sequential", residual_norm="token", **overrides)
        counts.append(out.trace.evaluations.cpu())
        labels = part[:, 1:].to(out.logits.device)
        losses.append(F.cross_entropy(out.logits.transpose(1, 2), labels, reduction="none").cpu())
    evaluations, loss = torch.cat(counts).double(), torch.cat(losses).double()
    tokenizer = open_tokenizer(lm.config.data)
    classes = np.array([classify(tokenizer, row[:-1].tolist()) for row in rows])
    read, made = (evaluations[:, 1:], loss[:, :-1]), (evaluations, loss)
    return {
        "mean": float(evaluations.mean()),
        "quantiles": {f"p{q}": float(evaluations.quantile(q / 100)) for q in (1, 50, 90, 99, 100)},
        "position": by_position(evaluations, settings.position_bins),
        "class": by_class(evaluations.numpy(), classes),
        "surprise": by_quantile(*(x.flatten() for x in read), settings.loss_bins),
        "loss": by_quantile(*(x.flatten() for x in made), settings.loss_bins),
        "surprise_correlation": rank_correlation(*(x.flatten() for x in read)),
        "loss_correlation": rank_correlation(*(x.flatten() for x in made)),
        "caps": {str(cap): _capped(lm, rows, cap, settings) for cap in settings.caps},
        "converged_loss": float(loss.mean()),
    }


def _capped(lm: PretrainedModel, rows: Tensor, cap: int, settings: Settings) -> float:
    """Mean loss after exactly ``cap`` evaluations and the output pass."""
    return float(token_losses(lm, rows, settings.batch, tolerance=0.0, max_iterations=cap + 1).mean())


def by_position(evaluations: Tensor, bins: int) -> dict[str, list[float]]:
    """Means over bins of positions, of evaluations [b, s]; the last bin takes what is left over."""
    width = max(1, evaluations.shape[1] // bins)
    edges = [k * width for k in range(min(bins, evaluations.shape[1]))] + [evaluations.shape[1]]
    parts = [evaluations[:, first:last].flatten() for first, last in zip(edges, edges[1:])]
    centres = [(first + last - 1) / 2 for first, last in zip(edges, edges[1:])]
    return {"x": centres, **_statistics(parts)}


def by_class(evaluations: np.ndarray, classes: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean, standard error and number of the tokens of each class that occurs; both [b, s]."""
    found = {}
    for name in CLASSES:
        values = torch.from_numpy(evaluations[classes == name])
        if len(values):
            statistics = _statistics([values])
            found[name] = {"mean": statistics["mean"][0], "error": statistics["error"][0], "tokens": len(values)}
    return found


def by_quantile(evaluations: Tensor, loss: Tensor, bins: int) -> dict[str, list[float]]:
    """Means over bins of equally many tokens, from the lowest loss to the highest; both [n]."""
    order = loss.argsort()
    parts = [part for part in order.tensor_split(bins) if len(part)]
    return {"x": [float(loss[part].mean()) for part in parts], **_statistics([evaluations[part] for part in parts])}


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, with the mean rank for ties; [n] each, 0 where one of them is constant."""
    ranks = [_ranks(values) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = (centred[0].square().sum() * centred[1].square().sum()).sqrt()
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _statistics(parts: list[Tensor]) -> dict[str, list[float]]:
    errors = [float(part.double().std() / len(part) ** 0.5) if len(part) > 1 else 0.0 for part in parts]
    return {"mean": [float(part.double().mean()) for part in parts], "error": errors}


def _finding(measured: dict[str, Any]) -> str:
    parts, surprise, prediction = [], {}, {}
    for family, values in measured.items():
        easy, hard = values["surprise"]["mean"][0], values["surprise"]["mean"][-1]
        correlation = values["surprise_correlation"]
        surprise[family] = correlation > CORRELATED and hard > easy
        prediction[family] = values["loss_correlation"] > CORRELATED
        parts.append(
            f"{NAMES[family]} {easy:.1f} for the least surprising tokens and {hard:.1f} for the most (rank correlation "
            f"{correlation:.2f}; with the loss of the prediction {values['loss_correlation']:.2f})"
        )
    return (
        f"Mean evaluations a token: {'; '.join(parts)}. That tokens which are harder to foresee take more of them: "
        f"{verdict(surprise)}; that those do at which the next one is hard to foresee: {verdict(prediction)}."
    )


def _class_table(measured: dict[str, Any]) -> Table:
    rows = []
    for family, values in measured.items():
        for name, found in values["class"].items():
            interval = f"{found['mean']:.2f} ± {2 * found['error']:.2f}"
            rows.append([f"{NAMES[family]}, {name}", f"{found['tokens']:,}", interval])
    columns = ["model, class", "tokens", "evaluations"]
    return Table("Evaluations by class of word, with two standard errors", columns, rows)


def _cap_table(measured: dict[str, Any]) -> Table:
    caps = list(next(iter(measured.values()))["caps"])
    rows = [
        [NAMES[family], *(f"{values['caps'][cap]:.3f}" for cap in caps), f"{values['converged_loss']:.3f}"]
        for family, values in measured.items()
    ]
    return Table("Held-out loss (nats a token) by evaluations before the output pass", ["model", *caps, "solved"], rows)


def _draw_where(measured: dict[str, Any], context: StudyContext) -> None:
    with drawing(context.folder / "where.png", panels=2, height=3.6) as (left, right):
        for number, (family, values) in enumerate(measured.items()):
            colour, bars = FAMILY_COLOURS[family], values["position"]
            left.errorbar(bars["x"], bars["mean"], 2 * np.array(bars["error"]), color=colour, marker="o", markersize=4,
                          capsize=2, label=NAMES[family])  # fmt: skip
            found = [(place, values["class"][name]) for place, name in enumerate(CLASSES) if name in values["class"]]
            places = [place + 0.16 * (2 * number - len(measured) + 1) for place, _ in found]
            right.errorbar([each["mean"] for _, each in found], places, xerr=[2 * each["error"] for _, each in found],
                           color=colour, marker="o", markersize=5, linestyle="none", capsize=2)  # fmt: skip
        left.set(title="by position", xlabel="position", ylabel="evaluations a token")
        left.legend()
        right.set(title="by class of word", xlabel="evaluations a token")
        right.set_yticks(range(len(CLASSES)), CLASSES)
        right.invert_yaxis()
        right.grid(axis="x")


def _draw_difficulty(measured: dict[str, Any], context: StudyContext) -> None:
    with drawing(context.folder / "difficulty.png", panels=2, height=3.6) as (left, right):
        for family, values in measured.items():
            colour = FAMILY_COLOURS[family]
            for key, dash in (("surprise", "-"), ("loss", "--")):
                bars = values[key]
                left.errorbar(bars["x"], bars["mean"], 2 * np.array(bars["error"]), color=colour, linestyle=dash,
                              marker="o", markersize=4, capsize=2)  # fmt: skip
            caps = [int(cap) for cap in values["caps"]]
            right.plot(caps, list(values["caps"].values()), color=colour, marker="o", label=NAMES[family])
            right.axhline(values["converged_loss"], color=colour, linestyle=":", linewidth=1.0)
        for dash, label in (("-", "token read"), ("--", "prediction made")):
            left.plot([], [], dash, color="#6B6B6B", label=label)
        left.legend(loc="upper left")
        left.set(title="by difficulty", xlabel="loss (nats)", ylabel="evaluations a token")
        right.set(title="loss by evaluations", xlabel="evaluations before the output pass", xscale="log")
        right.set_ylabel("held-out loss (nats)")
        right.set_xticks(caps, [str(cap) for cap in caps])
        right.minorticks_off()
        right.legend()
