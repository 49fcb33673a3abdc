"""The recurrence of converged models: by autograd through the solve, and in closed form; its spectrum.

``evaluation.recurrence`` has the two recurrences (of states, of outputs), their closed form by the implicit function
theorem and its derivation. Everything is in float64. A model trained on word problems, if the study of state tracking
has left one, is looked at too: there the recurrence has to be dense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from megatron_implicit.api import PretrainedModel, load_pretrained
from megatron_implicit.evaluation.open_model import OpenModel, off_diagonal_mass
from megatron_implicit.evaluation.recurrence import (
    OutputRecurrence,
    StateRecurrence,
    TokenRecurrence,
    relative_difference,
)
from megatron_implicit.evaluation.studies.figures import COLOURS, FAMILY_COLOURS, draw_magnitudes, drawing
from megatron_implicit.evaluation.studies.language_models import (
    NAMES,
    PAPER,
    TINY,
    LanguageModels,
    held_out_text,
    open_models,
)
from megatron_implicit.evaluation.studies.study import Figure, StudyContext, StudyResult, Table
from megatron_implicit.solver.spectrum import spectral_radius

TITLE = "Jacobian of the recurrence"
CLAIM = "A converged implicit SSM has the dense, non-linear recurrence of an RNN; an explicit one's is diagonal."
BAR = 1e-4
"""Relative difference of autograd and closed form."""
FAMILIES = ("implicit_mamba2", "explicit_mamba2", "implicit_llama")
WORD_PROBLEM = "word problem"


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: LanguageModels
    positions: tuple[int, ...]
    """Tokens whose recurrence is looked at."""
    layers: int
    """Mamba2 layers whose states are."""
    coordinates: int
    """Rows of the states' Jacobian, evenly over those layers."""
    spectrum_positions: tuple[int, ...]
    """Tokens whose dF/dz is decomposed."""
    tokens: int = 128
    """Of the text on which power iteration is compared."""
    power_iterations: int = 200
    damping: float = 0.5


SIZES = {
    "tiny": Settings(TINY, (40, 100), layers=2, coordinates=64, spectrum_positions=tuple(range(8, 128, 12))),
    "paper": Settings(PAPER, (100,), layers=2, coordinates=64, spectrum_positions=(50, 100)),
}


@dataclass
class _Found:
    """Of one model; matrices are of the first position."""

    numbers: dict[str, Any] = field(default_factory=dict)
    matrices: dict[str, Any] = field(default_factory=dict)


def run(settings: Settings, context: StudyContext) -> StudyResult:
    """Measures the models that have a recurrence, or the user's."""
    found = {}
    for name, lm in _models(settings, context).items():
        text = _text(lm, settings)
        measured = context.once(_file(name), lambda lm=lm, text=text: vars(_measure(lm, text, settings)))
        found[name] = _Found(**measured)
        context.say(f"{_shown(name)}: Jacobians of {len(settings.positions)} tokens")
    return StudyResult(
        _finding(found), [_table(found), _spectrum_table(found, settings)], _draw(found, settings, context),
        {name: each.numbers for name, each in found.items()},
    )  # fmt: skip


def _models(settings: Settings, context: StudyContext) -> dict[str, PretrainedModel]:
    models = open_models(settings.models, context, FAMILIES)
    word_problem = _word_problem_run(context.runs) if context.checkpoint is None else None
    return models if word_problem is None else {**models, WORD_PROBLEM: load_pretrained(word_problem)}


def _word_problem_run(runs: Path) -> Optional[Path]:
    """The implicit model that the study of state tracking trained at the greatest length, if there is one."""
    finished = runs.glob("state-tracking/*implicit*/length*/training.json")
    found = [(int(path.parent.name.removeprefix("length").split("-")[0]), str(path.parent)) for path in finished]
    return Path(max(found)[1]) if found else None


def _text(lm: PretrainedModel, settings: Settings) -> Tensor:
    """[1, tokens]: held-out text, or random elements of a word problem."""
    if lm.config.data.task == "text":
        return held_out_text(lm, settings.tokens, 1)[:, :-1]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.config.model.vocab_size, (1, lm.config.data.sequence_length), generator=generator)


def _measure(lm: PretrainedModel, ids: Tensor, settings: Settings) -> _Found:
    opened, found, last = OpenModel(lm, settings.damping), _Found(), ids.shape[1] - 1
    positions = sorted({min(position, last) for position in settings.positions})
    if lm.config.architecture == "mamba2":
        _merge(found, [_states(opened, ids, position, settings) for position in positions], "states")
    if opened.implicit:
        _merge(found, [_outputs(opened, ids, position) for position in positions], "outputs")
        found.numbers["spectrum"] = _spectrum(opened, ids, settings)
    return found


def _merge(found: _Found, parts: list[_Found], key: str) -> None:
    found.numbers[key] = [part.numbers for part in parts]
    found.matrices[key] = parts[0].matrices


def _states(opened: OpenModel, ids: Tensor, position: int, settings: Settings) -> _Found:
    recurrence = StateRecurrence(TokenRecurrence(opened, ids, position), settings.layers)
    rows = _spread(recurrence.sizes, settings.coordinates)
    closed = recurrence.closed_form(rows)
    numbers = {"position": position, "layers": _layer_masses(closed, rows, recurrence.sizes),
               "off_diagonal": off_diagonal_mass(closed, rows)}  # fmt: skip
    matrices = {"closed": closed[:, rows].tolist()}
    if opened.implicit:
        recorded = recurrence.by_autograd(rows)
        numbers["difference"] = relative_difference(recorded, closed)
        matrices["autograd"] = recorded[:, rows].tolist()
    return _Found(numbers, matrices)


def _spread(sizes: list[int], count: int) -> list[int]:
    """Places evenly over parts that lie one behind the other, equally many in each."""
    starts, each = np.cumsum([0, *sizes]), count // len(sizes)
    return [int(start + k * size // each) for start, size in zip(starts, sizes) for k in range(each)]


def _layer_masses(closed: Tensor, rows: list[int], sizes: list[int]) -> list[float]:
    """By layer, the off-diagonal share of its rows within its own state."""
    parts, start = [], 0
    for size in sizes:
        mine = [number for number, row in enumerate(rows) if start <= row < start + size]
        own = closed[mine, start : start + size]
        parts.append(off_diagonal_mass(own, [rows[number] - start for number in mine]))
        start += size
    return parts


def _outputs(opened: OpenModel, ids: Tensor, position: int) -> _Found:
    recurrence = OutputRecurrence(opened, ids, position)
    closed, recorded = recurrence.closed_form(), recurrence.by_autograd()
    numbers = {
        "position": position, "difference": relative_difference(recorded, closed),
        "off_diagonal": off_diagonal_mass(closed), "norm": float(torch.linalg.matrix_norm(closed, 2)),
    }  # fmt: skip
    return _Found(numbers, {"closed": closed.tolist(), "autograd": recorded.tolist()})


def _spectrum(opened: OpenModel, ids: Tensor, settings: Settings) -> dict[str, Any]:
    """Eigenvalues of dF/dz at single tokens, and estimates by power iteration: there, and over the whole text."""
    eigenvalues, exact, estimated = [], [], []
    for position in sorted({min(position, ids.shape[1] - 1) for position in settings.spectrum_positions}):
        token = TokenRecurrence(opened, ids, position)
        values = torch.linalg.eigvals(token.map_jacobian())
        eigenvalues += torch.view_as_real(values).tolist()
        exact.append(float(values.abs().max()))
        estimate = spectral_radius(
            lambda z: token.evaluate(z[0], token.before)[0].unsqueeze(0), token.z[None, None],
            iterations=settings.power_iterations,
        )  # fmt: skip
        estimated.append(float(estimate))
    z, _ = opened.solve(ids)
    whole = {
        str(count): float(spectral_radius(lambda z: opened.evaluate(z, ids)[0], z, iterations=count))
        for count in (32, settings.power_iterations)
    }
    return {"eigenvalues": eigenvalues, "exact": exact, "estimated": estimated, "whole_text": whole}


def _shown(name: str) -> str:
    return "word problem, implicit Mamba2" if name == WORD_PROBLEM else NAMES[name]


def _file(name: str) -> str:
    return name.replace(" ", "_")


def _finding(found: dict[str, _Found]) -> str:
    differences = [
        part["difference"] for each in found.values() for key in ("states", "outputs")
        for part in each.numbers.get(key, ()) if "difference" in part
    ]  # fmt: skip
    masses = "; ".join(
        f"{_shown(name)} {_mean([max(part['layers']) for part in each.numbers['states']]):.2%}"
        for name, each in found.items() if "states" in each.numbers
    )  # fmt: skip
    parts = []
    if differences:
        met = "met" if max(differences) <= BAR else "missed"
        parts.append(f"Autograd and closed form differ by at most {max(differences):.1e} (bar {BAR:g}: {met}).")
    if masses:
        parts.append(f"Share of a layer's own state-to-state Jacobian off its diagonal, where it is largest: {masses}.")
        parts.append(f"That only the implicit recurrence is dense: {_verdict(found)}.")
    radii = [
        f"{_shown(name)} {max(each.numbers['spectrum']['exact']):.2f}"
        for name, each in found.items() if "spectrum" in each.numbers
    ]  # fmt: skip
    if radii:
        parts.append(f"Largest eigenvalue of dF/dz over the tokens that were decomposed: {'; '.join(radii)}.")
    return " ".join(parts)


def _verdict(found: dict[str, _Found]) -> str:
    masses = {
        name: [mass for part in each.numbers["states"] for mass in part["layers"]]
        for name, each in found.items() if "states" in each.numbers
    }  # fmt: skip
    explicit = [max(values) for name, values in masses.items() if name.startswith("explicit")]
    implicit = [min(values) for name, values in masses.items() if not name.startswith("explicit")]
    if not explicit or not implicit:
        return "not decided by this model alone"
    return "confirmed" if max(explicit) < 1e-9 and min(implicit) > 0.01 else "not confirmed"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _table(found: dict[str, _Found]) -> Table:
    rows = []
    for name, each in found.items():
        for key in ("states", "outputs"):
            parts = each.numbers.get(key)
            if parts:
                differences = [part["difference"] for part in parts if "difference" in part]
                difference = f"{max(differences):.1e}" if differences else "explicit: no solve"
                own = f"{_mean([_mean(part['layers']) for part in parts]):.2%}" if key == "states" else "-"
                whole = f"{_mean([part['off_diagonal'] for part in parts]):.2%}"
                rows.append([f"{_shown(name)}, {key}", difference, own, whole])
    columns = ["model, recurrence", "autograd against closed form", "off-diagonal, within a layer", "off-diagonal, all"]
    return Table("Jacobians token to token", columns, rows)


def _spectrum_table(found: dict[str, _Found], settings: Settings) -> Table:
    rows = []
    for name, each in found.items():
        if "spectrum" in each.numbers:
            spectrum = each.numbers["spectrum"]
            off = max(abs(b / a - 1) for a, b in zip(spectrum["exact"], spectrum["estimated"]))
            mean, most = _mean(spectrum["exact"]), max(spectrum["exact"])
            whole = [f"{value:.3f}" for value in spectrum["whole_text"].values()]
            rows.append([_shown(name), f"{mean:.3f}", f"{most:.3f}", f"{off:.1%}", *whole])
    columns = ["model", "mean of tokens", "largest", "power iteration off by at most",
               "whole text, 32 iterations", f"whole text, {settings.power_iterations}"]  # fmt: skip
    return Table("Spectral radius of dF/dz at the fixed point", columns, rows)


def _draw(found: dict[str, _Found], settings: Settings, context: StudyContext) -> list[Figure]:
    figures = []
    panels = _panels(found, "states", [name for name in found if name != "implicit_mamba2"])
    if panels:
        _draw_matrices(context.folder / "states.png", panels, settings.layers)
        caption = (
            f"Magnitudes of the SSM states' Jacobian token to token, {settings.coordinates} of its coordinates, evenly "
            "over the first layers (lines between them)"
        )
        figures.append(Figure("states.png", caption))
    panels = _panels({name: each for name, each in found.items() if name != WORD_PROBLEM}, "outputs", [])
    if panels:
        _draw_matrices(context.folder / "outputs.png", panels, 1)
        caption = (
            "Magnitudes of the Jacobian of the outputs token to token, through the recorded solve and in closed form. "
            "Explicit outputs do not come back: theirs is 0"
        )
        figures.append(Figure("outputs.png", caption))
    spectra = {name: each for name, each in found.items() if "spectrum" in each.numbers}
    if spectra:
        _draw_spectra(spectra, settings.damping, context)
        caption = (
            "Eigenvalues of dF/dz at the fixed point of single tokens; within the unit circle the undamped iteration "
            f"converges, within the dashed one that with damping {settings.damping:g}"
        )
        figures.append(Figure("spectrum.png", caption))
    return figures


def _panels(found: dict[str, _Found], key: str, once: list[str]) -> list[tuple[str, Any]]:
    """(title, matrix) of every model, by autograd and in closed form; of those in ``once`` only one of the two."""
    panels = []
    for name, each in found.items():
        sides = each.matrices.get(key, {})
        for side, title in (("autograd", "autograd"), ("closed", "closed form")):
            if side in sides and not (side == "closed" and name in once and "autograd" in sides):
                panels.append((f"{_shown(name)}\n{title}", sides[side]))
    return panels


def _draw_matrices(path: Path, panels: list[tuple[str, Any]], layers: int) -> None:
    with drawing(path, panels=len(panels), height=2.6 if len(panels) > 3 else 3.0) as axes:
        for number, (each, (title, values)) in enumerate(zip(axes, panels)):
            matrix = np.array(values)
            draw_magnitudes(each, matrix, title, scale=number == len(panels) - 1)
            each.title.set_fontsize(9.5)
            for layer in range(1, layers if len(matrix) % layers == 0 else 1):
                edge = layer * len(matrix) / layers - 0.5
                each.axhline(edge, color="white", linewidth=0.8)
                each.axvline(edge, color="white", linewidth=0.8)


def _draw_spectra(spectra: dict[str, _Found], damping: float, context: StudyContext) -> None:
    with drawing(context.folder / "spectrum.png", panels=len(spectra), height=3.6) as panels:
        for axes, (name, each) in zip(panels, spectra.items()):
            values = np.array(each.numbers["spectrum"]["eigenvalues"])
            colour = FAMILY_COLOURS.get(name, COLOURS[2])
            axes.scatter(values[:, 0], values[:, 1], s=5, color=colour, alpha=0.5, linewidths=0)
            angle = np.linspace(0, 2 * np.pi, 200)
            axes.plot(np.cos(angle), np.sin(angle), color="#6B6B6B", linewidth=1.0)
            x, y = 1 + (np.cos(angle) - 1) / damping, np.sin(angle) / damping  # |1 - damping + damping * (x + iy)| = 1
            axes.plot(x, y, "--", color="#6B6B6B", linewidth=1.0)
            axes.set(title=_shown(name), xlabel="real part", aspect="equal", xlim=(-1.6, 1.25), ylim=(-1.3, 1.3))
        panels[0].set_ylabel("imaginary part")
