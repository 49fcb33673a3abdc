"""Distributed pretraining of implicit (deep-equilibrium) language models on Megatron-Core.

A Mamba2 or Llama stack F is iterated to a fixed point z = F(z; u(x)): the solve runs without gradient, a few
phantom steps carry it. Source of the model: "Implicit Language Models are RNNs" (arXiv 2502.07827).

The name most callers need is :func:`load_pretrained`; training starts from ``launch/pretrain.py``. Each folder's
docstring says what belongs there and what it may import; ``README.md`` has the map.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_pretrained", "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: importing the package must not import torch or patch Megatron-Core.
    if name == "load_pretrained":
        from megatron_implicit.api import load_pretrained

        return load_pretrained
    raise AttributeError(f"module 'megatron_implicit' has no attribute {name!r}")
