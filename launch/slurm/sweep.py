"""A sweep: a grid of values as the tasks of one Slurm array, from a YAML file (SLURM/sweeps/ has one)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_implicit.errors import ConfigError


@dataclass(frozen=True)
class Sweep:
    """What the file says."""

    preset: str
    """Name or path of the configuration that all runs share."""
    grid: dict[str, list[Any]]
    """Values of each key; every combination is a run."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of all runs."""
    nodes: int = 1
    """Of a run."""
    at_once: int = 4
    """Runs that may be running at a time."""

    def points(self) -> list[tuple[str, list[str]]]:
        """(folder name, arguments) of each run, in the order of the array's tasks."""
        found = []
        for values in itertools.product(*self.grid.values()):
            point = dict(zip(self.grid, values))
            name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
            arguments = [word for key, value in {**self.set, **point}.items() for word in (f"--{key}", _text(value))]
            found.append((name, arguments))
        return found


def read_sweep(path: Path) -> Sweep:
    """A sweep's file.

    Raises:
        ConfigError: it is missing or something in it is wrong.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        sweep = Sweep(**values)
    except FileNotFoundError:
        raise ConfigError(f"--sweep {path}: no such file; SLURM/sweeps/ has an example") from None
    except (TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--sweep {path}: {str(error).splitlines()[0]}; expected preset, grid, set, nodes, at_once"
        ) from None
    empty = [key for key, choices in sweep.grid.items() if not isinstance(choices, list) or not choices]
    if empty or not sweep.grid:
        raise ConfigError(f"--sweep {path}: grid.{empty[0] if empty else '*'} must be a list of values")
    return sweep


def _text(value: Any) -> str:
    """A value as the command line takes it; YAML reads the inner structure of lists again."""
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()
    )
