"""Distributed checkpoints: where they live, what they hold, how they are proven whole.

``layout`` names folders and moves ``latest``; ``integrity`` lists and checks files; ``store`` says what a checkpoint
holds and loads it through Megatron-Core's dist_checkpointing, on any tensor x pipeline x data layout; ``writer`` saves,
``background`` while training goes on; ``streaming`` reads and writes single tensors without a model; ``random_state`` is
every rank's own; ``fingerprint`` says which configuration changes would alter a resumed run. May import everything up to ``models``.
"""

from megatron_implicit.checkpoint.layout import CheckpointFolder, locate_checkpoint, read_checkpoint_config
from megatron_implicit.checkpoint.store import TrainingState, load_model_weights, load_training_state
from megatron_implicit.checkpoint.writer import CheckpointWriter, SaveError, save_checkpoint

__all__ = [
    "CheckpointFolder", "CheckpointWriter", "SaveError", "TrainingState", "load_model_weights", "load_training_state",
    "locate_checkpoint", "read_checkpoint_config", "save_checkpoint",
]  # fmt: skip
