"""Time and memory of converting a model of a given size, made up for the purpose, there and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_implicit.config import Config
from megatron_implicit.conversion.layout import model_layout
from megatron_implicit.conversion.reference_config import reference_config
from megatron_implicit.conversion.tensor_writers import Entry, write_safetensors
from megatron_implicit.errors import CheckpointError

_SAMPLE_SECONDS = 0.02


class ConversionBenchmark:
    """Converts a made-up model from ``reference`` to ``megatron`` and back, each in a process of its own.

    Args:
        config: of the model, resolved, with a vocabulary.
        folder: where there is room for three copies of it; what is written there is removed again.
        command: the converter, as a user calls it.
    """

    def __init__(self, config: Config, folder: Path, command: list[str]) -> None:
        self.config, self.folder, self.command = config, folder, command

    def run(self) -> dict[str, Any]:
        """Seconds and peak anonymous memory of each way, in bytes."""
        names = [self.folder / name for name in ("made-up", "there", "back")]
        try:
            shapes = model_layout(self.config).shapes()
            self._make_up(names[0], shapes)
            there = self._measure("reference", "megatron", names[0], names[1])
            back = self._measure("megatron", "reference", names[1], names[2])
        finally:
            for name in names:
                shutil.rmtree(name, ignore_errors=True)
        elements = [torch.Size(shape).numel() for shape in shapes.values()]
        return {
            "family": self.config.model.family, "parameters": sum(elements), "weights_bytes": 4 * sum(elements),
            "largest_tensor_bytes": 4 * max(elements), "reference_to_megatron": there, "megatron_to_reference": back,
        }  # fmt: skip

    def _make_up(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(reference_config(self.config)), encoding="utf-8")
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator)

        write_safetensors(
            folder, [Entry(name, shape, torch.float32, lambda s=shape: draw(s)) for name, shape in shapes.items()]
        )

    def _measure(self, source: str, target: str, read: Path, written: Path) -> dict[str, float]:
        arguments = ["--from", source, "--to", target, "--input", str(read), "--output", str(written)]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *self.command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        peak = _PeakMemory(process.pid)
        peak.start()
        _, errors = process.communicate()
        seconds = time.monotonic() - start
        if process.returncode:
            raise CheckpointError(f"the conversion from {source} to {target} failed: {errors.strip()[-300:]}")
        return {"seconds": round(seconds, 1), "peak_anonymous_bytes": peak.result()}


class _PeakMemory(threading.Thread):
    """Samples a process's anonymous memory (what it cannot give back by dropping pages of files) until it ends."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._status, self._peak = Path(f"/proc/{process}/status"), 0

    def run(self) -> None:
        """Samples."""
        while True:
            try:
                lines = self._status.read_text(encoding="ascii").splitlines()
            except OSError:
                return
            values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
            if not values:  # ended, and not yet collected
                return
            self._peak = max(self._peak, values[0])
            time.sleep(_SAMPLE_SECONDS)

    def result(self) -> int:
        """The largest sample, in bytes."""
        self.join(timeout=5)
        return self._peak
