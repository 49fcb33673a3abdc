"""What a sink is, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional


@dataclass(frozen=True)
class Identity:
    """Who reports: the run, the job that works on it, and this process's place in it."""

    run: str
    """The run's name."""
    run_id: str
    """The same for every job that works on the run, and no other run's."""
    run_dir: Path
    job: str
    """Slurm's job number, or the process number of the job's rank 0."""
    node: str
    rank: int
    local_rank: int
    stage: int
    """Of the pipeline, from 0."""
    attempt: int
    first_step: int = 1
    """The step this job begins with."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""

    @property
    def labels(self) -> dict[str, str]:
        """For Prometheus."""
        return {"run": self.run, "job": self.job, "node": self.node, "rank": str(self.rank), "stage": str(self.stage)}


class Sink:
    """Takes a run's numbers. Every method runs on the sink's own thread and may fail or take its time: the run
    goes on without the sink."""

    name = "sink"
    """In messages."""
    rests = True
    """Whether the sink is left alone for a while once it has failed."""
    essential = False
    """Whether a checkpoint waits for what the sink was given."""

    def open(self) -> None:
        """Before anything else; may take its time."""

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        """A step has been made.

        Args:
            metrics: the job's, by ``RUN_METRICS``; on rank 0 only.
            rank: this rank's, by ``RANK_METRICS``; empty for the record of step 0.
        """

    def event(self, event: dict[str, Any]) -> None:
        """Something happened: a line of events.jsonl, from the rank that wrote it."""

    def flush(self) -> None:
        """What has been given is to reach its place."""

    def close(self) -> None:
        """Nothing follows."""
