"""From one folder to another: opens, checks, writes beside the goal, compares what was written, then moves it there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch

from megatron_implicit.conversion.formats import FORMATS, open_model
from megatron_implicit.conversion.handing_on import hand_on_tokenizer
from megatron_implicit.conversion.implicit_start import start_implicit
from megatron_implicit.conversion.layout import model_layout
from megatron_implicit.conversion.stored import StoredModel, check_dtypes, check_shapes, largest_difference
from megatron_implicit.errors import CheckpointError, ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARE = 64 << 20
"""Bytes beyond the weights that a folder may need."""
Report = Callable[[int, int], None]
"""Called with tensors done and tensors in all."""


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that was converted."""

    name: str
    """The reference's name."""
    key: str
    """Name in the source."""
    shape: tuple[int, ...]
    dtype: str
    error: float
    """Largest absolute difference between source and result; 0 unless the dtype was changed."""


@dataclass
class ConversionReport:
    """What a conversion did."""

    source: str
    output: str
    family: str
    parameters: int = 0
    mapped: list[MappedTensor] = field(default_factory=list)
    unmapped: dict[str, str] = field(default_factory=dict)
    """Tensors of the source that were not needed, and why."""
    tokenizer: Optional[str] = None
    """The tokenizer file that was handed on; None if there was none."""

    def layers(self) -> dict[str, list[MappedTensor]]:
        """By layer; what is outside the layers under its first name."""
        groups: dict[str, list[MappedTensor]] = {}
        for tensor in self.mapped:
            parts = tensor.name.split(".")
            inside = parts[:2] == ["backbone", "layers"]
            groups.setdefault(f"layer {parts[2]}" if inside else ".".join(parts[:2]), []).append(tensor)
        return groups


def convert(
    source: StoredModel, name: str, output: Path, *, dtype: Optional[str] = None, report: Report = lambda *_: None
) -> ConversionReport:
    """Writes a model into a new folder.

    Args:
        source: as ``open_source`` returns it.
        name: the format to write.
        output: the new folder; it must not exist, or be empty.
        dtype: of all tensors; None keeps each one's.
        report: progress.

    Raises:
        CheckpointError: weights that do not fit their configuration, a model that the format cannot hold, or an
            output that exists; nothing is left behind.
    """
    shapes = model_layout(source.config).shapes()
    check_shapes(source.tensors, shapes, str(source.folder))
    check_dtypes(source.tensors, str(source.folder), dtype and DTYPES[dtype])
    source = dataclasses.replace(source, tensors={key: source.tensors[key] for key in shapes})
    target = source.converted(DTYPES[dtype]) if dtype else source
    _refuse_full_disk(output, sum(tensor.bytes for tensor in target.tensors.values()))
    result = ConversionReport(
        str(source.folder), str(output), source.config.model.family, unmapped=dict(source.unmapped)
    )
    with new_folder(output) as partial:
        result.tokenizer = hand_on_tokenizer(source, name, partial)
        FORMATS[name].write(target, partial)
        result.mapped = list(_compare(source, FORMATS[name].open(partial), dtype is None, report))
    result.parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return result


def open_source(folder: Path, name: str, *, implicit_from_explicit: bool = False) -> StoredModel:
    """Opens the folder to convert, as the start of an implicit model if asked to.

    Raises:
        CheckpointError: it is not of this format, or damaged.
        ConfigError: it is to start an implicit model and is one already.
    """
    source = open_model(folder, name)
    return start_implicit(source) if implicit_from_explicit else source


def _compare(source: StoredModel, written: StoredModel, exact: bool, report: Report) -> Iterator[MappedTensor]:
    """Reads back what was written, tensor by tensor."""
    for count, (name, tensor) in enumerate(source.tensors.items(), start=1):
        other = written.tensors.get(name)
        if other is None or tuple(other.shape) != tuple(tensor.shape):
            raise CheckpointError(f"{name} did not arrive: {written.folder} lacks it or has another shape")
        error = largest_difference(tensor.read(), other.read())
        if exact and error != 0.0:
            raise CheckpointError(f"{name} changed on its way by {error:.1e}: memory or disk are at fault; try again")
        yield MappedTensor(name, tensor.key, tuple(tensor.shape), str(other.dtype)[6:], error)
        report(count, len(source.tensors))


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place in the end; after an error nothing is left of it.

    Raises:
        ConfigError: ``output`` holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists: give a folder that does not, or an empty one")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    try:
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        yield partial
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_full_disk(output: Path, size: int) -> None:
    place = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < size + _SPARE:
        raise ConfigError(
            f"--output {output} needs {(size + _SPARE) / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB: free "
            "some, or convert to another disk"
        )
