from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_implicit.data.index_file import write_index
from megatron_implicit.data.indexed import (
    IndexedDatasetWriter,
    check_indexed,
    dataset_fingerprint,
    find_prefixes,
    open_indexed,
    read_manifest,
)
from megatron_implicit.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_implicit.errors import DataError


def test_megatron_core_reads_back_exactly_the_tokens(
    documents: list[list[int]], tokenizer: Tokenizer, written: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(written / "large"))
    assert len(dataset) == 700
    for ids, stored in zip(documents, (dataset[i] for i in range(700))):
        assert stored.tolist() == [*ids, tokenizer.eod]
    manifest = read_manifest(written / "large")
    assert manifest.tokens == sum(len(ids) + 1 for ids in documents[:700]) == dataset.sequence_lengths.sum()
    assert (manifest.documents, manifest.vocab_size, manifest.dtype) == (700, 2048, "uint16")


def test_the_files_are_those_of_megatron_cores_builder(
    documents: list[list[int]], tokenizer: Tokenizer, written: Path, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.uint16)
    for ids in documents[:700]:
        builder.add_document([*ids, tokenizer.eod], [len(ids) + 1])
    builder.finalize(str(tmp_path / "own.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"own.{suffix}").read_bytes() == (written / f"large.{suffix}").read_bytes()


def test_nothing_is_left_and_nothing_replaced_when_writing_fails(tokenizer: Tokenizer, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(RuntimeError):
        with IndexedDatasetWriter(folder / "large", tokenizer) as writer:
            writer.add_document([1, 2, 3])
            raise RuntimeError("the reader failed")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    class Wide:
        vocab_size, eod, fingerprint = 70000, 69999, "wide"

    with IndexedDatasetWriter(tmp_path / "wide", Wide()) as writer:
        writer.add_document([65536, 5])
        writer.finish()
    dataset = open_indexed(tmp_path / "wide")
    assert dataset[0].tolist() == [65536, 5, 69999]


def damage_header(idx: Path) -> None:
    idx.write_bytes(b"garbage!!" + idx.read_bytes()[9:])


def damage_counts(idx: Path) -> None:
    content = bytearray(idx.read_bytes())
    content[18] ^= 1
    idx.write_bytes(content)


def damage_one_length(idx: Path) -> None:
    content = bytearray(idx.read_bytes())
    content[34 + 4 * 100] ^= 1
    idx.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("large.idx", damage_header, "large.idx is corrupt"),
        ("large.idx", damage_counts, "large.idx is corrupt"),
        ("large.idx", damage_one_length, "large.idx is corrupt"),
        ("large.idx", cut, "large.idx is truncated"),
        ("large.bin", cut, "large.bin is truncated"),
        ("large.bin", extend, "large.bin is longer"),
        ("large.idx", Path.unlink, "cannot read .*large.idx"),
        ("large.bin", Path.unlink, "cannot read .*large.bin"),
        ("large.json", Path.unlink, "missing or was never finished"),
        ("large.json", cut, "large.json is damaged"),
    ],
)
def test_a_damaged_dataset_is_refused_with_file_and_remedy(
    file: str, damage, words: str, folder: Path, tokenizer: Tokenizer
) -> None:
    damage(folder / file)
    with pytest.raises(DataError, match=words) as caught:
        check_indexed(folder / "large", tokenizer)
    assert "tools/preprocess_data.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_header_is_checked_even_where_the_index_is_not_read(folder: Path) -> None:
    damage_counts(folder / "large.idx")
    damage_one_length(folder / "small.idx")
    with pytest.raises(DataError, match="large.idx is corrupt: its header"):
        check_indexed(folder / "large", verify_index=False)
    check_indexed(folder / "small", verify_index=False)


def test_a_dataset_of_another_tokenizer_is_refused(folder: Path, texts: list[str], tmp_path: Path) -> None:
    other = train_sentencepiece(texts[:300], tmp_path / "other.model", 600)
    with pytest.raises(DataError, match="made with another tokenizer.*data.tokenizer"):
        open_indexed(folder / "large", other)


def test_the_fingerprint_follows_content_and_not_place(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert dataset_fingerprint(folder) == dataset_fingerprint(moved)
    assert dataset_fingerprint(folder) != dataset_fingerprint(folder / "large")
    manifest = json.loads((moved / "small.json").read_text())
    (moved / "small.json").write_text(json.dumps(manifest | {"bin_sha256": "0" * 64}))
    assert dataset_fingerprint(folder) != dataset_fingerprint(moved)


def test_prefixes_are_found_in_a_folder_or_given(folder: Path, tmp_path: Path) -> None:
    assert find_prefixes(folder) == [str(folder / "large"), str(folder / "small")]
    assert find_prefixes(folder / "small") == [str(folder / "small")]
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere", folder / "lar"):
        with pytest.raises(DataError, match="no dataset"):
            find_prefixes(missing)


def test_a_large_index_is_that_of_megatron_core_too(tmp_path: Path) -> None:
    from megatron_implicit.data.megatron import indexed_dataset

    lengths = np.random.default_rng(0).integers(1, 5000, 2**20 + 77).astype(np.int32)
    for dtype in (np.uint16, np.int32):
        write_index(tmp_path / "own.idx", lengths, np.dtype(dtype))
        with indexed_dataset._IndexWriter(str(tmp_path / "theirs.idx"), dtype) as writer:
            writer.write(lengths, None, range(len(lengths) + 1))
        assert (tmp_path / "own.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
