"""Megatron-Core modules of the stack F: sectioned and weight-normed linears, norms, mixer, attention, vocabulary.

``sections`` names the parts of a projection and how a rank assembles them; ``weights`` holds parameters and turns
them into effective weights; ``passes`` is what one microbatch's evaluations of F share; ``linear``, ``mamba2_mixer``,
``attention``, ``norms``, ``vocabulary`` are the modules themselves; ``residual`` adds their branches to the float32
stream; ``recompute`` the layers that forget their activations. May import config, device, comm, ops, solver and
errors.
"""
