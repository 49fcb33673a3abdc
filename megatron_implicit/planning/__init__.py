"""What a run would cost on a cluster, by formula: layouts that fit, their memory, time and GPU hours.

``cluster`` the machines; ``parameters`` and ``activations`` what a rank holds, in numbers and in bytes that autograd
keeps; ``memory`` adds them up; ``timing`` seconds of a stage's tasks and of collectives; ``evaluations`` how many
passes a solve takes; ``layouts`` the divisions of a job and its layers; ``plan`` one layout's step, by the schedule's
simulator; ``search`` the best of all; ``report`` tables and JSON; ``bubbles`` the schedule's bubble in general.
docs/planning.md has every formula with its name.

Imports ``config``, ``device``, ``comm``, ``telemetry``, ``schedules`` and ``errors``; builds no model and needs no
process group.
"""
