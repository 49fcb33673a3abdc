from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.datasets import Datasets, open_datasets, open_tokenizer, split_documents
from megatron_implicit.data.indexed import IndexedDatasetWriter, open_indexed, read_manifest
from megatron_implicit.data.packing import Packing, _shuffle, samples_in
from megatron_implicit.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_implicit.errors import DataError

SHARES = [0.8, 0.15, 0.05]


def opened(
    path: Path, tokenizer: Tokenizer, sizes: tuple[int | None, ...] = (None, None, None), seed: int = 7, **fields: Any
) -> Datasets:
    data = DataConfig(path=str(path), **({"sequence_length": 64, "split": SHARES} | fields))
    train, validation, test = sizes
    return open_datasets(
        data, tokenizer, train_samples=train, validation_samples=validation, test_samples=test, seed=seed
    )


def stream(dataset: Any, count: int = 20) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(count)]


def test_the_split_is_disjoint_complete_random_and_seeded() -> None:
    parts = split_documents(1000, SHARES, seed=3)
    assert [len(part) for part in parts] == [800, 150, 50]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert 400 < np.mean(parts[0]) < 600 and len(np.unique(np.diff(parts[0]))) > 100
    again, other = split_documents(1000, SHARES, seed=3), split_documents(1000, SHARES, seed=4)
    assert all((a == b).all() for a, b in zip(parts, again))
    assert set(other[2].tolist()) != set(parts[2].tolist())


def test_one_epoch_packs_each_document_of_the_split_once_and_no_other(folder: Path, tokenizer: Tokenizer) -> None:
    splits = opened(folder / "large", tokenizer)
    indexed = open_indexed(folder / "large")
    for dataset, own in zip((splits.train, splits.validation, splits.test), split_documents(700, SHARES, seed=7)):
        assert sorted(dataset.document_index) == sorted(own)
        packed = np.concatenate([indexed[i] for i in dataset.document_index]).tolist()
        expected = [(packed[i : i + 64], packed[i + 1 : i + 65]) for i in range(0, len(packed) - 1, 64)]
        items = [with_loss(dataset[i]) for i in range(len(dataset))]
        assert sorted(items) == sorted((tokens[: len(labels)], labels) for tokens, labels in expected)
        assert [tokens for tokens, _ in items] != [tokens for tokens, _ in expected]


def with_loss(item: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Tokens and labels of the positions that have a loss."""
    kept = item["loss_mask"].bool()
    return item["tokens"][kept].tolist(), item["labels"][kept].tolist()


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_epoch_is_over_before_the_next_one_begins(epochs: int, folder: Path, tokenizer: Tokenizer) -> None:
    tokens = sum(len(open_indexed(folder / "small")[i]) for i in split_documents(200, SHARES, seed=7)[0])
    train = opened(folder / "small", tokenizer, (epochs * tokens // 64, 0, 0)).train
    indexed = open_indexed(folder / "small")
    stream = np.concatenate([indexed[i] for i in train.document_index])
    first = [int(place) for place in train.shuffle_index[: -(-tokens // 64)]]
    assert sorted(first) == list(range(-(-tokens // 64))) != first
    assert len(stream) == epochs * tokens
    for epoch in range(epochs):
        own = train.document_index[epoch * 160 : (epoch + 1) * 160]
        assert sorted(own) == sorted(split_documents(200, SHARES, seed=7)[0])


def test_a_longer_run_begins_with_the_shorter_one(folder: Path, tokenizer: Tokenizer) -> None:
    short, long = (opened(folder, tokenizer, (count, 0, 0)).train for count in (300, 6000))
    assert stream(short, 300) == stream(long, 300)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("beyond", range(4))
def test_the_order_of_an_epoch_does_not_depend_on_the_ones_after_it(epochs: int, beyond: int) -> None:
    """One token beyond whole samples: the sample that begins with it has labels of the next epoch only."""
    tokens = 8 * 100 // epochs + beyond
    short, long = (_shuffle(1, 0, Packing("train", 8, tokens, count)) for count in (epochs, epochs + 2))
    assert np.array_equal(long[: len(short)], short)
    assert sorted(long) == list(range(samples_in(tokens * (epochs + 2), 8)))


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = stream(opened(folder, tokenizer, (200, 0, 0)).train)
    cached = stream(opened(folder, tokenizer, (200, 0, 0)).train)
    rebuilt = stream(opened(folder, tokenizer, (200, 0, 0), cache_dir=str(tmp_path / "elsewhere")).train)
    assert first == cached == rebuilt
    assert stream(opened(folder, tokenizer, (200, 0, 0), seed=8).train) != first
    assert len(list((folder / "cache").glob("samples-*.json"))) == 2 * 2  # two datasets, two seeds
    assert list((tmp_path / "elsewhere").iterdir())


def test_several_datasets_are_blended_by_their_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    train = opened(folder, tokenizer, (1000, 0, 0)).train
    assert len(train) >= 1000
    counts = [read_manifest(folder / name).tokens for name in ("large", "small")]
    drawn = np.bincount([int(train[i]["dataset_id"]) for i in range(1000)])
    assert drawn[0] / 1000 == pytest.approx(counts[0] / sum(counts), abs=0.03)


def test_a_blend_of_few_samples_from_uneven_datasets_opens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, documents in enumerate([600] + [13] * 12):
        with IndexedDatasetWriter(tmp_path / f"part{number:02}", tokenizer) as writer:
            for _ in range(documents):
                writer.add_document([5] * 9)
            writer.finish()
    for size in (1, 3, 68, 72):
        train = opened(tmp_path, tokenizer, (size, 0, 0), split=[1.0, 0.0, 0.0], sequence_length=100).train
        assert len(stream(train, size)) == size


def test_splits_that_are_not_wanted_are_none(folder: Path, tokenizer: Tokenizer) -> None:
    splits = opened(folder, tokenizer, (10, 0, 5), split=[0.9, 0.1, 0.0])
    assert splits.train is not None and splits.validation is None and splits.test is None
    assert opened(folder, tokenizer, (0, 0, 0)) == Datasets(None, None, None)


def test_more_samples_than_an_epoch_go_on_with_the_next(folder: Path, tokenizer: Tokenizer) -> None:
    epoch = len(opened(folder / "small", tokenizer).test)
    assert len(opened(folder / "small", tokenizer, (0, 0, 5 * epoch)).test) >= 5 * epoch


def test_an_item_is_whole_and_typed(folder: Path, tokenizer: Tokenizer) -> None:
    item = opened(folder / "large", tokenizer, (10, 0, 0)).train[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in item.items()} == {
        "tokens": ((64,), torch.int64),
        "labels": ((64,), torch.int64),
        "loss_mask": ((64,), torch.float32),
        "position_ids": ((64,), torch.int64),
    }
    assert item["loss_mask"].sum() == 64 and item["position_ids"].tolist() == list(range(64))


def test_no_global_random_state_is_touched(folder: Path, tokenizer: Tokenizer) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = stream(opened(folder, tokenizer, (50, 5, 5)).train)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    shutil.rmtree(folder / "cache")
    assert stream(opened(folder, tokenizer, (50, 5, 5)).train) == first


def test_a_dataset_written_anew_does_not_meet_the_old_cache(
    folder: Path, documents: list[list[int]], tokenizer: Tokenizer
) -> None:
    opened(folder / "small", tokenizer)
    with IndexedDatasetWriter(folder / "small", tokenizer) as writer:
        for ids in documents[:50]:
            writer.add_document(ids)
        writer.finish()
    assert max(opened(folder / "small", tokenizer).train.document_index) < 50


def test_a_job_that_died_while_writing_the_cache_leaves_no_damaged_file(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stream(opened(folder, tokenizer, (100, 0, 0), cache_dir=str(tmp_path / "sound")).train)

    save = np.save

    def die(path: Path, array: np.ndarray) -> None:
        if "shuffle" in str(path):
            path.write_bytes(array.tobytes()[:10])
            raise OSError(28, "No space left on device")
        save(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", die)
        with pytest.raises(DataError, match="No space left on device; set data.cache_dir"):
            opened(folder, tokenizer, (100, 0, 0))
    assert stream(opened(folder, tokenizer, (100, 0, 0)).train) == expected
    assert not list((folder / "cache").glob(".partial*"))


def test_what_cannot_be_opened_names_the_remedy(
    folder: Path, texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="validation split .* too few .* data.split"):
        opened(folder / "large", tokenizer, split=[0.9999, 0.0001, 0.0])
    with pytest.raises(DataError, match="train split .* too few .* data.sequence_length 10000000"):
        opened(folder, tokenizer, sequence_length=10_000_000)
    with pytest.raises(DataError, match="no dataset"):
        opened(tmp_path / "nowhere", tokenizer)
    with pytest.raises(DataError, match="another tokenizer"):
        opened(folder, train_sentencepiece(texts[:300], tmp_path / "other.model", 600))
    (folder / "small.bin").write_bytes(b"")
    with pytest.raises(DataError, match="small.bin is truncated"):
        opened(folder, tokenizer)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="data.cache_dir"):
        opened(folder / "large", tokenizer, cache_dir=str(tmp_path / "file" / "cache"))


def test_the_tokenizer_lies_beside_the_dataset_or_is_named(folder: Path, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.tokenizer"):
        open_tokenizer(DataConfig(path=str(folder)))
    with pytest.raises(DataError, match="no dataset at data.path .*/nope"):
        open_tokenizer(DataConfig(path=str(folder / "nope")))
    made = train_sentencepiece(texts[:300], folder / "tokenizer.model", 600)
    os.rename(shutil.copy(folder / "tokenizer.model", tmp_path / "copy"), tmp_path / "named.model")
    for config in (
        DataConfig(path=str(folder)),
        DataConfig(path=str(folder / "large")),
        DataConfig(path="anywhere", tokenizer=str(tmp_path / "named.model")),
    ):
        assert open_tokenizer(config).fingerprint == made.fingerprint
