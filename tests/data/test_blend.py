from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.blend import blend_fingerprint, read_blend
from megatron_implicit.data.datasets import Datasets, open_datasets, open_tokenizer
from megatron_implicit.data.indexed import open_indexed
from megatron_implicit.data.packing import split_documents
from megatron_implicit.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_implicit.errors import DataError

SHARES = [0.8, 0.15, 0.05]


def write(folder: Path, **datasets: dict) -> DataConfig:
    (folder / "blend.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    return DataConfig(path=str(folder / "blend.yaml"), sequence_length=64, split=SHARES)


def opened(data: DataConfig, tokenizer: Tokenizer, train: int | None, seed: int = 7) -> Datasets:
    return open_datasets(data, tokenizer, train_samples=train, validation_samples=0, test_samples=0, seed=seed)


def drawn(train, count: int) -> np.ndarray:
    return np.bincount([int(train[i]["dataset_id"]) for i in range(count)], minlength=2)


def tokens(prefix: Path, share: float) -> int:
    dataset = open_indexed(prefix)
    own = split_documents(len(dataset), [share, 1 - share], seed=7)[0]
    return int(dataset.sequence_lengths[own].sum())


def test_weights_say_how_often_a_dataset_is_drawn(folder: Path, tokenizer: Tokenizer) -> None:
    data = write(folder, a={"path": "large", "weight": 3}, b={"path": "small", "weight": 1})
    assert drawn(opened(data, tokenizer, 400).train, 400).tolist() == [300, 100]


def test_epochs_weight_by_tokens_and_limit_the_run(folder: Path, tokenizer: Tokenizer) -> None:
    data = write(folder, a={"path": "large", "epochs": 1}, b={"path": "small", "epochs": 3})
    sizes = [-(-(tokens(folder / "large", 0.8) - 1) // 64), -(-(3 * tokens(folder / "small", 0.8) - 1) // 64)]
    whole = opened(data, tokenizer, None).train
    assert drawn(whole, len(whole)).tolist() == sizes
    most = sum(sizes) - 2
    assert drawn(opened(data, tokenizer, most).train, most) == pytest.approx(np.array(sizes), abs=2)
    with pytest.raises(DataError, match="more than the epochs: 1 of dataset a .* raise epochs to 2"):
        opened(data, tokenizer, sum(sizes) + 20)


def test_a_dataset_may_have_its_own_split(folder: Path, tokenizer: Tokenizer) -> None:
    data = write(folder, a={"path": "large", "split": [1.0, 0.0, 0.0]}, b={"path": "small", "split": [0.0, 0.0, 1.0]})
    sets = open_datasets(data, tokenizer, train_samples=9, validation_samples=9, test_samples=9, seed=7)
    assert sets.train.dataset_path.endswith("large") and sets.test.dataset_path.endswith("small")
    assert sets.validation is None and len(sets.train.document_index) == 700


def test_a_folder_in_a_blend_is_drawn_from_by_the_tokens_of_its_shards(folder: Path, tokenizer: Tokenizer) -> None:
    data = write(folder.parent, all={"path": folder.name})
    counts = np.array([tokens(folder / name, 0.8) for name in ("large", "small")])
    assert drawn(opened(data, tokenizer, 500).train, 500) / 500 == pytest.approx(counts / counts.sum(), abs=0.01)


def test_the_fingerprint_follows_contents_names_weights_and_splits(folder: Path) -> None:
    one = {"a": {"path": "large", "epochs": 1}, "b": {"path": "small"}}
    others = [
        {"a": {"path": "large", "epochs": 2}, "b": {"path": "small"}},
        {"c": {"path": "large", "epochs": 1}, "b": {"path": "small"}},
        {"a": {"path": "large", "epochs": 1}, "b": {"path": "small", "split": [1.0, 0.0, 0.0]}},
        {"a": {"path": "small", "epochs": 1}, "b": {"path": "large"}},
    ]
    first = blend_fingerprint(write(folder, **one))
    assert first == blend_fingerprint(write(folder, **one))
    assert len({first, *(blend_fingerprint(write(folder, **other)) for other in others)}) == 5


def test_the_tokenizer_lies_beside_the_blend_or_a_dataset(folder: Path, texts: list[str], tmp_path: Path) -> None:
    made = train_sentencepiece(texts[:300], folder / "tokenizer.model", 600)
    data = write(tmp_path, a={"path": str(folder / "large")})
    assert open_tokenizer(data).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ({"a": {"weight": 1}}, "dataset a needs a path"),
        ({"a": {"path": "large", "wieght": 1}}, "unknown key wieght; known are path, weight"),
        ({"a": {"path": "large", "weight": 0}}, "weight 0 must be above 0"),
        ({"a": {"path": "large", "weight": True}}, "weight True must"),
        ({"a": {"path": "large", "epochs": 1.5}}, "epochs 1.5 must be a whole number"),
        ({"a": {"path": "large", "split": [0.5, 0.5]}}, "three shares"),
        ({"a": {"path": "large", "split": [0.5, 0.4, 0.0]}}, "add up to 1"),
        ({"a": {"path": "large", "weight": 1}, "b": {"path": "small"}}, "all of them a weight or none"),
        ({}, "at least one dataset"),
    ],
)
def test_a_wrong_value_is_named(datasets: dict, words: str, folder: Path) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_blend(write(folder, **datasets))
    assert "blend.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["datasets: [a", "datasets: [a]", "other: {}", ""])
def test_a_file_that_is_no_blend_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(content)
    for name in ("blend.yaml", "missing.yaml"):
        with pytest.raises(DataError, match=name):
            read_blend(DataConfig(path=str(tmp_path / name)))
