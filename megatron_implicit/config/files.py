"""Configuration files as they stand: YAML in which every section is a mapping."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Optional

import yaml

from megatron_implicit.config.schema import Config
from megatron_implicit.errors import ConfigError

SECTIONS = [field.name for field in dataclasses.fields(Config) if field.name != "curriculum"]
REMEDY = "it must hold a configuration's keys, as the files in launch/configs/ do"


def read_config_file(path: str | Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The nested dictionaries in a preset or in a run's or checkpoint's ``config.yaml``, as they stand there.

    Args:
        path: of the file.
        remedy: what an error tells the user to do.

    Raises:
        ConfigError: the file is missing or not YAML, or has something else where a mapping belongs; names the file.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        problem = error.strerror
    except (ValueError, yaml.YAMLError) as error:
        problem = f"not YAML: {' '.join(str(error).split())}"
    else:
        problem = _misshapen(values)
    if problem:
        raise ConfigError(f"{path} cannot be read ({problem}): {remedy}")
    return values


def _misshapen(values: Any) -> Optional[str]:
    """What is not of a configuration's shape."""
    if not isinstance(values, dict):
        return "it is empty" if values is None else "it is no mapping"
    for name in SECTIONS:
        if not isinstance(values.get(name, {}), dict):
            return f"{name} is no mapping"
    phases = values.get("curriculum", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        return "curriculum is no list of mappings"
    return None
