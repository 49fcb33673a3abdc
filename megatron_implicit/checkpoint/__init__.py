"""Distributed checkpoints: where they live, what they hold, how they are proven whole.

``layout`` names folders and moves ``latest``; ``integrity`` lists and checks files; ``store`` saves and loads through
Megatron-Core's dist_checkpointing, on any tensor x pipeline x data layout; ``fingerprint`` says which configuration changes would
alter a resumed run. May import everything up to ``models``.
"""

from megatron_implicit.checkpoint.layout import CheckpointFolder, locate_checkpoint, read_checkpoint_config
from megatron_implicit.checkpoint.store import TrainingState, load_model_weights, load_training_state, save_checkpoint

__all__ = [
    "CheckpointFolder", "TrainingState", "load_model_weights", "load_training_state", "locate_checkpoint",
    "read_checkpoint_config", "save_checkpoint",
]  # fmt: skip
