"""Host memory whose copies are made as late as those of a GPU may be, for the tensors of a CPU."""

from __future__ import annotations

from typing import Sequence

import pytest
import torch
from torch import Tensor

from megatron_implicit.checkpoint import background, writer
from megatron_implicit.device.host_memory import HostMemory


class LateMemory(HostMemory):
    """Copies when it is waited for; until then the copies hold sevens."""

    def begin_copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._originals = list(tensors)
        self._copies = [torch.full_like(tensor, 7, memory_format=torch.contiguous_format) for tensor in tensors]
        return self._copies

    def finish_copy(self) -> None:
        for copy, original in zip(self._copies, self._originals, strict=True):
            copy.copy_(original)


def copy_late(patch: pytest.MonkeyPatch) -> None:
    """Makes checkpoints take the way of a GPU's tensors, through such memory."""
    patch.setattr(background, "_is_away", lambda tensor: True)
    patch.setattr(writer, "HostMemory", LateMemory)
