"""The fixed-point solve as a state machine; it knows no models, no process groups and no schedules.

``FixedPointSolve.update(F(z))`` answers with what to do next: evaluate F again without gradient (SOLVE), evaluate it
with gradient (PHANTOM), evaluate it once more for the output (OUTPUT), or stop (DONE). The local loop (``drive``), a
pipeline schedule, and the sequential and chunked solves of inference all drive this one machine: stopping rule,
damping, best iterate and trace exist once. ``WindowSolve`` is the same machine deciding by token, over a window that
slides along the sequence.

``machine`` the states; ``window`` the sliding window; ``residual`` the norms; ``settings`` what distinguishes a
training solve from an inference solve; ``trace`` what a solve reports. May import ``config`` and ``errors``.
"""

from megatron_implicit.solver.loop import drive
from megatron_implicit.solver.machine import Decision, FixedPointSolve, Step
from megatron_implicit.solver.settings import ResidualNorm, SolveSettings
from megatron_implicit.solver.trace import SolveTrace
from megatron_implicit.solver.window import WindowSolve

__all__ = ["Decision", "FixedPointSolve", "ResidualNorm", "SolveSettings", "SolveTrace", "Step", "WindowSolve", "drive"]
