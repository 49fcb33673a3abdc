"""Batches of sequences of different lengths: padding on either side is moved to the end and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from megatron_implicit.errors import ConfigError


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch are."""

    lengths: list[int]
    """Tokens by sample, in host memory."""
    starts: Optional[Tensor]
    """[b] place of each sample's first token; None: all begin at 0."""

    @classmethod
    def of_lengths(cls, lengths: Union[Sequence[int], Tensor], tokens: int) -> "Padding":
        """Padding at the end, after ``lengths`` [b] tokens each.

        Raises:
            ConfigError: a length below 0 or above ``tokens``, or no token at all.
        """
        values = [int(length) for length in lengths]
        if not all(0 <= value <= tokens for value in values) or not any(values):
            raise ConfigError(f"lengths={values} must lie between 0 and the {tokens} tokens of input_ids, not all 0")
        return cls(values, None)

    @classmethod
    def of_mask(cls, attention_mask: Tensor) -> "Padding":
        """Of a mask [b, s] as tokenizers give it: 1 for a token, 0 for padding before or after the tokens.

        Raises:
            ConfigError: padding between tokens, or no token at all.
        """
        mask = attention_mask.bool()
        lengths = mask.sum(1)
        starts = mask.int().argmax(1)
        places = torch.arange(mask.shape[1], device=mask.device)
        contiguous = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
        if not torch.equal(contiguous, mask) or not bool(mask.any()):
            raise ConfigError("attention_mask must mark one run of tokens a sample, with padding only before or after")
        return cls(lengths.tolist(), starts if bool(starts.any()) else None)

    def to_the_end(self, input_ids: Tensor) -> Tensor:
        """[b, s] padded on either side -> padded at the end, with id 0."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        source = places if self.starts is None else (places + self.starts[:, None]) % input_ids.shape[1]
        moved = input_ids.gather(1, source.expand_as(input_ids))
        lengths = torch.tensor(self.lengths, device=input_ids.device)
        return moved.masked_fill(places >= lengths[:, None], 0)

    def back(self, values: Tensor) -> Tensor:
        """[b, s, ...] by token of the moved batch -> at the places of the given one."""
        if self.starts is None:
            return values
        places = torch.arange(values.shape[1], device=values.device)
        source = (places - self.starts[:, None]) % values.shape[1]
        return values[torch.arange(len(values), device=values.device)[:, None], source]
