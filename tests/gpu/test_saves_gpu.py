"""Checkpoints of a GPU's tensors, which are copied to the host beside the steps that follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.test_writer import train_beside_saves

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_save_beside_training_holds_the_state_of_its_beginning(
    one_process: None, tmp_path: Path, distributed_optimizer: bool
) -> None:
    """The third save reuses the plan of the second, and all of them the memory of the first."""
    assert all(train_beside_saves(tmp_path, {"distributed_optimizer": distributed_optimizer}, saves=3))
