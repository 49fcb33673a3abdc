"""Multiplication tables of finite groups and monoids, by name.

``S3`` to ``S6`` and ``A3`` to ``A6`` (permutations of that many things, all or the even ones), ``Z<n>`` (addition
modulo n), ``M`` (the aperiodic monoid of the paper's word problems), and direct products such as ``A5xM`` or ``A4xZ5``.
Element 0 is always the identity.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from megatron_implicit.errors import ConfigError

OFFERED = "S3 to S6, A3 to A6, Z<n>, M, and products of them such as A5xM"
MAX_ELEMENTS = 4096
"""Largest table that is made: 32 MiB."""


@dataclass(frozen=True)
class Monoid:
    """A finite set with an associative product and an identity."""

    name: str
    table: np.ndarray
    """[n, n] int16: element a times element b at [a, b]; element 0 is the identity."""
    without_groups: np.ndarray
    """[n] int16: each element with its factors in groups replaced by their identities; all 0 for a group."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def is_group(self) -> bool:
        """Whether every element has an inverse."""
        return not self.without_groups.any()


@functools.lru_cache(maxsize=32)
def monoid_named(name: str) -> Monoid:
    """The group, monoid or product of that name.

    Raises:
        ConfigError: there is none of that name, or it has too many elements.
    """
    factors = [_factor(part, name) for part in name.split("x")]
    _refuse_large(math.prod(len(factor) for factor in factors), name)
    product = functools.reduce(_direct_product, factors)
    return Monoid(name, product.table, product.without_groups)


def _refuse_large(elements: int, name: str) -> None:
    if elements > MAX_ELEMENTS:
        raise ConfigError(f"data.group={name} has {elements:,} elements: use one of at most {MAX_ELEMENTS:,}")


def _factor(name: str, whole: str) -> Monoid:
    match = re.fullmatch(r"(M)|([SA])([3-6])|Z([1-9]\d{0,3})", name)
    if match is None:
        raise ConfigError(f"data.group={whole} is not a group or monoid offered here: use {OFFERED}")
    if match[1]:
        return Monoid(name, _aperiodic(), np.arange(4, dtype=np.int16))
    if match[4]:
        _refuse_large(int(match[4]), whole)
    table = _permutations(int(match[3]), even=match[2] == "A") if match[2] else _cyclic(int(match[4]))
    return Monoid(name, table, np.zeros(len(table), np.int16))


def _cyclic(order: int) -> np.ndarray:
    numbers = np.arange(order)
    return ((numbers[:, None] + numbers) % order).astype(np.int16)


def _permutations(points: int, even: bool) -> np.ndarray:
    """Table of the permutations of ``points`` things in lexicographic order; a times b applies b first."""
    elements = np.array(list(itertools.permutations(range(points))))
    if even:
        inversions = sum((elements[:, [i]] > elements[:, i + 1 :]).sum(axis=1) for i in range(points))
        elements = elements[inversions % 2 == 0]
    keys = elements @ points ** np.arange(points - 1, -1, -1)  # ascending, since the order is lexicographic
    products = elements[:, elements]  # [a, b, i] = a(b(i))
    return np.searchsorted(keys, products @ points ** np.arange(points - 1, -1, -1)).astype(np.int16)


def _aperiodic() -> np.ndarray:
    """{E, A, B, X} of arXiv 2502.07827's word problems: E the identity, X absorbing, AA = AB = X, BA = A, BB = B."""
    return np.array([[0, 1, 2, 3], [1, 3, 3, 3], [2, 1, 2, 3], [3, 3, 3, 3]], np.int16)


def _direct_product(left: Monoid, right: Monoid) -> Monoid:
    """Element (a, b) has number a * len(right) + b."""
    size = len(right)
    first, second = np.divmod(np.arange(len(left) * size), size)
    table = left.table[first[:, None], first] * np.int16(size) + right.table[second[:, None], second]
    without_groups = left.without_groups[first] * np.int16(size) + right.without_groups[second]
    return Monoid(f"{left.name}x{right.name}", table.astype(np.int16), without_groups.astype(np.int16))
