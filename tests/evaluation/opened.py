"""Small untrained models taken apart, each test its own: they are turned into float64."""

from __future__ import annotations

from megatron_implicit.evaluation.open_model import OpenModel
from tests.inference.models import small_model


def opened_model(kind: str, layers: int = 2) -> OpenModel:
    """``small_model``, built anew, in float64."""
    return OpenModel(small_model.__wrapped__(kind, layers))
