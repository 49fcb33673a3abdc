"""Opening and reading an index of the length of the deduplicated Pile. Its tokens are a hole in a file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_implicit.data.index_file import write_index
from megatron_implicit.data.indexed import file_sha256
from megatron_implicit.data.manifest import Manifest, dataset_files

REPOSITORY = Path(__file__).parents[2]
MEASURE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data import datasets
class Tokenizer:
    vocab_size, eod, fingerprint = 50277, 0, "neox"
def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
data = DataConfig(path=sys.argv[2], sequence_length=2048, split=[0.999, 0.0, 0.001])
before, start = status("VmRSS"), time.monotonic()
opened = datasets.open_datasets(
    data, Tokenizer(), train_samples=int(sys.argv[3]), validation_samples=0, test_samples=None, seed=1
)
seconds, resident = time.monotonic() - start, status("VmRSS")
order = np.random.default_rng(0).integers(0, len(opened.train), 3000)
begin, cpu = time.monotonic(), time.process_time()
tokens = sum(opened.train[int(i)]["tokens"].numel() for i in order)
print(json.dumps({
    "open_s": seconds, "resident_mb": resident, "opening_mb": resident - before, "anonymous_mb": status("RssAnon"),
    "tokens_per_s": tokens / (time.monotonic() - begin), "tokens_per_cpu_s": tokens / (time.process_time() - cpu),
    "samples": len(opened.train), "test_samples": len(opened.test),
}))
"""


def write_synthetic(prefix: Path, documents: int, mean: float) -> int:
    """A dataset of log-normal lengths whose .bin file is a hole; returns its tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, documents).clip(2, 2**20).astype(np.int32)
    tokens = int(lengths.sum(dtype=np.int64))
    bin_path, idx_path, manifest_path = dataset_files(prefix)
    write_index(idx_path, lengths, np.dtype(np.uint16))
    with open(bin_path, "wb") as file:
        os.truncate(file.fileno(), 2 * tokens)
    manifest = Manifest(
        "neox", 50277, 0, documents, tokens, 4 * tokens, "uint16", 2 * tokens, "hole", idx_path.stat().st_size,
        file_sha256(idx_path),
    )  # fmt: skip
    manifest_path.write_text(manifest.to_json())
    return tokens


def measure(prefix: Path, samples: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(REPOSITORY), str(prefix), str(samples)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("documents", "least"),
    [(200_000, 2e8), pytest.param(134_000_000, 2.07e11, marks=pytest.mark.acceptance)],
    ids=["small", "207B"],
)
def test_a_built_index_opens_at_once_and_is_read_fast(
    documents: int, least: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))  # gigabytes
    tokens = write_synthetic(tmp_path / "d", documents, 1560)
    assert tokens >= least
    samples = int(tokens * 0.998) // 2048
    built = measure(tmp_path / "d", samples)
    measured = measure(tmp_path / "d", samples)
    print("\nbuilding", built, "\nopening ", measured)
    assert measured["samples"] >= samples and measured["test_samples"] > 0
    assert measured["open_s"] <= 5 and measured["resident_mb"] <= 500
    assert measured["tokens_per_cpu_s"] >= 1e6
