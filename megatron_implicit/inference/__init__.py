"""Using a trained model: states of a partly solved sequence, and the solves that pass them on.

``states`` holds what layers carry from token to token; ``forward`` evaluates a whole sequence, or chunk after chunk
(chunk 1 is sequential mode, a chunk as long as the sequence simultaneous mode). May import ``models`` and below.
"""

from megatron_implicit.inference.forward import ModelOutput, evaluate_in_chunks, evaluate_sequence

__all__ = ["ModelOutput", "evaluate_in_chunks", "evaluate_sequence"]
