"""How the tensor-parallel ranks of a stage come to do the same thing next.

Each of them gets messages of its own, at times of its own; ranks that chose by what has arrived would meet in different
collectives. The first rank chooses, the others follow.
"""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.distributed as dist

FAREWELL_S = 5.0
"""What a rank that gives up waits for the others to hear of it."""


class Leadership:
    """The choices of a group's first rank, a few numbers each.

    Args:
        group: on the CPU (Gloo).
        numbers: in a choice.
    """

    def __init__(self, group: dist.ProcessGroup, numbers: int) -> None:
        self._group, self._numbers = group, numbers
        self._leader = dist.get_global_rank(group, 0)

    @property
    def leads(self) -> bool:
        """Whether this rank chooses."""
        return self._group.rank() == 0

    def announce(self, choice: tuple[int, ...]) -> None:
        """The leader tells what it does next."""
        if self._group.size() > 1:
            dist.broadcast(torch.tensor(choice, dtype=torch.int64), self._leader, group=self._group)

    def announce_end(self, choice: tuple[int, ...]) -> None:
        """A last choice, as well as it goes: followers may be gone, or busy for good."""
        if not self.leads:
            return

        def tell() -> None:
            with contextlib.suppress(RuntimeError):
                self.announce(choice)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(FAREWELL_S)

    def learn(self) -> tuple[int, ...]:
        """A follower waits for the leader's next choice."""
        choice = torch.empty(self._numbers, dtype=torch.int64)
        dist.broadcast(choice, self._leader, group=self._group)
        return tuple(choice.tolist())
