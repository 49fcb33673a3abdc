"""``load_pretrained``: a trained model in a plain Python process (or in a tensor-parallel job), ready to be called."""

from __future__ import annotations

import dataclasses
import pathlib
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from megatron_implicit.comm.groups import Place, place_from_environment, start_model_parallel, start_process_group
from megatron_implicit.config import Config
from megatron_implicit.device import current_platform, prepare_megatron
from megatron_implicit.errors import CheckpointError, ConfigError

prepare_megatron()

from megatron_implicit.inference.forward import ModelOutput, evaluate_in_chunks, evaluate_sequence  # noqa: E402
from megatron_implicit.solver import SolveSettings  # noqa: E402
from megatron_implicit.solver.settings import override  # noqa: E402

Mode = Literal["simultaneous", "sequential", "chunked", "window"]
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class PretrainedModel(nn.Module):
    """A model with the configuration it was trained with.

    Args:
        model: as ``build_model`` returns it.
        config: resolved; its solver and inference sections are the defaults of every call.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self,
        input_ids: Tensor,
        mode: Mode = "simultaneous",
        chunk_size: Optional[int] = None,
        window_size: Optional[int] = None,
        residual_norm: Literal["sample", "batch"] = "sample",
        **solver_overrides: Any,
    ) -> ModelOutput:
        """Logits, hidden states and solver statistics.

        After ``train()`` this is the training forward (solve, then passes with gradient); after ``eval()`` the
        inference solve, without gradient.

        Args:
            input_ids: [b, s] integers below the vocabulary's size.
            mode: simultaneous (all tokens at once), sequential (token by token, with committed states) or chunked.
            chunk_size: tokens of a chunk in chunked mode.
            window_size: tokens of the window in window mode.
            residual_norm: "sample", or "batch" for the reference's one norm over the whole batch.
            solver_overrides: values of the config's ``solver`` section in training, of ``inference`` in eval.

        Raises:
            ConfigError: an unknown mode or override, or input that does not fit the model; in one line.
        """
        self._check_input(input_ids)
        input_ids = input_ids.to(next(self.parameters()).device)
        chunk = self._chunk(mode, chunk_size, input_ids.shape[1])
        self._set_solver(residual_norm, solver_overrides)
        if chunk is None:
            return evaluate_sequence(self.model, input_ids)
        return evaluate_in_chunks(self.model, input_ids, chunk)

    def _check_input(self, input_ids: Tensor) -> None:
        vocabulary = self.config.model.vocab_size
        if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise ConfigError(
                f"input_ids must be integers of shape [b, s], not {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ConfigError(
                f"input_ids hold {wrong}, outside the vocabulary of {vocabulary}: use the model's tokenizer"
            )

    def _chunk(self, mode: Mode, chunk_size: Optional[int], tokens: int) -> Optional[int]:
        """Tokens of a chunk; None for a simultaneous solve."""
        if mode == "simultaneous":
            return None
        if mode not in ("sequential", "chunked"):
            raise ConfigError(f"mode={mode!r} is not supported: use simultaneous, sequential or chunked")
        if self.training:
            raise ConfigError(f"mode={mode!r} is an inference solve: call eval() first")
        if self.config.parallel.sequence:
            raise ConfigError(
                f"mode={mode!r} passes states on and cannot shard the sequence: set parallel.sequence=false"
            )
        if mode == "sequential":
            return 1
        if not chunk_size or chunk_size < 1:
            raise ConfigError(f"chunk_size={chunk_size} must be a positive number of tokens in chunked mode")
        return min(chunk_size, tokens)

    def _set_solver(self, norm: Literal["sample", "batch"], overrides: dict[str, Any]) -> None:
        if not self.config.implicit:
            if overrides:
                raise ConfigError(f"{self.config.model.family} has no solver to override: drop {', '.join(overrides)}")
            return
        decoder = self.model.decoder
        if self.training:
            decoder.solver = SolveSettings.training(override(self.config.solver, overrides), norm=norm)
        else:
            decoder.inference = SolveSettings.inference(override(self.config.inference, overrides), norm=norm)


def load_pretrained(
    path: str | pathlib.Path, dtype: Literal["float32", "bfloat16"] = "float32", device: str | None = None
) -> PretrainedModel:
    """Loads a model for inference, analysis or further training.

    Args:
        path: a reference Hugging Face folder (config.json with model.safetensors or pytorch_model.bin), or a
            checkpoint of ours: a run's folder, its checkpoints/ folder, or one step's folder.
        dtype: of the matrices; norms, gains and the iterate stay float32.
        device: "cpu", "cuda" or "cuda:N"; None takes the GPU if there is one.

    Returns:
        the model in eval mode. In a plain process it runs alone; in a job of N processes (torchrun) it is divided
        over all of them.

    Raises:
        CheckpointError: nothing that can be loaded is there, or it is damaged.
        ConfigError: the layout or dtype does not fit the model.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not supported: use float32 or bfloat16")
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give a checkpoint, a run or a reference model folder")
    place = place_from_environment()
    target = _target_device(device, place)
    start_process_group(place)
    from megatron_implicit.conversion.reference import is_reference_folder

    load = _load_reference if is_reference_folder(path) else _load_checkpoint
    with torch.random.fork_rng(devices=[]):  # building groups seeds the generators; the caller's stay as they are
        model, config = load(path, _DTYPES[dtype], torch.distributed.get_world_size())
    return PretrainedModel(model.to(target), config).eval()


def _target_device(device: str | None, place: Place) -> torch.device:
    """Where the model goes; Megatron-Core computes on the current device, so that becomes it.

    Raises:
        ConfigError: a device this machine does not have, or the CPU of a machine whose GPU is visible.
    """
    platform = current_platform()
    target = torch.device(device) if device else platform.device(place.local_rank)
    if target.type != platform.device_type:
        remedy = "set CUDA_VISIBLE_DEVICES='' to hide the GPU" if target.type == "cpu" else "use device='cpu'"
        raise ConfigError(f"device={device!r} is not available on {platform.name}: {remedy}")
    if target.index is not None:
        platform.use(target.index)
    return target


def _for_this_job(config: Config, precision: str, world_size: int) -> Config:
    """The configuration on the layout of this job: all its processes share the tensors."""
    config = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel), train=dataclasses.replace(config.train)
    )
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence = world_size, 1, False
    config.parallel.layers_per_stage = [config.model.num_layers]
    config.train.precision = precision
    from megatron_implicit.config.validate import validate

    validate(config)
    return config


def _load_reference(path: Path, precision: str, world_size: int) -> tuple[nn.Module, Config]:
    from megatron_implicit.conversion.reference import (
        load_reference_weights,
        read_reference_config,
        read_reference_tensors,
    )
    from megatron_implicit.models import build_model

    config = _for_this_job(read_reference_config(path), precision, world_size)
    start_model_parallel(config.parallel)
    model = build_model(config, initialise=False)
    load_reference_weights(model, read_reference_tensors(path), str(path))
    return model, config


def _load_checkpoint(path: Path, precision: str, world_size: int) -> tuple[nn.Module, Config]:
    from megatron_implicit.checkpoint import load_model_weights, locate_checkpoint, read_checkpoint_config
    from megatron_implicit.models import build_model

    step_folder = locate_checkpoint(path)
    config = _for_this_job(read_checkpoint_config(step_folder), precision, world_size)
    start_model_parallel(config.parallel)
    model = build_model(config, initialise=False)
    load_model_weights(model, step_folder)
    return model, config
