"""Registration of exporters: files that Prometheus' file_sd reads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from pathlib import Path

from megatron_implicit.telemetry.sinks.base import Identity


class Target:
    """The file of one node's exporter of a run. A later job of the run on that node replaces it, and the first rank
    of a job removes those that an earlier job left behind."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder, self._identity = folder, identity
        self._stem = re.sub(r"[^\w.-]", "_", identity.run_id)
        self.path = folder / f"{self._stem}@{re.sub(r'[^A-Za-z0-9_.-]', '_', identity.node)}.json"

    def register(self, port: int) -> None:
        """Announces the exporter of this node on a port."""
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = self._identity
        labels = {"run": identity.run, "job": identity.job, "node": identity.node, "attempt": str(identity.attempt)}
        content = [{"targets": [f"{reachable_address()}:{port}"], "labels": labels}]
        partial = self.path.with_suffix(".new")
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self.path)
        if identity.rank == 0:
            self._remove_leftovers()

    def remove(self) -> None:
        """The job has ended; a file that another job has written meanwhile stays."""
        if _attempt_of(self.path) == self._identity.attempt:
            self.path.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for path in self._folder.glob(f"{self._stem}@*.json"):
            if _attempt_of(path) < self._identity.attempt:
                path.unlink(missing_ok=True)


def _attempt_of(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError, LookupError):
        return int(json.loads(path.read_text(encoding="utf-8"))[0]["labels"]["attempt"])
    return -1


def reachable_address() -> str:
    """An address by which other machines reach this one: its host's, unless the name means only this machine; then
    the one it reaches the job's first node from."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    first = os.environ.get("MASTER_ADDR", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((first, 9))  # sends nothing
        if not probe.getsockname()[0].startswith("127."):
            return probe.getsockname()[0]
    return address
