"""Preparing data over two nodes of a real Slurm."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import orjson
import pytest
import zstandard

from megatron_implicit.data.corpus import CorpusReader, find_sources
from megatron_implicit.data.tokenizers import train_sentencepiece
from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "preprocess_data.py"

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and six shards."""
    folder = tmp_path_factory.mktemp("material")
    texts = list(CorpusReader(find_sources([str(REPOSITORY / "launch" / "corpus")])))
    train_sentencepiece(texts[:800], folder / "tokenizer.model", 1000)
    (folder / "corpus").mkdir()
    for number in range(6):
        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts[number * 300 : (number + 1) * 300])
        (folder / "corpus" / f"part{number}.jsonl.zst").write_bytes(zstandard.compress(lines))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arguments(material: Path, output: Path) -> list[object]:
    return [
        sys.executable, TOOL, "--input", material / "corpus", "--tokenizer", material / "tokenizer.model",
        "--output-dir", output,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(material: Path, cluster: Cluster) -> dict[str, bytes]:
    done = cluster.run(*arguments(material, material / "expected"))
    assert done.returncode == 0, done.stderr
    return contents(material / "expected")


def test_srun_over_two_nodes_writes_the_bytes_of_one_process(
    cluster: Cluster, material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    launched = ("srun", "--mpi=pmix", "-N", 2, "-n", 2)
    nodes = cluster.run(*launched, sys.executable, "-c", PLACE)
    assert sorted(nodes.stdout.split()) == ["0/2@n1", "1/2@n2"], nodes
    done = cluster.run(*launched, *arguments(material, tmp_path / "d"), "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1,800 documents") == 1
    assert contents(tmp_path / "d") == expected


PLACE = (
    "from mpi4py import MPI; import socket; w = MPI.COMM_WORLD;"
    " print(f'{w.Get_rank()}/{w.Get_size()}@{socket.gethostname()}')"
)


def test_srun_without_mpi_is_refused(cluster: Cluster, material: Path, tmp_path: Path) -> None:
    done = cluster.run("srun", "--mpi=none", "-N", 2, "-n", 2, *arguments(material, tmp_path / "d"))
    assert done.returncode and "srun --mpi=pmix" in done.stderr, done
    assert not (tmp_path / "d").exists()


def submit(cluster: Cluster, material: Path, output: Path, *options: str, **variables: object) -> str:
    submitted = cluster.run(
        "sbatch", "--parsable", "--cpus-per-task=1", f"--chdir={REPOSITORY}", f"--output={output.parent}/job-%j.out",
        *options, REPOSITORY / "SLURM" / "preprocess_pile.sbatch",
        INPUT=f"{material}/corpus/*.jsonl.zst", TOKENIZER=material / "tokenizer.model", OUTPUT=output,
        PYTHON=sys.executable, SLURM_SUBMIT_DIR=REPOSITORY, **variables,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def test_the_batch_script_finishes_a_job_that_was_requeued(
    cluster: Cluster, material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import os, time\n"
        "import megatron_implicit.data.tokenizers as t\n"
        "encode = t.SentencePieceTokenizer.encode\n"
        "if not os.environ.get('SLURM_RESTART_COUNT'):\n"
        "    t.SentencePieceTokenizer.encode = lambda self, text: (time.sleep(0.01), encode(self, text))[1]\n"
    )
    output = tmp_path / "d"
    job = submit(cluster, material, output, PYTHONPATH=f"{tmp_path / 'slow'}:{REPOSITORY}")
    deadline = time.monotonic() + 60
    while not list(output.glob("part*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    made = set(path.name for path in output.glob("part*.json"))
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("part*.json")}
    assert made and len(made) < 6
    assert cluster.run("scancel", "-s", "USR1", "-b", job).returncode == 0  # what Slurm sends before the time is over
    state = cluster.wait(job)
    log = (tmp_path / f"job-{job}.out").read_text()
    assert state == ("COMPLETED", "0:0"), log
    assert "requeued as attempt 1" in log and contents(output) == expected
    assert all((output / name).stat().st_mtime_ns == times[name] for name in made)


def test_the_batch_script_passes_the_exit_code_on_and_names_what_is_not_set(
    cluster: Cluster, material: Path, tmp_path: Path
) -> None:
    shutil.copytree(material / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "bad.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n{"text": \n'))
    (tmp_path / "tokenizer.model").write_bytes((material / "tokenizer.model").read_bytes())
    incomplete = submit(cluster, tmp_path, tmp_path / "d")
    unset = cluster.run("sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/unset.out",
                        REPOSITORY / "SLURM" / "preprocess_pile.sbatch").stdout.strip()  # fmt: skip
    assert cluster.wait(incomplete) == ("FAILED", "3:0")
    assert "bad.jsonl.zst:2: not valid JSON" in (tmp_path / f"job-{incomplete}.out").read_text()
    assert cluster.wait(unset) == ("FAILED", "2:0")
    assert "set INPUT" in (tmp_path / "unset.out").read_text()
