"""What keeps transfers between stages from holding computation up."""

from __future__ import annotations

import pytest

from megatron_implicit.comm.ring import refuse_few_queues
from megatron_implicit.errors import LaunchError


@pytest.mark.parametrize("name", ["CUDA_DEVICE_MAX_CONNECTIONS", "GPU_MAX_HW_QUEUES"])
def test_few_hardware_queues_are_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=f"{name}=2 .*set it to 8 or more, or parallel.pipeline_transport=host"):
        refuse_few_queues({name: "2"})
    refuse_few_queues({name: "8"})
    refuse_few_queues({})
