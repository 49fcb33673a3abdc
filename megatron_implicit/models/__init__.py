"""Models: the map F, the decoder that iterates it (or applies it once), builders around GPTModel and MambaModel.

``stack_map`` is F; ``decoder`` takes the place of ``model.decoder`` inside Megatron-Core's models, which stay
otherwise unmodified; ``builder`` puts a model together from a configuration; ``initialisation`` draws its parameters
independently of the layout; ``parameters`` counts them by component; ``language`` is what a model has around its
decoder. May import what ``specs`` may, and ``specs``.
"""

from megatron_implicit.models.builder import build_model
from megatron_implicit.models.decoder import FixedPointDecoder, SinglePassDecoder, StackDecoder

__all__ = ["FixedPointDecoder", "SinglePassDecoder", "StackDecoder", "build_model"]
