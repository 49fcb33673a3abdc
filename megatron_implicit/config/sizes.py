"""The size table: model dimensions and learning rate by architecture and size.

130M to 1.3B are the paper's (arXiv 2502.07827, section 4 and its appendix); its learning rates are five times GPT-3's
of that size. 'tiny' is ours, for two CPU cores.
"""

from __future__ import annotations

from typing import Any

_MAMBA2_SHAPE = {"state_size": 128, "head_dim": 64, "scan_chunk_size": 256, "vocab_size": 50277}
_LLAMA_SHAPE = {"vocab_size": 50277}

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "mamba2": {
        "tiny": {"num_layers": 2, "hidden_size": 128, "state_size": 32, "head_dim": 32, "scan_chunk_size": 64},
        "130m": {"num_layers": 24, "hidden_size": 768, **_MAMBA2_SHAPE},
        "370m": {"num_layers": 48, "hidden_size": 1024, **_MAMBA2_SHAPE},
        "760m": {"num_layers": 48, "hidden_size": 1536, **_MAMBA2_SHAPE},
        "1.3b": {"num_layers": 48, "hidden_size": 2048, **_MAMBA2_SHAPE},
    },
    "llama": {
        "tiny": {"num_layers": 2, "hidden_size": 128, "num_heads": 4},
        "130m": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, **_LLAMA_SHAPE},
        "370m": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, **_LLAMA_SHAPE},
        "760m": {"num_layers": 24, "hidden_size": 1536, "num_heads": 16, **_LLAMA_SHAPE},
        "1.3b": {"num_layers": 24, "hidden_size": 2048, "num_heads": 32, **_LLAMA_SHAPE},
    },
}

LEARNING_RATES: dict[str, float] = {"tiny": 3e-3, "130m": 3e-3, "370m": 1.5e-3, "760m": 1.25e-3, "1.3b": 1e-3}
