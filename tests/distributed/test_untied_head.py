"""A head with weights of its own trains the same on every layout, and is saved and loaded as itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_implicit.checkpoint import CheckpointFolder, TrainingState, load_model_weights, save_checkpoint
from megatron_implicit.config import Config, config_from_dict, config_to_dict
from tests import traces
from tests.distributed.test_layouts import tokens, uneven_config

HEAD, EMBEDDING = "lm_head.weight", "word_emb.emb.weight"


def untied(family: str, layout: traces.Layout) -> Config:
    """The uneven run with an untied head."""
    values = config_to_dict(uneven_config(family))
    values["model"]["tie_embeddings"] = False
    return layout.apply(config_from_dict(values))


def train_and_save(family: str, layout: traces.Layout, folder: str) -> traces.Trace:
    """One step, then a checkpoint."""
    config = untied(family, layout)
    parts = traces.prepare(config, None)
    trace = traces.train(config, parts, tokens()[:1])
    save_checkpoint(
        CheckpointFolder(Path(folder)), config, TrainingState(), parts.model.module, parts.optimizer, parts.scheduler
    )
    return trace


def load(family: str, layout: traces.Layout, folder: str) -> dict[str, torch.Tensor]:
    """Whole tensors of the checkpoint, on another layout."""
    config = untied(family, layout)
    parts = traces.prepare(config, None)
    load_model_weights(parts.model.module, CheckpointFolder(Path(folder)).latest())
    return {key: value.clone() for key, value in traces.gather_reference(parts.model.module).items()}


@pytest.mark.parametrize("layout", [traces.Layout(tensor=2), traces.Layout(pipeline=2)], ids=["TP2", "PP2"])
def test_an_untied_head_trains_and_is_saved_as_itself(pool, tmp_path: Path, one_process, layout) -> None:
    family = "implicit_llama"
    alone = train_and_save(family, traces.Layout(), str(tmp_path / "alone"))
    assert not torch.equal(alone.parameters[HEAD], alone.parameters[EMBEDDING])
    for trace in pool(2).run(train_and_save, family, layout, str(tmp_path / "shared")):
        assert abs(trace.losses[0] / alone.losses[0] - 1) <= 1e-6
        assert abs(trace.grad_norms[0] / alone.grad_norms[0] - 1) <= 1e-5
        for key in (HEAD, EMBEDDING):
            for values, others in ((trace.gradients, alone.gradients), (trace.parameters, alone.parameters)):
                assert float((values[key] - others[key]).norm()) <= 5e-5 * float(others[key].norm()), key
    saved = load(family, traces.Layout(), str(tmp_path / "shared"))
    assert float((saved[HEAD] - alone.parameters[HEAD]).norm()) <= 5e-5 * float(alone.parameters[HEAD].norm())
