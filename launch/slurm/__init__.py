"""Submitting jobs to Slurm: ``bash SLURM/submit.sh`` runs ``launch/submit.py``, which uses what is here.

``cluster`` reads the cluster's settings; ``runs`` says which runs a command line asks for (a preset, a bounded run, a
branch of one), ``sweep`` those of a grid; ``script`` composes the batch script that is submitted, kept and printed by
--dry-run; ``snapshot`` keeps the code with the run; ``summary`` says what a run is and costs. The batch scripts
themselves are in ``SLURM/``.
"""
