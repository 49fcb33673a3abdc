"""The stream of a training run: every document once an epoch, and the same wherever it is taken up again."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.datasets import open_datasets, split_documents
from megatron_implicit.data.index_file import read_lengths
from megatron_implicit.data.indexed import IndexedDatasetWriter, open_indexed
from megatron_implicit.data.manifest import dataset_files
from megatron_implicit.data.packing import PackedDataset, epochs_for, samples_in
from megatron_implicit.data.sampling import MicrobatchSampler, read_batches

GLOBAL, MICRO, LENGTH = 8, 2, 32


class Numbering:
    """A vocabulary in which every document is one token, repeated."""

    vocab_size, eod, fingerprint = 5000, 4999, "numbering"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 documents; document i holds the token i, 1 to 150 times."""
    prefix = tmp_path_factory.mktemp("numbered") / "d"
    rng = random.Random(3)
    with IndexedDatasetWriter(prefix, Numbering()) as writer:
        for number in range(900):
            writer.add_document([number] * rng.randint(1, 150))
        writer.finish()
    return prefix


def train(numbered: Path, samples: int | None) -> PackedDataset:
    data = DataConfig(path=str(numbered), sequence_length=LENGTH, split=[0.9, 0.099, 0.001])
    return open_datasets(data, Numbering(), train_samples=samples, validation_samples=0, test_samples=0, seed=5).train


def ranks(dataset: PackedDataset, replicas: int, consumed: int, steps: int) -> list[list[torch.Tensor]]:
    """What each replica reads in some steps."""
    count = steps * GLOBAL // (MICRO * replicas)
    samplers = [MicrobatchSampler(GLOBAL, MICRO, replicas, rank) for rank in range(replicas)]
    return [
        [batch["tokens"] for batch in islice(read_batches(dataset, sampler, consumed), count)] for sampler in samplers
    ]


def in_order(per_rank: list[list[torch.Tensor]]) -> torch.Tensor:
    """Samples in the order of the run, whoever read them."""
    return torch.cat([batch for batches in zip(*per_rank) for batch in batches])


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_document_is_seen_once_an_epoch(numbered: Path, replicas: int) -> None:
    own = split_documents(900, [0.9, 0.099, 0.001], seed=5)[0]
    lengths = np.array(read_lengths(dataset_files(numbered)[1]))
    dataset = train(numbered, 3 * samples_in(int(lengths[own].sum()), LENGTH))
    per_epoch = samples_in(int(lengths[own].sum()), LENGTH)
    steps = -(-2 * per_epoch // GLOBAL)
    stream = in_order(ranks(dataset, replicas, 0, steps)).numpy()
    for epoch, first in ((1, stream[:per_epoch]), (2, stream[: 2 * per_epoch])):
        seen = np.bincount(first.ravel(), minlength=5000)
        assert set(np.flatnonzero(seen[:900])) == set(own.tolist())
        expected = epoch * (lengths[own] - 1)  # the end of a document is another token
        assert np.abs(seen[own] - expected).sum() <= 2 * LENGTH  # the sample over the boundary belongs to both


def test_taken_up_at_random_points_the_stream_is_the_same_on_other_replicas_too(numbered: Path) -> None:
    dataset = train(numbered, 2000)
    whole = in_order(ranks(dataset, 1, 0, 2000 // GLOBAL))
    rng = random.Random(0)
    for _ in range(50):
        consumed = rng.randrange(0, 2000 // GLOBAL - 4) * GLOBAL
        for replicas in (2, 4):
            again = in_order(ranks(dataset, replicas, consumed, 3))
            assert torch.equal(again, whole[consumed : consumed + 3 * GLOBAL])
    reopened = train(numbered, 2000)
    assert torch.equal(in_order(ranks(reopened, 2, 800, 2)), whole[800 : 800 + 2 * GLOBAL])


def test_packing_is_that_of_megatron_cores_gpt_dataset(numbered: Path) -> None:
    from megatron_implicit.data.megatron import helpers

    dataset = train(numbered, None)
    lengths = np.array(read_lengths(dataset_files(numbered)[1]))
    tokens = int(lengths[dataset.document_index].sum())
    theirs = helpers.build_sample_idx(lengths, dataset.document_index, LENGTH, 1, tokens, True, True)
    assert np.array_equal(theirs, dataset.sample_index[: len(theirs)])
    indexed = open_indexed(numbered)
    stream = np.concatenate([indexed[i] for i in dataset.document_index])
    for place in random.Random(1).sample(range(len(theirs) - 1), 50):
        sample = int(np.flatnonzero(dataset.shuffle_index == place)[0])
        assert dataset[sample]["tokens"].tolist() == stream[place * LENGTH : (place + 1) * LENGTH].tolist()


@pytest.mark.parametrize("tokens", [33, 64, 65, 97, 1000])
def test_epochs_are_enough_and_not_more(tokens: int) -> None:
    for samples in range(1, 200):
        epochs = epochs_for(samples, tokens, 32)
        assert samples_in(epochs * tokens, 32) >= samples
        assert epochs == 1 or samples_in((epochs - 1) * tokens, 32) < samples
