"""The formats that models come in from and leave to: one module each, all with the same two functions.

``open`` reads a folder's configuration and names its tensors as the reference does; ``write`` puts such a model into an
empty folder, one tensor at a time. ``megatron`` is our distributed checkpoint, ``reference`` the folder of the paper's
public implementation, ``huggingface`` Llama and Mamba2 as in transformers, and implicit models with the code they need,
``mamba_ssm`` the state-spaces/mamba2 folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_implicit.conversion.formats import huggingface, mamba_ssm, megatron, reference
from megatron_implicit.conversion.stored import StoredModel
from megatron_implicit.conversion.tensor_files import read_json
from megatron_implicit.errors import CheckpointError


@dataclass(frozen=True)
class Format:
    """A way to keep a model in a folder."""

    recognises: Callable[[Path], bool]
    """Whether a folder looks like this format."""
    open: Callable[[Path], StoredModel]
    write: Callable[[StoredModel, Path], None]


FORMATS = {
    "megatron": Format(megatron.recognises, megatron.open_folder, megatron.write_folder),
    "reference": Format(reference.recognises, reference.open_folder, reference.write_folder),
    "hf": Format(huggingface.recognises, huggingface.open_folder, huggingface.write_folder),
    "mamba_ssm": Format(mamba_ssm.recognises, mamba_ssm.open_folder, mamba_ssm.write_folder),
}


def open_model(folder: Path, name: str) -> StoredModel:
    """Opens a folder as a format.

    Raises:
        CheckpointError: it is not of this format, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: check the path")
    if not FORMATS[name].recognises(folder):
        other = recognise(folder)
        if other is None and (folder / "config.json").is_file():
            read_json(folder / "config.json")  # names what is wrong with a damaged one
        hint = f"it looks like {other}" if other else "it has neither a config.json of a known model nor a checkpoint"
        raise CheckpointError(f"{folder} is not in the format {name}: {hint}")
    return FORMATS[name].open(folder)


def recognise(folder: Path) -> str | None:
    """The format of a folder; None if it is of none."""
    return next((name for name, kind in FORMATS.items() if kind.recognises(folder)), None)
