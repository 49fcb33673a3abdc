"""A tokenizer trained on the shipped corpus and two datasets made with it, shared by the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_implicit.data.corpus import CorpusReader, find_sources
from megatron_implicit.data.indexed import IndexedDatasetWriter
from megatron_implicit.data.tokenizers import Tokenizer, train_sentencepiece

CORPUS = Path(__file__).parents[2] / "launch" / "corpus"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Every document of the shipped corpus."""
    return list(CorpusReader(find_sources([str(CORPUS)])))


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 2048)


@pytest.fixture(scope="session")
def documents(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the first 900 documents."""
    return [tokenizer.encode(text) for text in texts[:900]]


@pytest.fixture(scope="session")
def written(documents: list[list[int]], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets large (700 documents) and small (200); not to be changed."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, part in (("large", documents[:700]), ("small", documents[700:])):
        with IndexedDatasetWriter(folder / name, tokenizer) as writer:
            for ids in part:
                writer.add_document(ids)
            writer.finish()
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of ``written`` that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "data", ignore=shutil.ignore_patterns("cache")))
