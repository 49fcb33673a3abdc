"""Reads and writes the tensors of a distributed checkpoint one by one, without a model, an optimizer or process groups.

The files are those of ``torch.distributed.checkpoint`` as Megatron-Core's ``torch_dist`` format uses it: ``.metadata``
says which file holds which block of which tensor, a ``.distcp`` file holds one ``torch.save`` after another. The
metadata is a pickle; it is read by an unpickler that knows nothing but its few record types, so a malicious file is
refused and nothing in it runs.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_implicit.errors import CheckpointError

METADATA_FILE, TENSOR_FILE, COMMON_FILE, FORMAT_FILE = ".metadata", "__0_0.distcp", "common.pt", "metadata.json"
_RECORDS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem",
                                             "WriteItemType"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""The types a checkpoint's metadata is made of, by module."""


class TensorInfo(NamedTuple):
    """What the metadata says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointTensors:
    """The tensors of a step's folder, read on demand from whatever layout saved them.

    Raises:
        CheckpointError: the metadata is missing, damaged or unsafe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_metadata(folder / METADATA_FILE)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places = metadata.storage_data
        self.info = {key: TensorInfo(tuple(t.size), t.properties.dtype) for key, t in self._tensors.items()}
        """Shape and dtype by key, optimizer state included."""

    def read(self, key: str, into: Optional[Tensor] = None) -> Tensor:
        """One whole tensor, put together from its blocks.

        Args:
            key: name in the checkpoint.
            into: where to write it; None returns a new tensor.

        Raises:
            CheckpointError: a block is missing or damaged.
        """
        chunks = self._tensors[key].chunks
        if into is None and len(chunks) == 1:
            return self._read_block(key, chunks[0])
        shape, dtype = self.info[key]
        whole = torch.empty(shape, dtype=dtype) if into is None else into.view(shape)
        for chunk in chunks:
            part = whole
            for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                part = part.narrow(axis, offset, size)
            part.copy_(self._read_block(key, chunk))
        return whole

    def _read_block(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places.get(MetadataIndex(key, chunk.offsets))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"{self.folder / METADATA_FILE} gives no file for {key}: take another checkpoint")
        file = self.folder / place.relative_path
        try:
            with open(file, "rb") as whole:
                tensor = torch.load(_Window(whole, place.offset, place.length), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing, it holds {key}: take another checkpoint") from None
        except Exception as error:  # the unpickler raises many kinds
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{file}: {key} cannot be read ({reason}): it is damaged or unsafe") from None
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes or tensor.dtype != self.info[key].dtype:
            raise CheckpointError(f"{file}: {key} is not what {METADATA_FILE} says: take another checkpoint")
        return tensor.detach()


class _Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the metadata's own record types and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _RECORDS.get(module, ()) and "." not in name
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_metadata(file: Path) -> Metadata:
    try:
        with open(file, "rb") as content:
            metadata = _MetadataUnpickler(content).load()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: take another checkpoint") from None
    except Exception as error:  # the unpickler raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason}): it is damaged or unsafe") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} is not the metadata of a checkpoint: take another checkpoint")
    return metadata


def refuse_unsafe_pickles(folder: Path) -> None:
    """Reads, with unpicklers that run nothing, what Megatron-Core is going to unpickle to load a model's weights.

    Weights are passed on among strangers, and a checksum says nothing of what a file does.

    Raises:
        CheckpointError: a file asks for more than a checkpoint's own types.
    """
    metadata = _read_metadata(folder / METADATA_FILE)
    file = folder / COMMON_FILE
    if not file.exists() and any(key.startswith("common_state/") for key in metadata.state_dict_metadata):
        return  # Megatron-Core 0.19 keeps it among the shards, and reads it with weights_only
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason}): it is damaged or unsafe") from None


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is going to be written whole, in one block."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_checkpoint_tensors(folder: Path, tensors: Iterable[NewTensor]) -> None:
    """Writes tensors as a distributed checkpoint that any layout loads: data, metadata, and no training state."""
    entries, places = {}, {}
    with open(folder / TENSOR_FILE, "xb") as output:
        for tensor in tensors:
            start, shape = output.tell(), torch.Size(tensor.shape)
            _save_alone(tensor.read().reshape(shape), output)
            origin = torch.Size([0] * len(shape))
            entries[tensor.key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), shape, [ChunkStorageMetadata(origin, shape)]
            )
            index = MetadataIndex(tensor.key, origin)
            places[index] = _StorageInfo(TENSOR_FILE, start, output.tell() - start)
    with open(folder / METADATA_FILE, "xb") as output:
        pickle.dump(Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version="1.0.0"), output)
    torch.save({}, folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
        '"common_backend": "torch", "common_backend_version": 1}',
        encoding="utf-8",
    )


def _save_alone(tensor: Tensor, output: BinaryIO) -> None:
    """``torch.save`` without the rest of the storage that a view belongs to, and without a copy."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    torch.save(torch.from_numpy(flat.numpy()).view(tensor.dtype).reshape(tensor.shape), output)


def model_keys(keys: Sequence[str]) -> list[str]:
    """Those of a checkpoint's keys that are the model's."""
    return [key for key in keys if not key.startswith(("optimizer.", "chained_", "random"))]
