"""Manifests: what NAME.json says about NAME.bin and NAME.idx, and of what could not be used of its sources.

A manifest is written last, so a dataset without one was never finished. It holds no time and no path: equal inputs give
equal manifests.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Union

from megatron_implicit.data.corpus import BadRecord, Reading
from megatron_implicit.errors import DataError

PathLike = Union[str, "os.PathLike[str]"]

FORMAT = 2
"""Version of the manifest."""
REMEDY = "write it again with tools/preprocess_data.py --overwrite"

_LISTED = 100
"""Skipped records that a manifest names; all are counted."""


@dataclass(frozen=True)
class Source:
    """A file that a dataset was made from."""

    name: str
    """File name without folders, so that a moved corpus is still the same."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SkippedRecord:
    """A record of a source that gave no document."""

    source: str
    line: int
    """Line or row, counted from 1; 0 for the file as a whole."""
    reason: str


@dataclass
class SkippedRecords:
    """Counts skipped records by reason and lists the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    listed: list[SkippedRecord] = field(default_factory=list)

    def add(self, source: Path, record: BadRecord) -> None:
        """Takes one record into account."""
        self.counts[record.reason] = self.counts.get(record.reason, 0) + 1
        if len(self.listed) < _LISTED:
            self.listed.append(SkippedRecord(source.name, record.line, record.reason))

    def extend(self, manifest: Manifest) -> None:
        """Takes those of another dataset into account, in order."""
        for reason, count in manifest.skipped.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.listed = [*self.listed, *manifest.skipped_records][:_LISTED]


@dataclass(frozen=True)
class Manifest:
    """What is known of a dataset. One without documents has a manifest and no other file."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    eod: int
    """Id at the end of every document."""
    documents: int
    tokens: int
    """Ends of documents included."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    dtype: str
    """numpy name of the type of one token in the .bin file."""
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    sources: list[Source] = field(default_factory=list)
    reading: Reading = Reading()
    """How the sources were read."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records of the sources that gave no document: reason and how many."""
    skipped_records: list[SkippedRecord] = field(default_factory=list)
    """The first of them."""
    format: int = FORMAT

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self), indent=2) + "\n"


def dataset_files(prefix: PathLike) -> tuple[Path, Path, Path]:
    """The .bin file, .idx file and manifest of the dataset ``prefix`` (a path without suffix)."""
    base = os.fspath(prefix)
    return Path(base + ".bin"), Path(base + ".idx"), Path(base + ".json")


def read_manifest(prefix: PathLike) -> Manifest:
    """The manifest of dataset ``prefix``.

    Raises:
        DataError: it is missing or damaged.
    """
    path = dataset_files(prefix)[2]
    try:
        fields = json.loads(path.read_bytes())
        version = fields["format"]
        if version != FORMAT:
            raise DataError(f"manifest {path} has format {version}, this version reads {FORMAT}; {REMEDY}")
        fields["sources"] = [Source(**source) for source in fields["sources"]]
        fields["skipped_records"] = [SkippedRecord(**record) for record in fields["skipped_records"]]
        return Manifest(**fields | {"reading": Reading(**fields["reading"])})
    except FileNotFoundError as error:
        raise DataError(
            f"dataset {os.fspath(prefix)} is missing or was never finished (no {path}); write it with"
            " tools/preprocess_data.py"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"manifest {path} is damaged; {REMEDY}") from error
