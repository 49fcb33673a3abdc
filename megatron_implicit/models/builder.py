"""Builds a model from a run's configuration: Megatron-Core's GPTModel or MambaModel with our decoder and vocabulary."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_implicit.config import Config
from megatron_implicit.layers.stack_config import StackConfig, stack_config
from megatron_implicit.layers.vocabulary import VocabularyEmbedding, VocabularyHead
from megatron_implicit.models.decoder import FixedPointDecoder, SinglePassDecoder, StackDecoder
from megatron_implicit.models.initialisation import initialise_parameters
from megatron_implicit.solver import SolveSettings
from megatron_implicit.specs import llama_block_spec, mamba2_stack_spec

from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.models.mamba import MambaModel  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


def build_model(config: Config, *, initialise: bool = True) -> nn.Module:
    """The model of a resolved configuration, on this rank's layout; its process groups must exist.

    Args:
        config: with a known ``model.vocab_size``.
        initialise: draw the parameters; without it they are uninitialised memory (a checkpoint will fill them).

    Returns:
        GPTModel or MambaModel; ``model.decoder`` is a FixedPointDecoder or SinglePassDecoder. Parameters are on the
        CPU (or the meta device, inside ``torch.device("meta")``).
    """
    settings, groups = stack_config(config), ProcessGroupCollection.use_mpu_process_groups()
    model = _build_megatron_model(config, settings, groups)
    model.decoder = _build_decoder(config, settings, model.decoder, groups.tp)
    model.embedding.word_embeddings = VocabularyEmbedding(settings, groups.tp)
    model.output_layer = VocabularyHead(settings, groups.tp)
    model.setup_embeddings_and_output_layer()
    if initialise:
        initialise_parameters(model, config.train.seed)
    return model


def _build_megatron_model(config: Config, settings: StackConfig, groups: Any) -> nn.Module:
    # Its own embedding and head are replaced: one row a rank is the least it accepts.
    common = dict(
        vocab_size=settings.tensor_model_parallel_size,
        max_sequence_length=config.data.sequence_length,
        share_embeddings_and_output_weights=settings.tie_embeddings,
        pg_collection=groups,
    )
    if config.architecture == "mamba2":
        return MambaModel(
            settings, mamba2_stack_spec(settings), hybrid_override_pattern="M" * settings.num_layers, **common
        )
    return GPTModel(
        settings, llama_block_spec(settings), position_embedding_type="rope", rotary_base=settings.rope_base, **common
    )


def _build_decoder(config: Config, settings: StackConfig, stack: nn.Module, tp_group: Any) -> StackDecoder:
    if not config.implicit:
        return SinglePassDecoder(settings, stack, tp_group)
    return FixedPointDecoder(
        settings,
        stack,
        tp_group,
        solver=SolveSettings.training(config.solver),
        inference=SolveSettings.inference(config.inference),
    )
