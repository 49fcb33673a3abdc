"""Using a trained model: states of a partly solved sequence, the solves that pass them on, and generation.

``session`` is the state-passing primitive that all modes call: it solves the next tokens of a batch on committed
states (``states``) and commits them, simultaneously, chunk by chunk (chunk 1 is sequential mode) or in a sliding
``window``. ``forward`` evaluates whole sequences, ``padding`` brings batches of different lengths into one form,
``sampling`` chooses tokens and ``generation`` goes on from prompts. May import ``models`` and below.
"""

from megatron_implicit.inference.forward import ModelOutput, evaluate, logits_of
from megatron_implicit.inference.padding import Padding
from megatron_implicit.inference.session import InferenceSession, Mode, Solved, SolveMode

__all__ = ["InferenceSession", "Mode", "ModelOutput", "Padding", "SolveMode", "Solved", "evaluate", "logits_of"]
