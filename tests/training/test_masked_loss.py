"""Where not every token counts, loss and gradient are means over the tokens that do, however they are cut."""

from __future__ import annotations

import dataclasses
from typing import Iterator

import torch

from megatron_implicit.data.sampling import Batch
from megatron_implicit.training.step import StepRunner
from tests import traces
from tests.distributed.test_layouts import tokens, uneven_config

COUNTED = (2, 7, 1, 3)
"""Tokens that count, by sample of the global batch."""


def first_step(family: str, micro_batch_size: int) -> tuple[float, float]:
    """Loss and gradient norm on this job's replicas."""
    config = traces.Layout().apply(uneven_config(family))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train))
    config.train.micro_batch_size, config.train.global_batch_size = micro_batch_size, len(COUNTED)
    result = StepRunner(config, traces.prepare(config, None)).run(1, masked(config), torch.device("cpu"))
    return result.loss, result.grad_norm


def masked(config) -> Iterator[Batch]:
    """This replica's microbatches."""
    for batch in traces.microbatches(config, numbered()):
        counted = batch["tokens"][:, 0].clone()
        batch["tokens"][:, 0] = 0
        batch["loss_mask"] = (torch.arange(batch["tokens"].shape[1]) < counted[:, None]).float()
        yield batch


def numbered() -> torch.Tensor:
    """The global batch; the first token of a sample says how many of it count."""
    batch = tokens()[:1].reshape(-1, tokens().shape[-1])[: len(COUNTED)].clone()
    batch[:, 0] = torch.tensor(COUNTED)
    return batch


def test_the_mean_is_over_tokens(pool, one_process: None) -> None:
    expected = first_step("explicit_llama", 4)  # the others sum in another order: float32's rounding
    for found in (first_step("explicit_llama", 1), *pool(2).run(first_step, "explicit_llama", 1)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
