"""Writes weights as Hugging Face folders hold them, one tensor at a time: names and shapes first, then the data.

The readers' own writers take whole state dicts, which a large model has no memory for.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_implicit.conversion.tensor_files import NAMES, PICKLE, SAFETENSORS, number_of_bytes

SHARD_BYTES = 5_000_000_000
"""Most data of one safetensors file of an ``hf`` folder, as transformers divides it."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Any shape of the same number of elements."""

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return number_of_bytes(self.shape, self.dtype)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor, row by row."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(folder: Path, entries: Sequence[Entry], shard_bytes: int | None = None) -> None:
    """Writes ``model.safetensors``, or shards of at most ``shard_bytes`` with their index."""
    shards = _divide(entries, shard_bytes)
    if len(shards) == 1:
        _write_safetensors_file(folder / SAFETENSORS, entries)
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors_file(folder / name, shard)
        places |= {entry.key: name for entry in shard}
    index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": places}
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divide(entries: Sequence[Entry], shard_bytes: int | None) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shard_bytes is not None and shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_safetensors_file(file: Path, entries: Sequence[Entry]) -> None:
    """An 8-byte length, a JSON header of dtypes, shapes and offsets, then the data in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + entry.bytes],
        }  # fmt: skip
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(file, "xb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            output.write(raw_bytes(entry.read()))


def write_pickle(folder: Path, entries: Sequence[Entry]) -> None:
    """Writes ``pytorch_model.bin`` as ``torch.save`` of a state dict would: a zip archive of a pickle and storages."""
    with torch.serialization._open_zipfile_writer(str(folder / PICKLE)) as archive:
        content = _pickled_state_dict(entries)
        archive.write_record("data.pkl", content, len(content))
        archive.write_record("byteorder", "little", len("little"))
        for number, entry in enumerate(entries):
            tensor = entry.read().detach().contiguous().reshape(-1)
            # A storage of this tensor's data alone: the tensor may be a view of a whole mapped file.
            storage = torch.from_numpy(tensor.view(torch.uint8).numpy()).untyped_storage()
            archive.write_record(f"data/{number}", storage, storage.nbytes())


class _Storage:
    """Stands for a storage in the pickle; ``torch.load`` fills it from the archive's record of its number."""

    def __init__(self, number: int, dtype: torch.dtype, elements: int) -> None:
        self.reference = ("storage", _storage_class(dtype), str(number), "cpu", elements)


class _Tensor:
    """Stands for a tensor in the pickle."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.arguments = (storage, 0, shape, torch.empty(shape, device="meta").stride(), False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return thing.reference if isinstance(thing, _Storage) else None


def _pickled_state_dict(entries: Sequence[Entry]) -> bytes:
    state = OrderedDict()
    for number, entry in enumerate(entries):
        elements = entry.bytes // entry.dtype.itemsize
        state[entry.key] = _Tensor(_Storage(number, entry.dtype, elements), tuple(entry.shape))
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()


def _storage_class(dtype: torch.dtype) -> type:
    return {
        torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage,
    }[dtype]  # fmt: skip
