"""The two ends of a model around its decoder: rotary angles, head and loss, and the tied weight in checkpoints."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn


def rotary_angles(model: nn.Module, tokens: int, start: int = 0) -> Optional[Tensor]:
    """Rotary angles of positions start .. start + tokens of the whole sequence; None for models without rotary
    embedding."""
    rotary = getattr(model, "rotary_pos_emb", None)
    return rotary(tokens, offset=start) if rotary is not None else None


def token_losses(model: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token, on the last pipeline stage.

    Args:
        model: as ``build_model`` returns it.
        z: [s or s/t, b, h].
        labels: [b, s].

    Returns:
        [b, s], the same on all ranks of the tensor group.
    """
    logits, _ = model.output_layer(z, weight=model.shared_embedding_or_output_weight())
    return model.compute_language_model_loss(labels, logits)


class TiedCheckpoints:
    """Mixin of Megatron-Core's models: the last stage's copy of the embedding as a checkpoint shard.

    Upstream writes it as equal slices of a padded vocabulary; ours are slices of the logical one, uneven perhaps.
    """

    def tie_embeddings_and_output_weights_state_dict(
        self, shards: dict[str, Any], output_layer_weight_key: str, first_stage_word_emb_key: str, metadata: Any = None
    ) -> None:
        """Renames the head's shard, a copy (see ``mark_copies``), to the embedding's key."""
        if output_layer_weight_key in shards:
            shards[output_layer_weight_key].key = first_stage_word_emb_key

