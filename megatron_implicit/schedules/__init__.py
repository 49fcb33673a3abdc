"""The recirculating pipeline schedule: fixed-point iterates travel round the stages until they converge.

Stage p of P holds a slice of F. An iterate goes 0 -> ... -> P-1 and back to 0; the last stage owns the solve, stage 0
decides what enters. Several microbatches circulate at once, each with as many evaluations as it needs.

    admission        stage 0 embeds a microbatch; the normalised embedding x travels once, with the first pass
    SOLVE            passes without gradient, until the solve's state machine on stage P-1 says otherwise
    PHANTOM          passes with gradient; every stage records the graph of its slice
    BACKWARD         the same passes in reverse, round the stages in reverse
    OUTPUT           the one pass that ends an inference solve

``protocol`` what travels, in which order gradients are added, and how much may be in flight; ``logic`` what a stage
does next, as a pure function of the messages it got: the driver and the simulator both run it; ``compute`` what the
driver asks of a stage's arithmetic; ``tape`` the answer for any model, with the autograd bookkeeping; ``model_stage``
a stage of ours; ``driver`` the loop over a channel (``comm.channel``); ``farewell`` how all ranks end when one must;
``recirculating`` the whole, in the place of Megatron-Core's forward-backward function. ``simulator`` runs the logic of
all stages with a clock: ``costs`` says how long tasks and messages take, ``timeline`` what the stages did, simulated
or recorded. May import what ``models`` may, ``models``, ``telemetry`` and ``data``.
"""

from megatron_implicit.schedules.compute import Outcome, StageCompute
from megatron_implicit.schedules.logic import StageLogic
from megatron_implicit.schedules.protocol import Kind, Limits, Message, ProtocolError, StepPlan
from megatron_implicit.schedules.recording import Recorder, TaskRecord

__all__ = [
    "Kind",
    "Limits",
    "Message",
    "Outcome",
    "ProtocolError",
    "Recorder",
    "StageCompute",
    "StageLogic",
    "StepPlan",
    "TaskRecord",
]
