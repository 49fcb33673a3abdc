"""Goldens and a short bf16 training with NCCL on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_implicit import load_pretrained
from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.device.kernels import FORCE_VARIABLE
from megatron_implicit.solver import SolveSettings
from megatron_implicit.training.curriculum import Curriculum
from megatron_implicit.training.optimizer import prepare_training
from megatron_implicit.training.step import StepRunner
from tests import goldens, traces
from tests.test_api import write_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_goldens_in_fp32(tmp_path: Path, family: str, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looser than on a CPU: sums run in another order. Compiled kernels may use TF32 and have tests of their own."""
    monkeypatch.setenv(FORCE_VARIABLE, "torch")
    lm = load_pretrained(write_reference(tmp_path, family), device=DEVICE)
    ids = torch.from_numpy(goldens.arrays(family)["input_ids"]).to(DEVICE)
    for mode, case in (("simultaneous", "eval"), ("sequential", "seq")):
        out = lm(ids, mode=mode, residual_norm="batch")
        assert float((out.logits.cpu() - goldens.tensor(family, f"{case}/logits")).abs().max()) <= 1e-4
    out = lm.train()(ids)
    assert float((out.logits.detach().cpu() - goldens.tensor(family, "train/logits")).abs().max()) <= 1e-4
    goldens.cross_entropy(out.logits, torch.from_numpy(goldens.arrays(family)["labels"]).to(DEVICE)).backward()
    for key, gradient in goldens.gather_reference(lm.model, lambda parameter: parameter.grad).items():
        expected = torch.from_numpy(goldens.arrays(f"{family}_grads")[f"grad/{key}"])
        assert float((gradient.cpu() - expected).norm() / expected.norm()) <= 1e-3, key


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_the_same_steps_give_the_same_bits(family: str, one_process: None) -> None:
    first, second = bf16_run(family), bf16_run(family)
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_frequent_tokens_add_up_to_the_same_gradient() -> None:
    """Half of 16,384 tokens are the same ten of 50,304: rows that many threads add to."""
    torch.manual_seed(3)
    tokens = torch.where(torch.rand(16384) < 0.5, torch.randint(10, (16384,)), torch.randint(50304, (16384,)))
    table, gradient = torch.randn(50304, 256, device=DEVICE, requires_grad=True), torch.randn(16384, 256, device=DEVICE)

    def backward() -> torch.Tensor:
        return torch.autograd.grad(torch.nn.functional.embedding(tokens.to(DEVICE), table), table, gradient)[0]

    assert torch.equal(backward(), backward())


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_bf16_training_follows_the_golden_trace(family: str, one_process: None) -> None:
    for loss, other in zip(bf16_run(family)[0], traces.golden_losses(family), strict=True):
        assert loss == pytest.approx(other, rel=0.02)


def bf16_run(family: str) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of the golden training's steps, and the parameters after them."""
    values = config_to_dict(traces.golden_training_config(family))
    values["train"]["precision"] = "bf16"
    config = config_from_dict(values)
    parts = prepare_training(config, traces.build_golden(config, family).to(DEVICE))
    runner, curriculum, losses = StepRunner(config, parts), Curriculum(config), []
    tokens = torch.from_numpy(goldens.arrays(f"{family}_training")["tokens"])
    per_step = config.train.global_batch_size * config.data.sequence_length
    for step, batch in enumerate(tokens, start=1):
        phase = curriculum.phase(step - 1, (step - 1) * per_step)
        parts.model.module.decoder.solver = SolveSettings.training(phase.solver)
        losses.append(runner.run(step, traces.microbatches(config, batch), torch.device(DEVICE)).loss)
    return losses, [parameter.detach().clone() for parameter in parts.model.parameters()]
