"""Typed configuration: what a run is.

Dataclasses with every field documented under it (``schema``), the paper's model sizes (``sizes``), resolution of
defaults that depend on other fields (``resolve``), cross-field validation with remedies (``validate``), YAML files as
they stand (``files``), and the file + dotted command line that produce one (``load``). Imports nothing of the package
but ``errors``; no torch.

    from megatron_implicit.config import load_config
    config = load_config(["--config", "launch/configs/implicit_mamba2_tiny.yaml", "--parallel.tensor", "2"])
"""

from megatron_implicit.config.files import read_config_file
from megatron_implicit.config.load import config_from_dict, config_to_dict, config_to_yaml, load_config, save_config
from megatron_implicit.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DebugConfig,
    HealthConfig,
    InferenceConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    SolverConfig,
    TelemetryConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "DebugConfig", "HealthConfig", "InferenceConfig", "ModelConfig",
    "OptimizerConfig", "ParallelConfig", "PhaseConfig", "RunConfig", "ScheduleConfig", "SolverConfig", "TelemetryConfig", "TrainConfig",
    "config_from_dict", "config_to_dict", "config_to_yaml", "load_config", "read_config_file",
    "save_config",
]  # fmt: skip
