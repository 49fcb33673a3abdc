"""Composes the batch script that is submitted: one of SLURM/*.sbatch under a header with all that is known by now."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.slurm.cluster import Cluster

BODY = "# ---- the job ----\n"
"""The line of a batch script after which it does not depend on how it was submitted."""


@dataclass(frozen=True)
class JobScript:
    """What goes into a batch script."""

    body: Path
    """One of SLURM/*.sbatch."""
    cluster: Cluster
    """Where it goes; its own arguments of sbatch come last and win."""
    name: str
    """The job's name: one run's jobs share it, and no two of them run at once."""
    comments: Sequence[str]
    """What a reader wants to know, one line each."""
    options: Sequence[str]
    """sbatch's, as '--nodes=4'."""
    variables: Mapping[str, str]
    """Exported before the body."""
    arguments: Sequence[Sequence[str]] = field(default_factory=lambda: [[]])
    """The body's; of each task, for an array."""

    def text(self) -> str:
        """The whole script."""
        header = ["#!/usr/bin/env bash", *(f"# {line}".rstrip() for line in self.comments), ""]
        options = (f"--job-name={self.name}", *self.options, *shlex.split(self.cluster.sbatch_arguments))
        header += [f"#SBATCH {_one_word(option)}" for option in options]
        header += ["", *(f"export {name}={shlex.quote(value)}" for name, value in self.variables.items())]
        header += [*self._set_arguments(), ""]
        body = self.body.read_text(encoding="utf-8").partition(BODY)
        return "\n".join(header) + "\n" + body[1] + body[2]

    def _set_arguments(self) -> list[str]:
        if len(self.arguments) == 1:
            return [f"set -- {shlex.join(self.arguments[0])}"]
        cases = [f"    {index}) set -- {shlex.join(words)} ;;" for index, words in enumerate(self.arguments)]
        return ["case ${SLURM_ARRAY_TASK_ID:-0} in", *cases, "esac"]


def _one_word(option: str) -> str:
    """As sbatch reads it where a value has spaces, such as the path of a run."""
    name, sign, value = option.partition("=")
    return f"{name}{sign}{shlex.quote(value)}" if " " in value else option


def resources(
    cluster: Cluster, nodes: int, time: str, *, ranks: int | None = None, gpus: int | None = None
) -> list[str]:
    """sbatch's options for some nodes of a cluster.

    Args:
        cluster: the site's settings.
        nodes: how many.
        time: limit of the job.
        ranks: of a node; None takes the cluster's, with all GPUs and memory of a node.
        gpus: of a node, where ``ranks`` is given.
    """
    whole = ranks is None
    options = [f"--nodes={nodes}", f"--ntasks-per-node={cluster.ranks if whole else ranks}"]
    if whole and cluster.gpu_request:
        options.append(cluster.gpu_request)
    elif cluster.gpus if whole else gpus:
        options.append(f"--gpus-per-node={cluster.gpus if whole else gpus}")
    if cluster.cpus_per_rank:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if whole:
        options += [f"--mem={cluster.memory_per_node}"]
    options.append(f"--time={time}")
    named = ("account", "partition", "qos", "constraint")
    options += [f"--{name}={getattr(cluster, name)}" for name in named if getattr(cluster, name)]
    return options
