"""Renaming of tensors between a format and the reference, by tables of whole names and of names within a layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Optional

from megatron_implicit.conversion.stored import EMBEDDING, HEAD, StoredModel, StoredTensor
from megatron_implicit.conversion.tensor_writers import Entry

_REFERENCE_LAYER = re.compile(r"^backbone\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Naming:
    """The names of a format."""

    whole: Mapping[str, str]
    """The reference's name -> the format's, outside the layers; the first of several that mean the same is written."""
    layers: str
    """The format's prefix of a layer, before its number."""
    inner: Mapping[str, str]
    """Within a layer: the reference's name -> the format's. Empty means they are the same."""
    head: tuple[str, ...]
    """The format's names of the output head; the first is written."""
    aliases: Mapping[str, str]
    """Older names of the format -> its present ones."""
    buffers: tuple[str, ...] = ()
    """Ends of names that hold no weights but what a program computes anew."""
    endings: Mapping[str, str] = field(default_factory=dict)
    """The last part of the reference's names -> the format's, where it differs."""

    def to_reference(
        self, stored: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, StoredTensor], Optional[StoredTensor], dict[str, str]]:
        """(tensors by the reference's names, the output head, what holds no weights); unknown names stay."""
        back = {theirs: ours for ours, theirs in self.whole.items()}
        inner = {theirs: ours for ours, theirs in self.inner.items()}
        layer = re.compile(rf"^{re.escape(self.layers)}(\d+)\.(.+)$")
        tensors, head, unmapped = {}, None, {}
        for key, tensor in stored.items():
            name = _with_ending(self.aliases.get(key, key), {new: old for old, new in self.endings.items()})
            match = layer.match(name)
            if name in self.head:
                head = tensor
            elif self.buffers and name.endswith(self.buffers):
                unmapped[key] = "computed anew by every program"
            elif name in back:
                tensors[back[name]] = tensor
            elif match and (not inner or match[2] in inner):
                tensors[f"backbone.layers.{match[1]}.{inner.get(match[2], match[2])}"] = tensor
            else:
                tensors[name] = tensor
        return tensors, head, unmapped

    def to_format(self, name: str) -> str:
        """The format's name of a tensor."""
        if name == HEAD:
            return self.head[0]
        name = _with_ending(name, self.endings)
        match = _REFERENCE_LAYER.match(name)
        if match is None:
            return self.whole.get(name, name)
        return f"{self.layers}{match[1]}.{self.inner.get(match[2], match[2])}"

    def entries(self, model: StoredModel, repeated_head: bool = False) -> list[Entry]:
        """What to write, in the model's order; with a tied model's head as a copy of the embedding if asked to."""
        entries = [Entry(self.to_format(name), t.shape, t.dtype, t.read) for name, t in model.tensors.items()]
        if repeated_head and HEAD not in model.tensors:
            embedding = model.tensors[EMBEDDING]
            entries.append(Entry(self.head[0], embedding.shape, embedding.dtype, embedding.read))
        return entries


def _with_ending(name: str, endings: Mapping[str, str]) -> str:
    owner, _, last = name.rpartition(".")
    return f"{owner}.{endings[last]}" if last in endings else name


COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""Files of a folder that belong to its model and are handed on with it."""


def companions(folder: Path) -> list[Path]:
    """Those files of a folder."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]
