"""Every element of a dimension belongs to exactly one rank, and all ranks compute with equal slices."""

from __future__ import annotations

import pytest

from megatron_implicit.comm.partition import partition
from megatron_implicit.errors import ConfigError


@pytest.mark.parametrize("logical", [85, 131, 2730, 5461, 4096, 50277])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_uneven_dimensions_are_covered_once(logical: int, ranks: int) -> None:
    parts = [partition(logical, ranks, rank, align=True) for rank in range(ranks)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(logical))
    assert len({part.computed for part in parts}) == 1
    assert all(part.size + part.padding == part.computed for part in parts)
    assert all(part.size for part in parts)
    assert logical < 1000 or parts[0].computed % 8 == 0


def test_even_dimensions_have_no_padding() -> None:
    part = partition(128, 4, 3)
    assert (part.start, part.stop, part.padding, part.even) == (96, 128, 0, True)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="a dimension of 10 does not divide over parallel.tensor=4"):
        partition(10, 4, 0)
    with pytest.raises(ConfigError, match="too small for parallel.tensor=8"):
        partition(20, 8, 0, align=True)
