"""The figures of the state-tracking study."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from megatron_implicit.evaluation.studies.figures import COLOURS, DASHES, FAMILY_COLOURS, draw_with_spread, drawing
from megatron_implicit.evaluation.studies.study import Figure, StudyContext


def by_position(context: StudyContext, curves: Mapping[str, np.ndarray], length: int) -> Figure:
    """Accuracy by position at the length of training.

    Args:
        context: whose folder the image goes to.
        curves: [seeds, length] by kind of model.
        length: of the words.
    """
    with drawing(context.folder / "by_position.png") as (axes,):
        for kind, runs in curves.items():
            colour = FAMILY_COLOURS[f"{kind}_mamba2"]
            draw_with_spread(axes, range(1, length + 1), runs, f"{kind}, 1 layer", colour)
        axes.set(
            xlabel="position in the word", ylabel="share right", ylim=(0, 1.03), title=f"A5, trained to length {length}"
        )
        axes.legend()
    return Figure("by_position.png", "Accuracy by position at the length of training; ranges over seeds")


def beyond(context: StudyContext, curves: Mapping[tuple[int, str], np.ndarray]) -> Figure:
    """Accuracy by position beyond the length of training.

    Args:
        context: whose folder the image goes to.
        curves: [seeds, length] by (longest length of training, mode of evaluation).
    """
    lengths = sorted({trained_to for trained_to, _ in curves})
    with drawing(context.folder / "beyond.png", panels=len(lengths)) as panels:
        for axes, trained_to in zip(panels, lengths):
            for number, mode in enumerate(("simultaneous", "sequential")):
                runs = curves[trained_to, mode]
                draw_with_spread(axes, range(1, runs.shape[1] + 1), runs, mode, COLOURS[number], DASHES[number])
            axes.axvline(trained_to, color=COLOURS[-1], linestyle=":", linewidth=1)
            axes.set(xlabel="position in the word", ylim=(0, 1.03), title=f"trained to length {trained_to}")
        panels[0].set_ylabel("share right")
        panels[0].legend(loc="lower left")
    return Figure(
        "beyond.png", "A5 beyond the length of training (dotted), simultaneous and sequential; ranges over seeds"
    )


def by_cap(
    context: StudyContext, measured: Mapping[tuple[str, str, int], Mapping[str, Any]], caps: Sequence[int]
) -> Figure:
    """Accuracy by the cap on training iterations.

    Args:
        context: whose folder the image goes to.
        measured: "free" and "capped" accuracies by (group, gradient, cap).
        caps: in order.
    """
    groups = list(dict.fromkeys(group for group, _, _ in measured))
    lines = [
        ("phantom", "free", "phantom gradient, solved freely"),
        ("phantom", "capped", "phantom gradient, with the cap"),
        ("unrolled", "capped", "unrolled to the cap"),
    ]
    with drawing(context.folder / "by_cap.png", panels=len(groups)) as panels:
        for axes, group in zip(panels, groups):
            for number, (gradient, solve, label) in enumerate(lines):
                if (group, gradient, caps[0]) not in measured:
                    continue
                shares = [measured[group, gradient, cap][solve]["accuracy"] for cap in caps]
                axes.plot(caps, shares, DASHES[number], marker="o", color=COLOURS[number], label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(caps, [str(cap) for cap in caps])
            length = measured[group, "phantom", caps[0]]["free"]["length"]
            axes.set(xlabel="iterations while training", ylim=(0, 1.03), title=f"{group}, length {length}")
        panels[0].set_ylabel("share of positions right")
        panels[0].legend(loc="lower right", fontsize=9)
    return Figure("by_cap.png", "Accuracy by the cap on training iterations (phantom: four more passes with gradient)")


def by_layers(context: StudyContext, explicit: Mapping[int, Sequence[float]], implicit: Sequence[float]) -> Figure:
    """Accuracy by position of explicit models of several depths.

    Args:
        context: whose folder the image goes to.
        explicit: [length] by layers.
        implicit: [length], of one layer.
    """
    positions = range(1, len(implicit) + 1)
    with drawing(context.folder / "by_layers.png") as (axes,):
        axes.plot(
            positions, implicit, color=FAMILY_COLOURS["implicit_mamba2"], linewidth=2.5, label="implicit, 1 layer"
        )
        for number, (layers, shares) in enumerate(explicit.items()):
            colour, dash = COLOURS[1 + number % (len(COLOURS) - 1)], DASHES[number % len(DASHES)]
            axes.plot(positions, shares, dash, color=colour, label=f"explicit, {layers} layer{'s' * (layers > 1)}")
        axes.set(xlabel="position in the word", ylabel="share right", ylim=(0, 1.03), title="A5, equal training time")
        axes.legend()
    return Figure("by_layers.png", "Explicit models of several depths in the training time of the implicit one")
