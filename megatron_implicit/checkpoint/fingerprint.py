"""Which configuration changes a resumed run may make: its training must go on as if it had never stopped; and which
tokenizer its data was made with."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional

from megatron_implicit.config import Config, config_to_dict
from megatron_implicit.errors import CheckpointError

FREE_SECTIONS = ("parallel", "checkpoint", "health", "telemetry", "debug", "run")
"""Sections that may differ: layout, bookkeeping, care, names."""
FREE_KEYS = (
    "data.path", "data.tokenizer", "data.cache_dir", "data.stories", "train.validate_every", "train.validation_batches",
    "train.target_loss", "train.stop_after_steps", "train.deterministic",
)  # fmt: skip
"""Single keys that may differ; moved data is checked by its fingerprint instead of its path."""
MODEL_KEYS_THAT_MAY_DIFFER = ("model.size", "model.scan_chunk_size", "model.dropout", "model.embedding_init_std")
"""Keys of the model section that do not change which tensors it has."""


def refuse_changes(
    saved: Config, requested: Config, source: str, elsewhere: str = "branch with a new run.dir and checkpoint.load"
) -> None:
    """Compares what alters training.

    Args:
        saved: of the checkpoint.
        requested: of the run that goes on from it.
        source: the checkpoint, for the message.
        elsewhere: how to train with the change, for the message.

    Raises:
        CheckpointError: names the first changed key, both values and the remedy.
    """
    for key, before, after in _differences(saved, requested):
        if key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS:
            raise CheckpointError(
                f"{key}={after} differs from {before} in {source}: a resumed run keeps its configuration; drop the "
                f"change, or {elsewhere}"
            )


def refuse_other_model(saved: Config, requested: Config, source: str) -> None:
    """Compares the model sections of a checkpoint and of the run that wants to branch off it.

    Raises:
        CheckpointError: names the first key that makes it another model.
    """
    for key, before, after in _differences(saved, requested):
        if key.startswith("model.") and key not in MODEL_KEYS_THAT_MAY_DIFFER:
            raise CheckpointError(
                f"{source} holds another model: {key} is {before} there and {after} here; set {key} to {before} or "
                "load another checkpoint"
            )


def tokenizer_fingerprint(config: Config, state: Mapping[str, Any]) -> Optional[str]:
    """Of the tokenizer that the data of a checkpoint was made with.

    Args:
        config: the checkpoint's.
        state: its training state, as ``read_state`` returns it.

    Returns:
        None of converted weights, which say nothing of their data, and of tasks, which have no tokenizer.
    """
    if config.data.task != "text":
        return None
    return state.get("data_fingerprint", "").rpartition(":")[2] or None


def _differences(saved: Config, requested: Config) -> Iterator[tuple[str, Any, Any]]:
    before, after = dict(_flatten(config_to_dict(saved))), dict(_flatten(config_to_dict(requested)))
    for key in after:
        if before.get(key) != after[key]:
            yield key, before.get(key), after[key]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
