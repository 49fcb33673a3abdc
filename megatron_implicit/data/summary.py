"""FOLDER/manifest.json: the sum over the datasets of a folder. Its presence says that all of them were finished."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_implicit.data.manifest import Manifest
from megatron_implicit.data.publishing import sync
from megatron_implicit.data.shards import Shard


def write_summary(folder: Path, shards: Sequence[Shard], manifests: Sequence[Manifest]) -> None:
    """Writes it in one move."""
    skipped: dict[str, int] = {}
    for manifest in manifests:
        for reason, count in manifest.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    summary = {
        "tokenizer": manifests[0].tokenizer,
        "shards": [
            {"name": shard.prefix.name, "documents": manifest.documents, "tokens": manifest.tokens}
            for shard, manifest in zip(shards, manifests)
        ],
        "documents": sum(manifest.documents for manifest in manifests),
        "tokens": sum(manifest.tokens for manifest in manifests),
        "text_bytes": sum(manifest.text_bytes for manifest in manifests),
        "source_bytes": sum(source.bytes for manifest in manifests for source in manifest.sources),
        "skipped": skipped,
    }
    path = folder / "manifest.json"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
