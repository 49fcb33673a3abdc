"""Training: the loop's core and, around it, callbacks with one concern each.

``session`` decides whether a run starts, resumes or branches, and builds everything; ``trainer`` is the loop;
``step`` one optimizer step; ``optimizer`` Megatron-Core's DDP, optimizer and schedule; ``curriculum`` the solver's
phases; ``validation`` the held-out loss; ``callbacks/`` everything that only watches or reacts. May import everything
but ``evaluation``, ``tools`` and ``launch``.
"""
