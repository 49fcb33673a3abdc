"""Which runs a command line asks for: presets, the bounded phase alone, and branches off a bounded run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from megatron_implicit.config import Config, config_from_dict, load_config, read_config_file
from megatron_implicit.errors import CheckpointError, ConfigError

PRESETS = Path("launch/configs")


@dataclass(frozen=True)
class Run:
    """A run that is to be submitted."""

    config_file: Path
    """A preset, or another YAML file."""
    arguments: list[str]
    """launch/pretrain.py's besides --config, run.dir included."""
    config: Config
    """What they resolve to."""

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.dir)

    @property
    def is_preset(self) -> bool:
        """Whether the configuration comes with the code."""
        return self.config_file.parent.parts[-2:] == PRESETS.parts


def find_config(preset: str, repository: Path) -> Path:
    """The YAML file of a preset's name or path.

    Raises:
        ConfigError: there is none.
    """
    for path in (Path(preset), repository / PRESETS / f"{preset}.yaml"):
        if path.is_file():
            return path.resolve()
    names = ", ".join(sorted(path.stem for path in (repository / PRESETS).glob("*.yaml")))
    raise ConfigError(f"{preset}: neither a file nor a preset ({names})")


def plan_run(config_file: Path, folder: Path, arguments: Sequence[str], *, data: str, repository: Path) -> Run:
    """A run in a folder of its own, all of its paths absolute.

    Args:
        config_file: preset.
        folder: the run's, where the arguments name no other.
        arguments: of the command line, which win.
        data: the cluster's dataset; empty leaves the configuration's, which is then relative to the repository.
        repository: where the code is.

    Raises:
        ConfigError: as ``load_config``.
    """
    given = [
        "--config",
        str(config_file),
        "--run.dir",
        str(folder),
        *(["--data.path", data] if data else []),
        *arguments,
    ]
    config = load_config(given, prog="SLURM/submit.sh")
    config.run.dir = str((repository / config.run.dir).resolve())
    config.data.path = str((repository / config.data.path).resolve())
    mine = [*_without(arguments, "run.dir", "data.path"), "--run.dir", config.run.dir, "--data.path", config.data.path]
    return Run(config_file, mine, config)


def bounded_only(config_file: Path) -> list[str]:
    """Arguments that keep a run in the first phase of its curriculum: the run that branches come off.

    Raises:
        ConfigError: the configuration has no phases to leave out.
    """
    phases = _phases(config_file)
    if len(phases) < 2:
        raise ConfigError(f"--bounded: {config_file} has no second phase to leave out")
    return ["--curriculum", json.dumps(phases[:1])]


@dataclass(frozen=True)
class Branch:
    """Where a branch leaves its parent: RUN@FRACTION."""

    parent: Path
    fraction: float

    @classmethod
    def parse(cls, text: str, runs: Path) -> "Branch":
        """From the command line: a run's folder, or its name below the folder of runs, and 0.8 or 80%.

        Raises:
            ConfigError: it is no such thing.
        """
        name, _, share = text.rpartition("@")
        try:
            fraction = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        except ValueError:
            fraction = 0.0
        if not name or not 0 < fraction < 1:
            raise ConfigError(f"--branch {text}: expected RUN@FRACTION, for example implicit_mamba2_1.3b_bounded@0.8")
        parent = next((path for path in (Path(name), runs / name) if path.is_dir()), None)
        if parent is None:
            raise ConfigError(f"--branch {text}: there is no run {name}, neither here nor in {runs}")
        return cls(parent.resolve(), fraction)

    def arguments(self, config_file: Path) -> tuple[list[str], Path]:
        """(launch/pretrain.py's arguments, the checkpoint): the last phase begins at the fraction exactly.

        The branch starts from the newest checkpoint at or before the fraction and does what is missing until there in
        the first phase, as its parent did.

        Raises:
            ConfigError: the preset has one phase.
            CheckpointError: the parent has no checkpoint there.
        """
        phases = _phases(config_file)
        if len(phases) < 2:
            raise ConfigError(f"--branch: {config_file} has no second phase to branch into")
        checkpoint = self._checkpoint()
        curriculum = [phases[0], {**phases[-1], "start": self.fraction}]
        return ["--checkpoint.load", str(checkpoint), "--curriculum", json.dumps(curriculum)], checkpoint

    def _checkpoint(self) -> Path:
        from megatron_implicit.checkpoint.layout import CONFIG_FILE, CheckpointFolder  # with torch: only if need be

        folder = CheckpointFolder(self.parent / "checkpoints")
        steps = config_from_dict(read_config_file(self.parent / CONFIG_FILE)).train.steps
        there = folder.steps()
        before = [step for step in there if step <= self.fraction * steps]
        if not before:
            raise CheckpointError(
                f"{self.parent} has no checkpoint at or before {self.fraction:.0%} of its {steps} steps (it has "
                f"{', '.join(map(str, there)) or 'none'}): wait for one, or branch later"
            )
        return folder.step_folder(before[-1])


def _phases(config_file: Path) -> list[dict[str, Any]]:
    """The curriculum of a configuration, without unset values."""
    config = load_config(["--config", str(config_file)])
    return [{k: v for k, v in dataclasses.asdict(phase).items() if v is not None} for phase in config.curriculum]


def _without(arguments: Sequence[str], *keys: str) -> list[str]:
    """Command-line arguments without some keys, written as '--key value' or '--key=value'."""
    kept, words = [], list(arguments)
    while words:
        word = words.pop(0)
        if word in (f"--{key}" for key in keys):
            words = words[1:]
        elif not word.startswith(tuple(f"--{key}=" for key in keys)):
            kept.append(word)
    return kept
