"""The dataclasses of a run's configuration. Every field is documented right under it, with its unit.

``None`` means "derived from other fields" (see ``resolve``); a resolved configuration has none of those left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

Family = Literal["implicit_mamba2", "implicit_llama", "explicit_mamba2", "explicit_llama"]
Size = Literal["tiny", "130m", "370m", "760m", "1.3b", "custom"]


@dataclass
class ModelConfig:
    """The model: family, size, and what the size implies."""

    family: Family = "implicit_mamba2"
    """Architecture of the stack F, and whether it is iterated to a fixed point (implicit) or run once (explicit)."""
    size: Size = "tiny"
    """Row of the size table that fills every field below that is not set; 'custom' fills none."""
    num_layers: Optional[int] = None
    """Layers of the stack."""
    hidden_size: Optional[int] = None
    """Model width h."""
    vocab_size: Optional[int] = None
    """Entries of the vocabulary; None takes the tokenizer's."""
    num_heads: Optional[int] = None
    """Llama: attention heads."""
    num_query_groups: Optional[int] = None
    """Llama: key/value heads; None means one per attention head."""
    ffn_size: Optional[int] = None
    """Llama: hidden width of the gated MLP; None means int(2 * 4h / 3), as in the paper."""
    rope_base: float = 500000.0
    """Llama: base period of the rotary embedding."""
    state_size: Optional[int] = None
    """Mamba2: size N of the state of one channel."""
    head_dim: Optional[int] = None
    """Mamba2: channels of one head."""
    expand: int = 2
    """Mamba2: inner width as a multiple of h."""
    num_groups: int = 1
    """Mamba2: groups that share B and C; 1 (replicated under tensor parallelism) or a multiple of parallel.tensor."""
    conv_width: int = 4
    """Mamba2: taps of the causal depthwise convolution."""
    scan_chunk_size: Optional[int] = None
    """Mamba2: tokens of one block of the SSD scan; changes speed and rounding, not the result."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    embedding_init_std: float = 0.01
    """Standard deviation of the initial token embedding, and of an untied head."""
    tie_embeddings: bool = True
    """Take the token embedding as the output head, as in the paper; false gives the head weights of its own."""
    dropout: float = 0.0
    """Dropout of the residual branches; implicit models refuse it, since every pass would draw another mask."""


@dataclass
class SolverConfig:
    """The solve of a training forward pass and what carries its gradient."""

    max_iterations: int = 24
    """Largest number of evaluations of F in one solve."""
    tolerance: float = 0.05
    """Relative residual below which a sample has converged; 0 runs exactly max_iterations evaluations."""
    damping: float = 1.0
    """Solver step: z <- damping * F(z) + (1 - damping) * z. 1 is the reference's training solve."""
    fallback_damping: Optional[float] = None
    """Damping a sample falls back to when its residual stagnates (a limit cycle); None never falls back."""
    phantom_steps: int = 4
    """Passes with gradient after the solve; unused by gradient=unrolled."""
    phantom_damping: float = 0.8
    """tau of the phantom steps (and of the unrolled iteration): z <- tau * F(z) + (1 - tau) * z."""
    stop: Literal["batch", "sample"] = "batch"
    """batch: iterate until all samples of a microbatch converged; sample: a converged sample is frozen at once."""
    gradient: Literal["phantom", "unrolled"] = "phantom"
    """phantom: gradient through phantom_steps after the solve; unrolled: through all max_iterations passes."""


@dataclass
class InferenceConfig:
    """The solve of evaluation and generation."""

    max_iterations: Optional[int] = None
    """Most passes of an inference solve, its output pass included; None means 4 * solver.max_iterations."""
    tolerance: Optional[float] = None
    """Relative residual that ends an inference solve; None means solver.tolerance."""
    damping: Optional[float] = None
    """Damping of the inference solve; None means solver.phantom_damping, as in the reference."""
    stop: Literal["batch", "sample"] = "sample"
    """sample: no sample's output depends on its companions."""
    patience: int = 8
    """Window mode: evaluations a token at the front may go without progress before it is accepted as it is."""
    warm_start: bool = False
    """Start new tokens from the iterate of the token before them instead of z = 0 (not in simultaneous mode)."""


@dataclass
class PhaseConfig:
    """A stretch of the run with solver values of its own."""

    start: float = 0.0
    """Fraction of the run's tokens at which the phase begins; the first phase begins at 0."""
    name: str = "main"
    """Name in logs, metrics and plots."""
    max_iterations: Optional[int] = None
    """Overrides solver.max_iterations during the phase."""
    tolerance: Optional[float] = None
    """Overrides solver.tolerance during the phase."""
    damping: Optional[float] = None
    """Overrides solver.damping during the phase."""
    fallback_damping: Optional[float] = None
    """Overrides solver.fallback_damping during the phase."""
    phantom_steps: Optional[int] = None
    """Overrides solver.phantom_steps during the phase."""
    phantom_damping: Optional[float] = None
    """Overrides solver.phantom_damping during the phase."""
    stop: Optional[Literal["batch", "sample"]] = None
    """Overrides solver.stop during the phase."""
    gradient: Optional[Literal["phantom", "unrolled"]] = None
    """Overrides solver.gradient during the phase."""


@dataclass
class ParallelConfig:
    """How the job's processes share the model."""

    tensor: int = 1
    """Ranks that share each layer (tensor parallelism)."""
    pipeline: int = 1
    """Pipeline stages the layers are divided over."""
    layers_per_stage: Optional[list[int]] = None
    """Layers of each pipeline stage; None divides them evenly, the first stages taking what is left over, since the
    last one also has the head."""
    context: int = 1
    """Ranks that share a sequence; only 1 is supported."""
    sequence: bool = False
    """Shard the iterate and the norms along the sequence over the tensor group (needs tensor > 1)."""
    microbatches_in_flight: Optional[int] = None
    """Pipeline: microbatches solving at once; None means twice the stages."""
    pipeline_transport: Literal["device", "host"] = "device"
    """Pipeline of an implicit model: how iterates travel. device: by the backend of the collectives; host: through host
    memory over Gloo, where the device's point-to-point transfers hang."""
    distributed_optimizer: bool = False
    """Shard optimizer state and main parameters over the data-parallel ranks; always on with precision=bf16."""
    recompute: Literal["none", "layer", "pass"] = "none"
    """Recompute activations in the backward pass, layer by layer or a whole pass of F at once."""
    timeout_minutes: float = 10.0
    """Minutes after which a collective that does not complete ends the job."""


@dataclass
class DataConfig:
    """Where the tokens come from and how they are split and packed."""

    task: Literal["text", "word_problem", "stories"] = "text"
    """text: documents at path; word_problem: running products in a group; stories: questions about short stories. The
    tasks other than text are generated (or read) with a vocabulary of their own and need no path and no tokenizer."""
    path: str = "runs/quickstart/data"
    """A folder holding NAME.bin/NAME.idx datasets and their tokenizer, the prefix of one dataset, or a blend (YAML)."""
    sequence_length: int = 256
    """Tokens of one training sample."""
    split: list[float] = field(default_factory=lambda: [0.98, 0.01, 0.01])
    """Shares of documents, drawn at random, for train, validation and test."""
    tokenizer: Optional[str] = None
    """Tokenizer file (.model or .json); None takes the one beside the dataset."""
    cache_dir: Optional[str] = None
    """Where sample indices are cached; None means a folder 'cache' beside the dataset."""
    group: str = "A5"
    """word_problem: the group or monoid, S3 to S6, A3 to A6, Z<n>, M (aperiodic), or a direct product like A5xM."""
    non_identity_share: float = 1.0
    """word_problem: probability that a position's group element is drawn (uniformly); else it is the identity."""
    stories: Optional[str] = None
    """stories: folder of the published files; None generates stories in their format."""
    story_tasks: list[str] = field(default_factory=list)
    """stories: the tasks told, names of generated ones or numbers of published ones; empty means all."""
    story_statements: int = 12
    """stories: statements of the longest generated story."""


@dataclass
class OptimizerConfig:
    """AdamW and clipping."""

    learning_rate: Optional[float] = None
    """Peak learning rate; None takes the size table's (five times GPT-3's, the paper's)."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.1
    """AdamW: decoupled decay of matrices; gains, norms, biases, A_log, D and dt_bias are never decayed."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""


@dataclass
class ScheduleConfig:
    """The learning rate over the run: linear warm-up, constant, then down with 1 - sqrt."""

    warmup_fraction: float = 0.01
    """Share of the run's steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """Share of the run's steps, at its end, over which it falls with 1 - sqrt."""
    min_learning_rate: float = 1e-5
    """Learning rate of the last step."""


@dataclass
class TrainConfig:
    """Length, batches, seed and precision of the run."""

    steps: Optional[int] = None
    """Optimizer steps of the run; None derives them from tokens."""
    tokens: Optional[float] = None
    """Tokens of the run; sets steps when those are not given."""
    global_batch_size: int = 8
    """Sequences of one optimizer step, over all replicas."""
    micro_batch_size: int = 4
    """Sequences of one forward-backward pass on one replica."""
    seed: int = 1234
    """Seed of initialisation, data order and splits."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps matrices in bfloat16 with fp32 main copies; iterate, norms and gains stay fp32 in both."""
    deterministic: bool = True
    """On a GPU, add in a fixed order: a resumed run repeats the uninterrupted one bit for bit, as it does on a CPU."""
    validate_every: int = 100
    """Steps between measurements of the validation loss; 0 measures none."""
    validation_batches: int = 8
    """Global batches of one measurement."""
    target_loss: Optional[float] = None
    """Held-out loss (nats a token) at or below which the run is finished, whatever steps are left; None never is."""
    stop_after_steps: Optional[int] = None
    """End this job, with a checkpoint, once the run has reached this step; the run's schedule is unchanged."""


@dataclass
class CheckpointConfig:
    """What is saved, kept and loaded."""

    save_every: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none."""
    ephemeral_every: int = 0
    """Steps between checkpoints that live only until the next one is whole, so that a crash costs less; 0 makes none."""
    asynchronous: bool = True
    """Write in the background while training goes on; false waits until a checkpoint is on disk."""
    load: Optional[str] = None
    """Checkpoint (a run's folder, its checkpoints/ or one step's folder) that a new run branches off."""


Policy = Literal["log", "skip", "retry", "stop"]
"""log: count and report; skip: leave out the step's update; retry: repeat the step from the same state, and skip it if
it stays bad; stop: end the run."""


@dataclass
class HealthConfig:
    """What is done about bad steps, ranks that drift apart and ranks that hang."""

    nonfinite: Literal["skip", "retry", "stop"] = "skip"
    """Loss, gradient or iterate is not finite. Parameters that are not finite always stop the run."""
    gradient_spike: Policy = "log"
    """The gradient norm exceeds its recent mean by gradient_spike_sigmas."""
    gradient_spike_sigmas: float = 8.0
    """Standard deviations of the recent gradient norms that make a spike; 0 never sees one."""
    loss_spike: Policy = "log"
    """The loss exceeds its recent mean by loss_spike_sigmas."""
    loss_spike_sigmas: float = 8.0
    """Standard deviations of the recent losses that make a spike; 0 never sees one."""
    divergence: Policy = "log"
    """The solver's unconverged share or mean residual exceeds its limit."""
    unconverged_limit: Optional[float] = None
    """Largest share of a step's samples that may miss the tolerance; None sets no limit."""
    residual_limit: Optional[float] = None
    """Largest mean relative residual of a step; None sets no limit."""
    window: int = 64
    """Updates that 'recent' looks back on; spikes are judged once a quarter of them were made, anew in each phase."""
    retries: int = 1
    """How often a step is repeated under the policy retry."""
    max_skipped: int = 10
    """Steps skipped in a row after which the run stops."""
    desync_every: int = 200
    """Steps between comparisons of the parameters that several ranks hold; 0 never compares."""
    hang_minutes: Optional[float] = None
    """Minutes without progress after which a rank ends the job, with the stacks of all ranks in the log; 0 waits for
    ever, None means 0.8 * parallel.timeout_minutes."""


@dataclass
class TelemetryConfig:
    """What a run says about itself."""

    console_every: int = 10
    """Steps between console lines."""
    plots: bool = True
    """Write PNG plots of loss, evaluations and residuals into the run's plots/ folder when a job ends."""
    spectral_radius_every: int = 0
    """Steps between estimates of the spectral radius of dF/dz at the fixed point (metric spectral_radius), of implicit
    models without pipeline; each costs a solve and 32 backward passes of F on a microbatch. 0 makes none."""
    rank_file_every_s: float = 10.0
    """Seconds between lines of ranks/rank_*.jsonl, where each rank says what its time went to; 0 writes none."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's tensorboard/ folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Log to Weights & Biases; offline keeps the run in its folder, for wandb sync."""
    wandb_project: str = "megatron_implicit"
    """Project of Weights & Biases that the run appears in."""
    prometheus: bool = False
    """Let one process of each node export the numbers of its ranks to Prometheus."""
    prometheus_port: int = 0
    """Port of the exporter; 0 takes a free one, which the file in targets_dir tells."""
    targets_dir: str = "runs/.targets"
    """Folder, on a file system shared with Prometheus, where jobs register their exporters (file_sd)."""


@dataclass
class DebugConfig:
    """Faults for tests."""

    inject: Optional[str] = None
    """Fault for tests, 'KIND@STEP' or 'KIND@STEP:RANK', KIND one of nonfinite_iterate, nonfinite_solve, nan_gradient,
    gradient_spike, loss_spike, diverging_solve, desync, hang, slow, crash. Off by default."""


@dataclass
class RunConfig:
    """The run's name and folder."""

    name: Optional[str] = None
    """Name in logs and dashboards; None means the folder's name."""
    dir: str = "runs/default"
    """The run's folder. The same folder resumes the run it holds."""
    time_limit_minutes: Optional[float] = None
    """Minutes after its start by which a job must have ended; None takes the one in
    MEGATRON_IMPLICIT_END_TIME or SLURM_JOB_END_TIME, if any."""
    time_margin_s: float = 60.0
    """Seconds before that limit by which a job stops, on top of what a step and a checkpoint were seen to take."""


@dataclass
class Config:
    """Everything that defines a run. ``config.yaml`` in the run's folder is one of these, resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    curriculum: list[PhaseConfig] = field(default_factory=list)
    """Phases in order of their start; empty means one phase with the solver section's values."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def implicit(self) -> bool:
        """Whether the model is iterated to a fixed point."""
        return self.model.family.startswith("implicit_")

    @property
    def architecture(self) -> str:
        """'mamba2' or 'llama'."""
        return self.model.family.split("_", 1)[1]
