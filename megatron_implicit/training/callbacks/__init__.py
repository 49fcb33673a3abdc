"""What happens around the steps: one concern a file, each with its own state_dict.

A callback watches the trainer and never changes a step's numbers (but for planted faults); ``base`` has the hooks.
"""

from megatron_implicit.training.callbacks.base import Callback
from megatron_implicit.training.callbacks.checkpointing import Checkpointing
from megatron_implicit.training.callbacks.console import Console
from megatron_implicit.training.callbacks.desync import Desync
from megatron_implicit.training.callbacks.events import Events
from megatron_implicit.training.callbacks.faults import Faults
from megatron_implicit.training.callbacks.interruption import Interruption
from megatron_implicit.training.callbacks.metrics import Metrics
from megatron_implicit.training.callbacks.plots import Plots
from megatron_implicit.training.callbacks.reporting import Reporting
from megatron_implicit.training.callbacks.spectral_radius import SpectralRadius
from megatron_implicit.training.callbacks.target_loss import TargetLoss
from megatron_implicit.training.callbacks.validation import Validation

__all__ = [
    "Callback", "Checkpointing", "Console", "Desync", "Events", "Faults", "Interruption", "Metrics", "Plots",
    "Reporting", "SpectralRadius", "TargetLoss", "Validation",
]  # fmt: skip
