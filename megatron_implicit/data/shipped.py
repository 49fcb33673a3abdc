"""The corpus that comes with the repository, as the quickstart and the small experiments use it."""

from __future__ import annotations

from pathlib import Path

from megatron_implicit.data.corpus import CorpusReader, Reading, find_sources
from megatron_implicit.data.preparation import prepare_dataset
from megatron_implicit.data.shards import Recipe
from megatron_implicit.data.tokenizers import load_tokenizer, train_sentencepiece

CORPUS = Path(__file__).resolve().parents[2] / "launch" / "corpus"
VOCABULARY = 4096
"""Pieces of its tokenizer."""


def prepare_shipped_corpus(folder: Path) -> None:
    """Makes ``folder/tokenizer.model`` and the dataset ``folder/corpus``, byte for byte the quickstart's.

    What is there is left as it is; an interrupted preparation goes on where it was.

    Raises:
        DataError: the folder holds a dataset of something else.
    """
    sources, tokenizer = find_sources([str(CORPUS)]), folder / "tokenizer.model"
    if not tokenizer.is_file():
        train_sentencepiece(CorpusReader(sources), tokenizer, VOCABULARY)
    prepare_dataset(sources, Recipe(load_tokenizer(str(tokenizer)), Reading()), folder / "corpus")
