"""Golden parity of implicit models over pipeline stages: every case of the simultaneous mode, by the schedule."""

from __future__ import annotations

from typing import Any, Iterator, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.conversion.reference import gather_reference, over_stages
from megatron_implicit.solver import SolveSettings, SolveTrace
from megatron_implicit.solver.settings import override
from megatron_implicit.training.optimizer import prepare_training
from megatron_implicit.training.step import forward_backward_function
from tests import goldens, traces
from tests.models.test_golden import check_inference_case, check_training_case

from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region  # isort: skip

CASES = ("train", "bounded", "pretrain", "nonconv")
LONG = pytest.mark.acceptance


class Stages:
    """A golden model on a layout, and what one microbatch gave."""

    def __init__(self, family: str, layout: traces.Layout, gain: float = 1.0) -> None:
        values = config_to_dict(layout.apply(goldens.golden_config(family)))
        values["train"] |= {"steps": 1, "tokens": None, "global_batch_size": 2, "micro_batch_size": 2}
        self.family, self.config = family, config_from_dict(values)
        model = traces.build_golden(self.config, family)
        goldens.scale_gains(model, gain)
        self.wrapped, self.model = prepare_training(self.config, model).model, model
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.logits: Optional[Tensor] = None
        if model.post_process:
            model.output_layer.register_forward_hook(self._keep_logits)

    def _keep_logits(self, head: Any, inputs: Any, output: tuple[Tensor, None]) -> None:
        logits = gather_from_tensor_model_parallel_region(output[0].detach(), group=self.model.decoder.tp_group)
        # The loss works on the logits in place.
        self.logits = logits[..., : self.config.model.vocab_size].float().transpose(0, 1).clone()

    def run(self, forward_only: bool) -> tuple[Optional[float], Optional[Tensor], SolveTrace]:
        """Loss, logits and trace of the golden batch, on every stage."""
        golden = goldens.arrays(self.family)
        tokens, labels = (torch.from_numpy(golden[name]).long() for name in ("input_ids", "labels"))
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # the reference shifts
        mask = (labels != -100).float()

        def forward_step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
            losses = model(next(iterator), None, None, labels=labels.clamp(min=0))

            def loss(losses: Tensor) -> tuple[Tensor, Any]:
                mean = (losses * mask).sum() / mask.sum()
                return mean, (float(mean.detach()), self.model.decoder.trace)

            return losses, loss

        self.wrapped.zero_grad_buffer()
        self.wrapped.train(not forward_only)
        reports = forward_backward_function(self.config)(
            forward_step_func=forward_step, data_iterator=iter([tokens]), model=self.wrapped, num_microbatches=1,
            seq_length=tokens.shape[1], micro_batch_size=tokens.shape[0], forward_only=forward_only,
        )  # fmt: skip
        (loss, trace) = over_stages(reports)[-1][0]
        return loss, over_stages(self.logits)[-1], trace


def training_cases(family: str, layout: traces.Layout) -> dict[str, goldens.CaseResult]:
    """All training cases on this rank."""
    return {case: training_case(family, case, layout) for case in CASES}


def training_case(family: str, case: str, layout: traces.Layout) -> goldens.CaseResult:
    """As ``goldens.run_training_case``, over stages."""
    gain = float(goldens.arrays(f"{family}_out")["nonconv/g_scale"]) if case == "nonconv" else 1.0
    stages = Stages(family, layout, gain)
    solver = override(stages.config.solver, goldens.training_overrides(family, case))
    stages.model.decoder.solver = SolveSettings.training(solver)
    loss, logits, trace = stages.run(forward_only=False)
    gradients = gather_reference(stages.model, lambda parameter: parameter.main_grad)
    return goldens.compare_training_case(family, case, logits, loss, gradients, trace)


def eval_case(family: str, layout: traces.Layout) -> dict[str, Any]:
    """As ``goldens.run_inference_case``, over stages."""
    stages = Stages(family, layout)
    stages.model.decoder.inference = SolveSettings.inference(stages.config.inference, norm="batch")
    _, logits, trace = stages.run(forward_only=True)
    return goldens.compare_inference_case(family, "eval", logits, trace)


LAYOUTS = {
    "PP2": (2, traces.Layout(pipeline=2)),
    "TP2xPP2": (4, traces.Layout(tensor=2, pipeline=2)),
    "TP2+SPxPP2": (4, traces.Layout(tensor=2, pipeline=2, sequence=True)),
}
NAMES = ["PP2", pytest.param("TP2xPP2", marks=LONG), pytest.param("TP2+SPxPP2", marks=LONG)]


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize("name", NAMES)
def test_training_cases_match_the_reference(pool, family: str, name: str) -> None:
    world, layout = LAYOUTS[name]
    for results in pool(world).run(training_cases, family, layout):
        for case, result in results.items():
            check_training_case(result, family, case)


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize("name", NAMES)
def test_the_eval_case_matches_the_reference(pool, family: str, name: str) -> None:
    world, layout = LAYOUTS[name]
    for result in pool(world).run(eval_case, family, layout):
        check_inference_case(result, family, "eval")
