"""Arrays that are computed once, kept on disk and memory-mapped by every process.

An entry is complete when its description exists. It is built under temporary names and moved, the description last:
a killed process leaves no half of an entry, two that build the same one do no harm, and no lock is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_implicit.data.publishing import sync
from megatron_implicit.errors import DataError

Arrays = dict[str, np.ndarray]

FORMAT = 1
"""Part of every description: another way to compute the arrays must not meet old ones."""


class IndexCache:
    """The entries in one folder.

    Args:
        folder: made where it is missing.
        may_build: whether a missing entry may be computed here; in a distributed job only rank 0 does.
    """

    def __init__(self, folder: Path, may_build: bool) -> None:
        self.folder = folder
        self.may_build = may_build
        self.built = 0
        """Entries computed here."""

    def get(self, kind: str, description: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays of an entry, memory-mapped.

        Args:
            kind: begins the names of its files.
            description: all that the arrays depend on, as JSON.
            build: computes them.

        Raises:
            DataError: the entry is missing and may not be built, or cannot be written.
        """
        text = json.dumps({"format": FORMAT, **description}, sort_keys=True, indent=1)
        base = f"{kind}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:32]}"
        if not (self.folder / f"{base}.json").is_file():
            self._build(base, text, build)
        names = json.loads((self.folder / f"{base}.json").read_text(encoding="utf-8"))["arrays"]
        return {name: np.load(self.folder / f"{base}.{name}.npy", mmap_mode="r") for name in names}

    def _build(self, base: str, text: str, build: Callable[[], Arrays]) -> None:
        if not self.may_build:
            raise DataError(
                f"this rank does not see the sample indices that rank 0 wrote to {self.folder}; set"
                " data.cache_dir to a folder that all nodes share"
            )
        arrays = build()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=self.folder) as folder:
                for name, array in arrays.items():
                    np.save(Path(folder) / f"{base}.{name}.npy", array)
                content = json.dumps({"arrays": list(arrays), "description": json.loads(text)}, indent=1)
                (Path(folder) / f"{base}.json").write_text(content, encoding="utf-8")
                for file in (*(f"{base}.{name}.npy" for name in arrays), f"{base}.json"):
                    sync(Path(folder) / file)
                    os.replace(Path(folder) / file, self.folder / file)
        except OSError as error:
            raise DataError(
                f"cannot write sample indices to {self.folder}: {error.strerror}; set data.cache_dir to a"
                " folder with space that can be written"
            ) from error
        self.built += 1
