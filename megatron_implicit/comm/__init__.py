"""Process groups and what travels over them: Megatron-Core's groups, reductions, and division of dimensions.

``groups`` starts torch.distributed and Megatron-Core's parallel state; ``reductions`` holds the sums and agreements
the solver and the norms need; ``agreement`` what all ranks of a job agree on beside the computation; ``partition`` says
which slice of a dimension a rank owns; ``preflight`` finds ranks that compute or communicate wrongly or slowly;
``ring`` the groups of a pipeline whose messages go round, ``channel`` the messages, ``leadership`` how the ranks that
share a stage take them in the same order; ``failures`` tells the loss of a rank from other errors. Imports only
``config``, ``device`` and ``errors``.
"""
