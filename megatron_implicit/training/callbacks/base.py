"""The hooks of a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Callback:
    """Base of all callbacks; every hook runs on every rank, in the order the callbacks were given."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this job."""

    def before_step(self, trainer: "Trainer", step: int) -> None:
        """Before step ``step`` (counted from 1)."""

    def proposals(self, trainer: "Trainer") -> dict[str, int]:
        """Numbers to agree on during the coming step; ``trainer.agreed`` has the largest of any rank after it."""
        return {}

    def after_backward(self, trainer: "Trainer", step: int) -> None:
        """When a step's gradients are there, before they are judged; again for every repetition of the step."""

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        """After a step, with its record, which earlier callbacks may have completed."""

    def on_failure(self, trainer: "Trainer", error: BaseException) -> None:
        """When the job cannot go on, before its ranks leave; no collectives, other ranks may be gone."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step of this job."""

    def on_event(self, trainer: "Trainer", event: dict[str, Any]) -> None:
        """When this rank has written a line of events.jsonl; perhaps on another thread."""

    def on_exit(self, trainer: "Trainer") -> None:
        """At the very end of a job, however it ended."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave."""
