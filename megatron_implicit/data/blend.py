"""Which datasets a run reads, and how much of each: one dataset, a folder of them, or a blend described in YAML.

    datasets:
      pile:  {path: data/pile, epochs: 1}
      code:  {path: data/code, epochs: 2, split: [1.0, 0.0, 0.0]}

A dataset is a prefix or a folder (of shards), its path relative to the YAML file. It is drawn from by its ``weight``,
or without weights by its tokens times ``epochs``. ``epochs`` is also the most often that training goes through its
documents (without it: as often as needed). ``split`` replaces ``data.split`` for one dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.indexed import dataset_fingerprint, find_prefixes
from megatron_implicit.errors import DataError

_KEYS = ("path", "weight", "epochs", "split")


@dataclass(frozen=True)
class BlendEntry:
    """One named dataset of a blend."""

    name: str
    path: str
    weight: float | None
    """Relative share of the samples; None: its tokens times ``epochs``."""
    epochs: int | None
    """Most often that training goes through its documents; None: no limit."""
    split: tuple[float, ...]
    """Shares of documents of train, validation and test."""

    def prefixes(self) -> list[str]:
        """Its datasets on disk."""
        return find_prefixes(self.path)


def read_blend(data: DataConfig) -> list[BlendEntry]:
    """The datasets of ``data.path``.

    Raises:
        DataError: the YAML file cannot be read, or a value in it is not usable; names file, dataset and key.
    """
    if not is_blend(data.path):
        return [BlendEntry(Path(data.path).name, data.path, None, None, tuple(data.split))]
    path = Path(data.path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the blend data.path {path}: {error.strerror}; check the path") from error
    except yaml.YAMLError as error:
        raise DataError(f"blend {path} is not YAML ({error}); correct it") from error
    if not (isinstance(content, dict) and set(content) == {"datasets"} and isinstance(content["datasets"], dict)):
        raise DataError(f"blend {path} must hold one key, datasets, with a dataset a name under it")
    entries = [_entry(path, str(name), fields, data) for name, fields in content["datasets"].items()]
    if not entries or len({entry.weight is None for entry in entries}) > 1:
        raise DataError(f"blend {path}: give at least one dataset, and all of them a weight or none")
    return entries


def is_blend(path: str) -> bool:
    """Whether a ``data.path`` is a YAML file."""
    return path.endswith((".yaml", ".yml"))


def blend_fingerprint(data: DataConfig) -> str:
    """sha256 (hex) of what the run reads: contents of all datasets, and for a blend its names, weights and splits.

    Reads manifests only. A checkpoint keeps it; a resume compares it.
    """
    if not is_blend(data.path):
        return dataset_fingerprint(data.path)
    entries = [
        [entry.name, entry.weight, entry.epochs, list(entry.split), dataset_fingerprint(entry.path)]
        for entry in read_blend(data)
    ]
    return hashlib.sha256(json.dumps(entries).encode("utf-8")).hexdigest()


def _entry(blend: Path, name: str, fields: Any, data: DataConfig) -> BlendEntry:
    place = f"blend {blend}: dataset {name}"
    if not isinstance(fields, dict) or "path" not in fields:
        raise DataError(f"{place} needs a path")
    unknown = sorted(set(fields) - set(_KEYS))
    if unknown:
        raise DataError(f"{place} has an unknown key {unknown[0]}; known are {', '.join(_KEYS)}")
    weight, epochs, split = fields.get("weight"), fields.get("epochs"), fields.get("split", data.split)
    if weight is not None and not (_is_number(weight) and weight > 0):
        raise DataError(f"{place}: weight {weight} must be above 0; leave a dataset out instead")
    if epochs is not None and not (isinstance(epochs, int) and epochs >= 1):
        raise DataError(f"{place}: epochs {epochs} must be a whole number from 1 on")
    _check_split(place, split)
    path = os.path.join(blend.parent, str(fields["path"]))
    return BlendEntry(name, path, None if weight is None else float(weight), epochs, tuple(map(float, split)))


def _check_split(place: str, split: Sequence[float]) -> None:
    usable = isinstance(split, list) and len(split) == 3 and all(_is_number(share) and share >= 0 for share in split)
    if not usable or not math.isclose(sum(split), 1.0, abs_tol=1e-6):
        raise DataError(f"{place}: split {split} must be three shares (train, validation, test) that add up to 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
