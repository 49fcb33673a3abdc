from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_implicit.data.corpus import CorpusReader, find_sources
from megatron_implicit.data.indexed import open_indexed
from megatron_implicit.data.tokenizers import train_sentencepiece


@pytest.fixture
def tokenizer(work: Any, jsonl: Path) -> str:
    """Name of a small tokenizer file in the workplace."""
    train_sentencepiece(CorpusReader([jsonl]), work.folder / "tokenizer.model", 300)
    return "tokenizer.model"


def test_the_shipped_corpus_becomes_a_dataset_that_decodes_to_it(work: Any, corpus: Path) -> None:
    reader = CorpusReader(find_sources([str(corpus)]))
    tokenizer = train_sentencepiece(reader, work.folder / "tokenizer.model", 4096)
    done = work.run("preprocess_data", "--input", corpus, "--tokenizer", "tokenizer.model", "--output", "out/corpus")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(work.contents()) == ["out/corpus.bin", "out/corpus.idx", "out/corpus.json", "tokenizer.model"]
    dataset = open_indexed(work.folder / "out" / "corpus", tokenizer)
    texts = list(reader)
    assert len(dataset) == len(texts) > 4000
    for text, ids in zip(texts, (dataset[i] for i in range(len(dataset)))):
        assert ids[-1] == tokenizer.eod
        assert tokenizer.decode(ids[:-1]) == text


def test_an_existing_dataset_is_kept_refused_or_overwritten(
    work: Any, jsonl: Path, tokenizer: str, corpus: Path
) -> None:
    command = ("preprocess_data", "--tokenizer", tokenizer, "--output", "d", "--input")
    assert "50 documents" in work.run(*command, jsonl).stdout
    before = work.contents()
    again = work.run(*command, "*.jsonl")
    assert again.returncode == 0 and "exists, up to date" in again.stdout
    assert work.contents() == before
    work.fails("add --overwrite", *command, corpus / "devil.jsonl.zst")
    train_sentencepiece(["other words to train another tokenizer on"] * 9, work.folder / "other.model", 290)
    work.fails("add --overwrite", *command, jsonl, "--tokenizer", "other.model")
    (work.folder / "other.model").unlink()
    (work.folder / "d.bin").write_bytes(b"damaged")
    work.fails("d.bin is damaged", *command, jsonl)
    assert work.run(*command, jsonl, "--overwrite").returncode == 0
    assert work.contents() == before


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("missing.jsonl", None, "no input file missing.jsonl"),
        ("empty.jsonl", b"", "no document with text"),
    ],
)
def test_input_without_text_is_one_line_and_leaves_nothing(
    file: str, content: bytes | None, words: str, work: Any, tokenizer: str
) -> None:
    if content is not None:
        (work.folder / file).write_bytes(content)
    work.fails(words, "preprocess_data", "--input", file, "--tokenizer", tokenizer, "--output", "d")


def test_a_tokenizer_that_is_missing_or_none_is_named(work: Any, jsonl: Path) -> None:
    command = ("preprocess_data", "--input", jsonl, "--output", "d", "--tokenizer")
    work.fails("cannot read tokenizer nowhere.model", *command, "nowhere.model")
    work.fails("small.jsonl is neither", *command, jsonl)


def test_wrong_usage_is_one_line_with_exit_code_2(work: Any) -> None:
    work.fails("--tokenizer", "preprocess_data", "--input", "a", "--output", "b", code=2)
    assert "--overwrite" in work.run("preprocess_data", "--help").stdout
