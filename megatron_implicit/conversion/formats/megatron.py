"""``megatron``: our distributed checkpoint, of any tensor and pipeline layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_implicit.checkpoint import TrainingState, locate_checkpoint, read_checkpoint_config
from megatron_implicit.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_implicit.checkpoint.integrity import verify_manifest, write_manifest
from megatron_implicit.checkpoint.layout import CONFIG_FILE, MANIFEST_FILE, STATE_FILE, read_state, write_durably
from megatron_implicit.checkpoint.streaming import (
    CheckpointTensors,
    NewTensor,
    model_keys,
    write_checkpoint_tensors,
)
from megatron_implicit.config import save_config
from megatron_implicit.conversion.layout import CheckpointSlice, model_layout
from megatron_implicit.conversion.reference import reference_shape
from megatron_implicit.conversion.stored import Origin, StoredModel, StoredTensor, on_one_process
from megatron_implicit.conversion.tensor_files import peek_json
from megatron_implicit.errors import CheckpointError

ORIGIN_FILE = "origin.json"


def recognises(folder: Path) -> bool:
    """A run's folder, its checkpoints/, or one step's folder."""
    return any((folder / name).is_file() for name in (MANIFEST_FILE, "latest", "checkpoints/latest"))


def open_folder(folder: Path) -> StoredModel:
    """Checks every file against the manifest and names the model's tensors; optimizer state is left where it is."""
    folder = locate_checkpoint(folder)
    verify_manifest(folder)
    config = on_one_process(read_checkpoint_config(folder))
    stored = CheckpointTensors(folder)
    slices = model_layout(config).slices
    known = {part.key for part in slices}
    extra = [key for key in model_keys(list(stored.info)) if key not in known]
    missing = [part.key for part in slices if part.key not in stored.info]
    if extra or missing:
        problem = f"lacks {missing[0]}" if missing else f"has unexpected {extra[0]}"
        raise CheckpointError(f"{folder} {problem}: it does not hold the model its {CONFIG_FILE} describes")
    groups: dict[str, list[CheckpointSlice]] = {}
    for part in slices:
        groups.setdefault(part.name, []).append(part)
    tensors = {name: _joined(name, parts, stored) for name, parts in groups.items()}
    left = len(stored.info) - len(known)
    unmapped = {"optimizer state": f"{left} tensors that only training needs"} if left else {}
    tokenizer = tokenizer_fingerprint(config, read_state(folder))
    return StoredModel(folder, "megatron", config, tensors, _read_origin(folder), unmapped, tokenizer)


def _joined(name: str, parts: list[CheckpointSlice], stored: CheckpointTensors) -> StoredTensor:
    """One tensor of the reference from its sections."""
    parts = sorted(parts, key=lambda part: part.rows.start if part.rows else 0)
    dtype = stored.info[parts[0].key].dtype
    if len(parts) == 1:
        shape = stored.info[parts[0].key].shape
        return StoredTensor(parts[0].key, reference_shape(name, shape), dtype, lambda: _one(name, parts[0].key, stored))
    rows = sum(stored.info[part.key].shape[0] for part in parts)
    shape = (rows, *stored.info[parts[0].key].shape[1:])

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for part in parts:
            stored.read(part.key, whole[part.rows])
        return whole.view(reference_shape(name, shape))

    return StoredTensor(", ".join(part.key for part in parts), reference_shape(name, shape), dtype, read)


def _one(name: str, key: str, stored: CheckpointTensors) -> Tensor:
    tensor = stored.read(key)
    return tensor.view(reference_shape(name, tuple(tensor.shape)))


def _read_origin(folder: Path) -> Origin | None:
    """The config.json the model once came in with: beside the checkpoint, or beside one it was trained from."""
    seen: set[Path] = set()
    while folder not in seen:
        seen.add(folder)
        values = peek_json(folder / ORIGIN_FILE)
        if isinstance(values.get("format"), str) and isinstance(values.get("config"), dict):
            return Origin(values["format"], values["config"])
        parent = peek_json(folder / STATE_FILE).get("parent")
        if not isinstance(parent, str):
            return None
        folder = Path(parent)
    return None


def write_folder(model: StoredModel, folder: Path) -> None:
    """Writes a checkpoint without training state: load_pretrained reads it, a new run starts from it."""
    slices = model_layout(model.config).slices
    write_checkpoint_tensors(folder, _sections(model, slices))
    save_config(on_one_process(model.config), folder / CONFIG_FILE)
    state = vars(TrainingState(weights_only=True))
    write_durably(folder / STATE_FILE, json.dumps(state, indent=1))
    if model.origin is not None:
        write_durably(folder / ORIGIN_FILE, json.dumps(dataclasses.asdict(model.origin), indent=1))
    write_manifest(folder, {})


def _sections(model: StoredModel, slices: list[CheckpointSlice]) -> Iterator[NewTensor]:
    """The sections of each tensor in turn; a tensor is read once for all of them."""
    read: tuple[str, Tensor] | None = None
    order = {name: place for place, name in enumerate(model.tensors)}
    for part in sorted(slices, key=lambda each: order[each.name]):
        if read is None or read[0] != part.name:
            read = None  # frees the one before it first
            read = (part.name, model.tensors[part.name].read())
        rows = read[1] if part.rows is None else read[1][part.rows]
        yield NewTensor(part.key, part.shape, model.tensors[part.name].dtype, lambda rows=rows: rows)
