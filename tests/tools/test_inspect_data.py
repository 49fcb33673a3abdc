from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_implicit.data.corpus import CorpusReader, find_sources
from megatron_implicit.data.indexed import read_manifest
from megatron_implicit.data.tokenizers import train_sentencepiece


@pytest.fixture
def prepared(work: Any, corpus: Path) -> Path:
    """A folder d of three datasets, and a blend of two of them."""
    texts = list(CorpusReader(find_sources([str(corpus)])))
    train_sentencepiece(texts[:800], work.folder / "tokenizer.model", 1000)
    (work.folder / "bad.jsonl").write_bytes(b'{"text": "one two three"}\n{"text": ""}\n')
    inputs = (corpus / "devil.jsonl.zst", corpus / "jargon.jsonl.zst", "bad.jsonl")
    done = work.run("preprocess_data", "--input", *inputs, "--tokenizer", "tokenizer.model", "--output-dir", "d")
    assert done.returncode == 3, done
    blend = {"one": {"path": "d/devil", "epochs": 3}, "two": {"path": "d/jargon"}}
    (work.folder / "blend.yaml").write_text(yaml.safe_dump({"datasets": blend}))
    return work.folder


def test_a_folder_is_counted_sampled_and_drawn(work: Any, prepared: Path) -> None:
    done = work.run("inspect_data", "d", "--samples", 2)
    assert (done.returncode, done.stderr) == (0, "")
    manifests = [read_manifest(prepared / "d" / name) for name in ("bad", "devil", "jargon")]
    assert f"{sum(manifest.documents for manifest in manifests):,}" in done.stdout
    assert f"{sum(manifest.tokens for manifest in manifests):,}" in done.stdout
    assert "d: 1 records left out: empty text" in done.stdout
    assert done.stdout.count(", document ") == 2 and "of 1,000 ids" in done.stdout
    assert (prepared / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_blend_shows_each_dataset_and_its_share(work: Any, prepared: Path) -> None:
    options = ("--samples", 1, "--plot", "out/blend.png", "--tokenizer", "tokenizer.model")
    done = work.run("inspect_data", "blend.yaml", *options)
    assert done.returncode == 0, done.stderr
    sizes = [3 * read_manifest(prepared / "d" / "devil").tokens, read_manifest(prepared / "d" / "jargon").tokens]
    for size in sizes:
        assert f"{size / sum(sizes):.1%}" in done.stdout
    assert done.stdout.count(", document ") == 2 and (prepared / "out" / "blend.png").exists()


def test_what_is_missing_is_named(work: Any, prepared: Path) -> None:
    work.fails("nowhere", "inspect_data", "nowhere", "--tokenizer", "tokenizer.model")
    work.fails("blend.yaml", "inspect_data", "nowhere/blend.yaml", "--tokenizer", "tokenizer.model")
    work.fails("no dataset at data.path blend2/x", "inspect_data", "blend2/x")


def test_indices_are_built_ahead(work: Any, prepared: Path) -> None:
    config = Path(__file__).parents[2] / "launch" / "configs" / "implicit_llama_tiny.yaml"
    command = ("preprocess_data", "build-index", f"--config={config}", "--data.path=d")
    first = work.run(*command)
    assert first.returncode == 0, first.stderr
    cached = {path: path.stat().st_mtime_ns for path in (prepared / "d" / "cache").iterdir()}
    assert len(list((prepared / "d" / "cache").glob("samples-*.json"))) == 4  # two datasets, train and validation
    assert work.run(*command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (prepared / "d" / "cache").iterdir()} == cached
    work.fails("unknown", "preprocess_data", "build-index", f"--config={config}", "--data.pth=d", code=2)
