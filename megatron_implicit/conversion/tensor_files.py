"""Weights of Hugging Face folders, tensor by tensor: safetensors first, pickles only with weights_only.

Files are memory-mapped: reading a tensor costs no memory of its own. A folder holds one file, or several with an index.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_implicit.conversion.stored import StoredTensor
from megatron_implicit.errors import CheckpointError

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""safetensors' names of dtypes."""


def open_tensor_files(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, by the names in its files.

    Raises:
        CheckpointError: no weights, a shard that is missing, or a damaged or unsafe file; by name.
    """
    for name, opened in ((SAFETENSORS, _open_safetensors), (PICKLE, _open_pickle)):
        if (folder / name).is_file():
            return opened(folder / name)
        if (folder / (name + _INDEX)).is_file():
            return _open_shards(folder, folder / (name + _INDEX), opened)
    raise CheckpointError(f"{folder} holds neither {SAFETENSORS} nor {PICKLE}: check the path")


def _open_shards(folder: Path, index: Path, opened: Any) -> dict[str, StoredTensor]:
    """The tensors that an index names, each from the shard it names."""
    places = _weight_map(index)
    shards = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard}, which is not a file beside it: copy the folder again")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing, {index.name} names it: copy the folder again")
        shards[shard] = opened(folder / shard)
    for key, shard in places.items():
        if key not in shards[shard]:
            raise CheckpointError(f"{folder / shard} lacks {key}, which {index.name} places there: copy it again")
    extra = sorted(key for shard in shards.values() for key in shard if key not in places)
    if extra:
        raise CheckpointError(f"{folder} holds {extra[0]}, which {index.name} does not name: copy the folder again")
    return {key: shards[shard][key] for key, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(shard) for key, shard in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} has no readable weight_map: copy the folder again") from None


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="pt")
        stored = {}
        for key in handle.keys():
            part = handle.get_slice(key)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{file}: {key} has dtype {part.get_dtype()}: weights are F32, BF16 or F16")
            stored[key] = StoredTensor(key, tuple(part.get_shape()), dtype, lambda key=key: handle.get_tensor(key))
        return stored
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)  # written before torch 1.6
    except Exception as error:  # the unpickler raises many kinds
        raise _unreadable(file, error) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is not a state dict of tensors: save model.state_dict() alone")
    return {
        str(key): StoredTensor(str(key), tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.detach())
        for key, tensor in content.items()
    }


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0]
    return CheckpointError(f"{file} cannot be read ({reason}): it is damaged or unsafe; copy it again")


# ---------------------------------------------------------------- config.json


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is missing or not one.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: check the path") from None
    except ValueError:
        raise CheckpointError(f"{file} is not valid JSON: copy the folder again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object: copy the folder again")
    return values


def peek_json(file: Path) -> dict[str, Any]:
    """As ``read_json``; empty where there is nothing readable."""
    try:
        return read_json(file)
    except (CheckpointError, OSError):
        return {}


def number_of_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Size of a tensor's data."""
    return math.prod(shape) * dtype.itemsize
