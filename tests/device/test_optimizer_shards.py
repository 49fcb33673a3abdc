"""A replica's range of a parameter as boxes; that checkpoints of them load everywhere is tests/distributed's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_implicit.device.optimizer_shards import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (4, 1, 3), (2, 3, 4)])
def test_boxes_hold_the_range_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        found = boxes(shape, start, stop)
        assert len(found) <= 2 * len(shape) - 1
        read = []
        for box in found:
            window = numbers[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))]
            assert window.shape == box.size and window.numel() == box.elements
            read += window.flatten().tolist()
        assert read == list(range(start, stop))


def test_an_empty_range_has_no_box() -> None:
    assert boxes((3, 4), 5, 5) == []


def gathered_and_pieces() -> tuple[dict[str, torch.Tensor], list[tuple[str, tuple[int, ...], torch.Tensor]]]:
    """After a step on two replicas: the optimizer's state as Megatron-Core gathers it, and this rank's pieces."""
    from megatron_implicit.checkpoint.store import training_shards
    from megatron_implicit.config import config_from_dict
    from megatron_implicit.device import optimizer_shards
    from tests import traces

    config = config_from_dict(CONFIG)
    parts = traces.prepare(config, None)
    traces.train(config, parts, torch.randint(150, (1, 2, 13), generator=torch.Generator().manual_seed(0)))
    shards = training_shards(parts.model.module, parts.optimizer, loading=False)
    pieces = [
        (piece.key, piece.global_offset, piece.data.clone())
        for by_name in shards["optimizer"]["param_state"].values() for piece in by_name.values()
    ]  # fmt: skip
    (optimizer,) = parts.optimizer.chained_optimizers
    whole = {}
    state = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    for index, buffer in enumerate(optimizer.buffers):
        (tensors,) = state[index].values()
        for parameter, (start, stop, _) in buffer.param_index_map.items():
            name = next(key for key, shard in shards["model"].items() if shard.data is parameter)
            for key in optimizer_shards.STATE_KEYS:
                whole[f"optimizer.state.{key}.{name}"] = tensors[key][start:stop].view(parameter.shape)
    return whole, pieces


CONFIG = {
    "model": {"family": "implicit_llama", "size": "custom", "num_layers": 1, "hidden_size": 12, "num_heads": 2,
              "ffn_size": 10, "vocab_size": 150},
    "data": {"sequence_length": 12},
    "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1},
    "optimizer": {"learning_rate": 1e-3},
    "parallel": {"distributed_optimizer": True},
}  # fmt: skip


def test_the_pieces_of_all_replicas_are_the_gathered_state(pool) -> None:
    results = pool(2).run(gathered_and_pieces)
    whole = results[0][0]
    built = {key: torch.full_like(value, float("nan")) for key, value in whole.items()}
    counts = {key: 0 for key in whole}
    for _, pieces in results:
        for key, offset, data in pieces:
            built[key][tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
            counts[key] += 1
    assert all(torch.equal(built[key], value) for key, value in whole.items())
    assert max(counts.values()) >= 3  # a replica's range begins within a row
