"""Word problems: a sequence of elements of a group or monoid, labelled at every position with the product so far.

The label of position t is the product of tokens 0 to t, in that order: it is trained and scored where it stands,
without the shift of a language model. Source: section 4.1 of arXiv 2502.07827.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.sampling import Batch
from megatron_implicit.data.tasks.base import Split
from megatron_implicit.data.tasks.groups import Monoid, monoid_named

_SPLITS = {"train": 0, "validation": 1, "test": 2}
_WORDS_OF_A_BLOCK = 4
"""64-bit numbers that Philox makes of one value of its counter."""


def open_task(data: DataConfig) -> WordProblem:
    """The word problem of a data section.

    Raises:
        ConfigError: ``data.group`` is not offered.
    """
    return WordProblem(monoid_named(data.group), data.non_identity_share)


class WordProblem:
    """Uniformly drawn words in a monoid.

    Args:
        monoid: of the elements, whose numbers are the tokens.
        non_identity_share: probability that a position's factors in groups are drawn, all at once and uniformly, so
            that they may be the identity too; else they are. Factors that are not groups are always drawn.
    """

    def __init__(self, monoid: Monoid, non_identity_share: float = 1.0) -> None:
        self.monoid, self.non_identity_share = monoid, non_identity_share
        self.vocab_size = len(monoid)
        self.fingerprint = f"word_problem:{monoid.name}:{non_identity_share:g}:1"

    def samples(self, split: Split, count: int, sequence_length: int, seed: int) -> WordSamples:
        """See ``Task``."""
        return WordSamples(self, split, count, sequence_length, seed)


class WordSamples:
    """Samples of one split, length and seed; made when asked for, at millions of tokens a second.

    Random numbers come from a counter (Philox): sample i begins at a place of its own in their sequence.
    """

    def __init__(self, task: WordProblem, split: Split, count: int, length: int, seed: int) -> None:
        self._task, self._count, self._length = task, count, length
        self._key = [seed, _SPLITS[split] << 32 | length]
        self._blocks = -(-length // _WORDS_OF_A_BLOCK)

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: range) -> Batch:
        """See ``TaskSamples``."""
        tokens = self._draw(indices)
        labels = running_products(tokens, self._task.monoid.table)
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "loss_mask": torch.ones(tokens.shape),
            "position_ids": torch.arange(self._length).repeat(len(tokens), 1),
        }

    def _draw(self, indices: range) -> np.ndarray:
        """Tokens [b, s] int64: of a 64-bit number, the upper half chooses the element, the lower half decides on it."""
        generator = np.random.Philox(key=self._key).advance(indices.start * self._blocks)
        width = self._blocks * _WORDS_OF_A_BLOCK
        words = generator.random_raw(len(indices) * width).reshape(-1, width)[:, : self._length]
        monoid, share = self._task.monoid, self._task.non_identity_share
        tokens = ((words >> np.uint64(32)) * np.uint64(len(monoid)) >> np.uint64(32)).astype(np.int64)
        if share == 1.0:
            return tokens
        kept = (words & np.uint64(0xFFFFFFFF)) < np.uint64(round(share * 2**32))
        return np.where(kept, tokens, monoid.without_groups[tokens])


def running_products(tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The product of tokens 0 to t, for every t, in log2(s) rounds: round r leaves position t its last 2^r factors.

    Args:
        tokens: [b, s] elements.
        table: [n, n] products.

    Returns:
        [b, s] elements, of the table's type.
    """
    products, flat, size = tokens.astype(table.dtype), table.reshape(-1), len(table)
    reach = 1
    while reach < products.shape[1]:
        earlier = products[:, :-reach].astype(np.intp) * size
        products[:, reach:] = flat.take(earlier + products[:, reach:])
        reach *= 2
    return products
