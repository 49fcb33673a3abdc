"""Rows of tokens as batches on which only answers count."""

from __future__ import annotations

import numpy as np
import torch

from megatron_implicit.data.sampling import Batch
from megatron_implicit.data.tasks.stories.vocabulary import PAD_ID, QUESTION, Vocabulary


def batch_of_rows(rows: np.ndarray, vocabulary: Vocabulary) -> Batch:
    """The next token is each token's label, and it counts at question marks.

    Args:
        rows: [b, s + 1] tokens, padded at their ends.
        vocabulary: of the tokens.

    Returns:
        See ``Batch``; the loss mask is 1 at question marks whose answers are in the row.
    """
    tokens, labels = torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
    asked = (tokens == vocabulary.id(QUESTION)) & (labels != PAD_ID)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": asked.to(torch.float32),
        "position_ids": torch.arange(tokens.shape[1]).repeat(len(tokens), 1),
    }
