"""What every number is called, its unit and what it means: one list behind the exporters, the page and the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of a step."""

    key: str
    """In metrics.jsonl, or in a rank's file; ``megatron_implicit_`` before it is its name in Prometheus."""
    title: str
    unit: str
    """'' for pure numbers; 'share' for fractions of one."""
    meaning: str
    """One or two sentences for someone who has not seen the number before."""


def _metrics(*rows: tuple[str, str, str, str]) -> dict[str, Metric]:
    return {row[0]: Metric(*row) for row in rows}


RUN_METRICS: dict[str, Metric] = _metrics(
    ("step", "step", "", "Optimizer steps made, counted from 1."),
    ("tokens", "tokens", "tokens", "Tokens the run has been trained on, over all attempts that counted."),
    ("attempt", "attempt", "", "How many jobs worked on this run before: 0 is the first, each restart adds one."),
    ("loss", "training loss", "nats/token", "Mean cross-entropy over the step's global batch."),
    ("validation_loss", "held-out loss", "nats/token", "Mean cross-entropy over the fixed validation batches."),
    ("grad_norm", "gradient norm", "", "Global norm of the gradient before clipping, every parameter counted once."),
    ("learning_rate", "learning rate", "", "Rate the step's update was made with."),
    ("tokens_per_s", "throughput", "tokens/s", "Tokens of the step by its time, whole job. It falls when solves need "
     "more evaluations, without anything being wrong: compare FLOP/s then."),
    ("model_flops_per_s", "model FLOP/s", "FLOP/s", "Floating-point operations the model needed for the step "
     "(evaluations that were made, phantom passes, backward; nothing recomputed), by time and device."),
    ("mfu", "MFU", "share", "Model FLOP/s by the device's data-sheet peak. Unknown devices have none."),
    ("step_time_s", "step time", "s", "Forward, backward and update; validation and checkpoints are not in it."),
    ("memory_bytes", "peak memory", "bytes", "Most memory this process has held: on the GPU, or resident on a CPU."),
    ("iterations_mean", "iterations, mean", "", "Evaluation that gave a sample's best iterate, mean over the step."),
    ("iterations_max", "iterations, most", "", "Evaluation that gave the best iterate, of the slowest sample."),
    ("evaluations_mean", "evaluations, mean", "", "Passes of F without gradient a solve took: what a token costs."),
    ("evaluations_p50", "evaluations, median", "", "Half of the samples took at most this many passes of F."),
    ("evaluations_p99", "evaluations, 99%", "", "99 of 100 samples took at most this many passes of F."),
    ("evaluations_max", "evaluations, most", "", "Passes of F of the sample that took most."),
    ("evaluations_skew", "evaluations, skew", "", "How far the replicas' mean evaluations lie apart: the rest of the "
     "replicas waits for the one that needs most."),
    ("residual_mean", "residual, mean", "", "Mean ‖F(z) − z‖ / ‖F(z)‖ of the accepted iterates: how far from solved."),
    ("residual_p50", "residual, median", "", "Half of the samples were accepted with at most this relative residual."),
    ("residual_p90", "residual, 90%", "", "9 of 10 samples were accepted with at most this relative residual."),
    ("residual_p99", "residual, 99%", "", "99 of 100 samples were accepted with at most this relative residual."),
    ("residual_max", "residual, largest", "", "Relative residual of the worst sample."),
    ("unconverged_fraction", "unconverged", "share", "Share of samples whose solve did not reach the tolerance. Phases "
     "without a tolerance (bounded) have none."),
    ("token_residual_p50", "token residual, median", "", "Relative residual of single tokens at the last evaluation."),
    ("token_residual_p90", "token residual, 90%", "", "Relative residual of single tokens at the last evaluation."),
    ("token_residual_p99", "token residual, 99%", "", "Relative residual of single tokens at the last evaluation."),
    ("token_residual_p100", "token residual, largest", "", "Relative residual of the worst token: a limit cycle hides "
     "here long before it shows in the mean."),
    ("spectral_radius", "spectral radius", "", "Estimated spectral radius of dF/dz at fixed points of a microbatch, "
     "where telemetry.spectral_radius_every asks for it: below 1 the undamped iteration converges there."),
    ("skipped_steps", "skipped steps", "", "Steps of this job whose update was left out because they were bad."),
    ("checkpoint_time", "newest checkpoint", "unix s", "When the newest checkpoint became whole; its age is what a "
     "crash would cost."),
    ("disk_free_bytes", "disk free", "bytes", "Free on the file system of the run's folder."),
    ("disk_free_fraction", "disk free", "share", "Free share of the file system of the run's folder."),
)  # fmt: skip
"""Numbers of the whole job, by key of metrics.jsonl."""

RANK_METRICS: dict[str, Metric] = _metrics(
    ("step_s", "step", "s", "Time of a step on this rank; the same everywhere, as ranks wait for each other."),
    ("busy_s", "busy", "s", "Step time without communication: what this rank took for itself. The rank with most of it "
     "is the one the others wait for."),
    ("slowness", "slowness", "× median", "Busy time by the median of its pipeline stage's ranks. 1 is usual."),
    ("data_wait_s", "data wait", "s", "Waiting for the next microbatch."),
    ("forward_s", "forward", "s", "Embedding, head and loss; in explicit models the whole forward pass."),
    ("solve_s", "solve", "s", "Passes of F without gradient."),
    ("phantom_s", "phantom", "s", "Passes of F that carry the gradient."),
    ("backward_s", "backward", "s", "Backward pass."),
    ("optimizer_s", "optimizer", "s", "Clipping and update."),
    ("communication_s", "communication", "s", "In collectives, waiting for slower ranks included: low on a straggler."),
    ("rank_tokens_per_s", "tokens/s", "tokens/s", "The job's tokens a second by its ranks."),
    ("rank_memory_bytes", "peak memory", "bytes", "Most memory this process has held."),
    ("own_evaluations_mean", "evaluations, mean", "", "Passes of F a solve took, samples of this replica."),
    ("own_evaluations_p50", "evaluations, median", "", "Passes of F a solve took, median sample of this replica."),
    ("own_evaluations_p99", "evaluations, 99%", "", "Passes of F a solve took, 99% of this replica's samples."),
    ("own_evaluations_max", "evaluations, most", "", "Passes of F a solve took, this replica's slowest sample."),
    ("own_residual_p50", "residual, median", "", "Relative residual of accepted iterates, this replica."),
    ("own_residual_p90", "residual, 90%", "", "Relative residual of accepted iterates, this replica."),
    ("own_residual_p99", "residual, 99%", "", "Relative residual of accepted iterates, this replica."),
    ("own_unconverged_fraction", "unconverged", "share", "Share of this replica's samples that missed the tolerance."),
)  # fmt: skip
"""Numbers of one rank, by key of its file."""
