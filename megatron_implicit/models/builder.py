"""Builds a model from a run's configuration: Megatron-Core's GPTModel or MambaModel with our decoder and vocabulary."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_implicit.config import Config
from megatron_implicit.layers.stack_config import StackConfig, Stage, stack_config
from megatron_implicit.layers.vocabulary import VocabularyEmbedding, VocabularyHead
from megatron_implicit.models.decoder import FixedPointDecoder, SinglePassDecoder, StackDecoder
from megatron_implicit.models.initialisation import initialise_parameters
from megatron_implicit.models.language import TiedCheckpoints
from megatron_implicit.solver import SolveSettings
from megatron_implicit.specs import llama_block_spec, mamba2_layer_pattern, mamba2_stack_spec

from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.models.mamba import MambaModel  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


def build_model(config: Config, *, initialise: bool = True) -> nn.Module:
    """The model of a resolved configuration, on this rank's layout; its process groups must exist.

    Args:
        config: with a known ``model.vocab_size``.
        initialise: draw the parameters; without it they are uninitialised memory (a checkpoint will fill them).

    Returns:
        GPTModel or MambaModel, with this pipeline stage's layers; ``model.decoder`` is a FixedPointDecoder or
        SinglePassDecoder. The first stage has the embedding, the last one the head, each a copy of the tied weight
        where they are not the same stage. Parameters are on the CPU (or the meta device, inside
        ``torch.device("meta")``).
    """
    settings, groups = stack_config(config), ProcessGroupCollection.use_mpu_process_groups()
    stage = settings.stage(groups.pp)
    model = _build_megatron_model(config, settings, groups, stage)
    model.decoder = _build_decoder(config, settings, model.decoder, groups.tp, stage)
    if stage.is_first:
        model.embedding.word_embeddings = VocabularyEmbedding(settings, groups.tp)
    if stage.is_last:
        model.output_layer = VocabularyHead(settings, groups.tp, own_copy=not stage.is_first)
    if stage.is_first or stage.is_last:
        model.setup_embeddings_and_output_layer()
    if initialise:
        initialise_parameters(model, config.train.seed)
    return model


class _LlamaModel(TiedCheckpoints, GPTModel):
    """GPTModel with our vocabulary's checkpoint shards."""


class _Mamba2Model(TiedCheckpoints, MambaModel):
    """MambaModel with our vocabulary's checkpoint shards."""


def _build_megatron_model(config: Config, settings: StackConfig, groups: Any, stage: Stage) -> nn.Module:
    # Its own embedding and head are replaced: one row a rank is the least it accepts.
    common = dict(
        vocab_size=settings.tensor_model_parallel_size,
        max_sequence_length=config.data.sequence_length,
        share_embeddings_and_output_weights=settings.tie_embeddings,
        pg_collection=groups,
        pre_process=stage.is_first,
        post_process=stage.is_last,
    )
    if config.architecture == "mamba2":
        pattern = mamba2_layer_pattern(settings)
        return _Mamba2Model(settings, mamba2_stack_spec(settings), hybrid_override_pattern=pattern, **common)
    spec = llama_block_spec(settings, len(stage.layers))
    return _LlamaModel(settings, spec, position_embedding_type="rope", rotary_base=settings.rope_base, **common)


def _build_decoder(
    config: Config, settings: StackConfig, stack: nn.Module, tp_group: Any, stage: Stage
) -> StackDecoder:
    if not config.implicit:
        return SinglePassDecoder(settings, stack, tp_group, stage)
    return FixedPointDecoder(
        settings,
        stack,
        tp_group,
        stage,
        solver=SolveSettings.training(config.solver),
        inference=SolveSettings.inference(config.inference),
    )
