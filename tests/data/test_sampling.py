from __future__ import annotations

from itertools import islice

import pytest
import torch

from megatron_implicit.data.sampling import MicrobatchSampler, collate, read_batches, read_microbatch
from megatron_implicit.errors import ConfigError, DataError

GLOBAL, MICRO = 24, 2


def samplers(size: int) -> list[MicrobatchSampler]:
    return [MicrobatchSampler(GLOBAL, MICRO, size, rank) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_a_steps_microbatches_are_the_same_for_every_number_of_replicas(size: int) -> None:
    per_rank = [sampler.step(consumed=48) for sampler in samplers(size)]
    assert all(len(own) == samplers(size)[0].num_microbatches for own in per_rank)
    in_order = [own[i] for i in range(len(per_rank[0])) for own in per_rank]
    assert in_order == [range(48 + k * MICRO, 48 + (k + 1) * MICRO) for k in range(GLOBAL // MICRO)]


def test_every_sample_is_read_once() -> None:
    for size in (1, 2, 4):
        per_step = GLOBAL // (MICRO * size)
        read = [list(islice(sampler.microbatches(), 5 * per_step)) for sampler in samplers(size)]
        assert sorted(index for own in read for indices in own for index in indices) == list(range(5 * GLOBAL))


@pytest.mark.parametrize("consumed", [0, 24, 31, 240])
def test_a_resumed_stream_goes_on_where_it_stopped(consumed: int) -> None:
    sampler = MicrobatchSampler(GLOBAL, MICRO, 2, 1)
    steps = [sampler.step(consumed + i * GLOBAL) for i in range(4)]
    assert list(islice(sampler.microbatches(consumed), 24)) == [indices for step in steps for indices in step]


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="train.global_batch_size 24 .* micro_batch_size 2 times 5"):
        MicrobatchSampler(24, 2, 5, 0)
    with pytest.raises(ConfigError, match="rank 2"):
        MicrobatchSampler(24, 2, 2, 2)
    with pytest.raises(ConfigError, match="micro_batch_size 0"):
        MicrobatchSampler(24, 0)


class Counting:
    """Sample i holds i, i + 1, ...; position_ids are shared between samples as Megatron-Core shares them."""

    position_ids = torch.arange(4)

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(index, index + 4)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(4),
            "position_ids": self.position_ids,
            "dataset_id": 0,
        }


def test_samples_are_collated_into_a_batch_of_their_own() -> None:
    batch = collate([Counting()[3], Counting()[7]])
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((2, 4), torch.int64),
        "labels": ((2, 4), torch.int64),
        "loss_mask": ((2, 4), torch.float32),
        "position_ids": ((2, 4), torch.int64),
    }
    assert batch["tokens"].tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    batch["position_ids"].zero_()
    assert Counting.position_ids.tolist() == [0, 1, 2, 3]


def test_reading_past_the_end_is_an_error_and_not_a_short_batch() -> None:
    batches = read_batches(Counting(), MicrobatchSampler(GLOBAL, MICRO, 2, 1), consumed=24)
    assert [batch["tokens"][0, 0].item() for batch in islice(batches, 6)] == [26, 30, 34, 38, 42, 46]
    with pytest.raises(DataError, match="opened for 48 samples"):
        next(batches)
    with pytest.raises(DataError):
        read_microbatch(Counting(), range(47, 49))


def test_no_global_random_state_is_used() -> None:
    before = torch.get_rng_state()
    next(read_batches(Counting(), MicrobatchSampler(GLOBAL, MICRO)))
    assert torch.equal(torch.get_rng_state(), before)
