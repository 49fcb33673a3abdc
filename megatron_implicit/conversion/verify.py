"""Runs both sides of a conversion on sample tokens: folders of transformers with transformers, all others with ours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.config import Config
from megatron_implicit.conversion.reference import load_reference_weights
from megatron_implicit.conversion.stored import LazyTensors, StoredModel, on_one_process
from megatron_implicit.errors import CheckpointError
from megatron_implicit.inference.forward import evaluate
from megatron_implicit.models import build_model

_BATCH, _TOKENS, _EVALUATIONS = 2, 32, 16
_ALLOWED = 1e-4
"""Largest difference of float32 logits that rounding explains."""


@dataclass(frozen=True)
class Outcome:
    """How far the two sides are apart."""

    sides: str
    tokens: int
    difference: float
    """Largest absolute difference of a logit."""


def verify(source: StoredModel, written: StoredModel, *, exact: bool) -> Outcome:
    """Compares the logits of two folders on random tokens.

    Implicit models run a fixed number of evaluations, so that rounding cannot move the moment a solve stops.

    Args:
        source: what was converted.
        written: what came of it.
        exact: the dtype was kept, so the logits must agree.

    Raises:
        CheckpointError: they should agree and do not.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.config.model.vocab_size, (_BATCH, _TOKENS), generator=generator)
    (name, expected), (other, logits) = _logits(source, ids), _logits(written, ids)
    difference = float((expected - logits).abs().max())
    outcome = Outcome(f"{name} against {other}", ids.numel(), difference)
    full = exact and source.dtype is torch.float32
    if full and not difference <= _ALLOWED * max(1.0, float(expected.abs().max())):
        raise CheckpointError(
            f"--verify: {outcome.sides}: logits differ by {difference:.1e}: the two folders are not the same model"
        )
    return outcome


def _logits(model: StoredModel, ids: Tensor) -> tuple[str, Tensor]:
    """(who computed them, logits [b, s, vocab] float32)."""
    if model.format == "hf" and not _made_when_read(model):
        return "transformers", _transformers_logits(model, ids)
    return "megatron_implicit", _our_logits(model, ids)


def _made_when_read(model: StoredModel) -> bool:
    """An explicit folder that stands for the implicit model it starts: no program but ours runs that."""
    return model.origin is None


@torch.no_grad()
def _transformers_logits(model: StoredModel, ids: Tensor) -> Tensor:
    """With transformers' own Llama and Mamba2, or our class for implicit models; code in the folder is not run."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not model.config.implicit:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model.folder).float().eval()(ids).logits.float()
    from megatron_implicit.conversion.remote_code.modeling_implicit_lm import ImplicitLMForCausalLM

    loaded = ImplicitLMForCausalLM.from_pretrained(model.folder).float().eval()
    loaded.config.inference |= {"max_iterations": _EVALUATIONS, "tolerance": 0.0}
    return loaded(ids).logits


def _our_logits(model: StoredModel, ids: Tensor) -> Tensor:
    config = _fixed_evaluations(model.config)
    with torch.random.fork_rng(devices=[]):
        start_model_parallel(config.parallel)
        ours = build_model(config, initialise=False)
    load_reference_weights(ours, LazyTensors(model.tensors), str(model.folder))
    return evaluate(ours.eval(), ids).logits


def _fixed_evaluations(config: Config) -> Config:
    inference = dataclasses.replace(config.inference, max_iterations=_EVALUATIONS, tolerance=0.0)
    train = dataclasses.replace(config.train, precision="fp32")
    return on_one_process(dataclasses.replace(config, inference=inference, train=train))
