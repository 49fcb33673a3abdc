"""On a GPU the tests compute as training does."""

from __future__ import annotations

import pytest

from megatron_implicit.device.determinism import fix_order_of_sums


@pytest.fixture(scope="session", autouse=True)
def fixed_order_of_sums() -> None:
    """Before mamba-ssm is imported; its kernels are then compiled for one block size, not for all it could try."""
    fix_order_of_sums()
