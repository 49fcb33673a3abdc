"""A dataset's three files under temporary names, made durable and moved to their final ones together."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from megatron_implicit.data.manifest import Manifest, PathLike, dataset_files
from megatron_implicit.errors import DataError


class PartialDataset:
    """Temporary files of the dataset ``prefix``; a context manager that removes what was not published.

    The temporary names carry host and process, so two processes that prepare the same dataset by mistake do not write
    into each other's files. What a killed process left is removed.
    """

    def __init__(self, prefix: PathLike) -> None:
        self._final = dataset_files(prefix)
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._final[0].parent, self._final[0].stem)
        mark = f".{socket.gethostname()}-{os.getpid()}.partial"
        self.bin, self.idx, self._manifest = (path.with_name(path.name + mark) for path in self._final)

    def publish(self, manifest: Manifest) -> None:
        """Writes the manifest and moves all files to their names.

        At no moment does a manifest lie beside files it does not describe: the old one is removed first, the new one
        comes last.
        """
        folder = self._final[0].parent
        self._manifest.write_text(manifest.to_json(), encoding="utf-8")
        partial = (self.bin, self.idx, self._manifest) if manifest.documents else (self._manifest,)
        for path in partial:
            sync(path)
        self._final[2].unlink(missing_ok=True)
        if not manifest.documents:
            self._final[0].unlink(missing_ok=True)
            self._final[1].unlink(missing_ok=True)
        sync(folder)
        for path, final in zip(partial, self._final if manifest.documents else self._final[2:]):
            self._move(path, final)
        sync(folder)

    def _move(self, partial: Path, final: Path) -> None:
        try:
            os.replace(partial, final)
        except FileNotFoundError as error:
            raise DataError(
                f"another process prepares {final} at the same time and removed {partial.name}; run one at a time"
            ) from error

    def __enter__(self) -> PartialDataset:
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self.bin, self.idx, self._manifest):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, stem: str | None = None) -> None:
    """Removes temporary files of dead processes: of one dataset, or of all in ``folder``.

    Processes of other hosts count as dead: two jobs must not prepare the same datasets at the same time.
    """
    name = r".+" if stem is None else re.escape(stem)
    pattern = re.compile(name + r"\.(?:bin|idx|json)\.(.+)-(\d+)\.partial")
    for path in folder.iterdir() if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and not _lives(*match.groups()):
            path.unlink(missing_ok=True)


def _lives(host: str, process: str) -> bool:
    if host != socket.gethostname() or int(process) == os.getpid():
        return False
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(") ", 1)[1][0] != "Z"
