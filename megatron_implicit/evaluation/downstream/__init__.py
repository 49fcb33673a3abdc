"""Downstream tasks through lm-eval (EleutherAI's lm-evaluation-harness), from local files in their published formats.

``harness_model`` is lm-eval's view of a loaded model, ``tasks/*.yaml`` say how each task is asked and scored,
``sources`` finds and reads the files, ``documents`` brings each format into the fields the YAML names, ``command`` is
``tools/evaluate.py downstream``. Only these modules import lm-eval. May import what ``evaluation`` may.
"""
