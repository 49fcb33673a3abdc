"""What a run reports about itself, and what is made of it.

``metrics_file`` writes and reads metrics.jsonl; ``flops`` counts a model's FLOPs; ``summary`` condenses a run into a
few numbers; ``plots`` draws its curves; ``progress`` is the bar of work of known length. Imports only ``config``,
``device``, ``comm`` and ``errors`` of the package.
"""
