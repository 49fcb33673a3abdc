"""The one place of this folder that imports Megatron-Core's dataset modules: after the device layer prepared them."""

from __future__ import annotations

from megatron_implicit.device import prepare_megatron

prepare_megatron()

from megatron.core.datasets import helpers, indexed_dataset  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

__all__ = ["GPTDataset", "GPTDatasetConfig", "Split", "helpers", "indexed_dataset"]
