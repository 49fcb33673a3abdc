"""The paper's experiments: one module a study, run by ``tools/evaluate.py NAME``, or all by ``paper``.

A study's module has ``TITLE`` and ``CLAIM`` (what the paper says, in a sentence), ``SIZES`` (its settings by size:
"tiny" for two CPU cores, "paper" for GPUs) and ``run(settings, context)``, which returns a :class:`StudyResult`. What
studies share is beside them: ``study`` (results and where they are kept), ``training`` (runs of launch/pretrain.py),
``figures`` (drawing), ``report`` (one page of all). May import what ``evaluation`` may.
"""

from megatron_implicit.evaluation.studies.study import Figure, StudyContext, StudyResult, Table

__all__ = ["Figure", "StudyContext", "StudyResult", "Table"]
