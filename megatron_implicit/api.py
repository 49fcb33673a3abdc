"""``load_pretrained``: a trained model in a plain Python process (or in a tensor-parallel job), ready to be called."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from pathlib import Path
from typing import Any, Iterator, Literal, Optional, Sequence, get_args

import torch
from torch import Tensor, nn

from megatron_implicit.comm.groups import Place, place_from_environment, start_model_parallel, start_process_group
from megatron_implicit.config import Config
from megatron_implicit.device import current_platform, prepare_megatron
from megatron_implicit.errors import CheckpointError, ConfigError

prepare_megatron()

from megatron_implicit.inference import InferenceSession, Mode, ModelOutput, Padding, SolveMode, evaluate  # noqa: E402
from megatron_implicit.inference.generation import Generation, TokenStream  # noqa: E402
from megatron_implicit.inference.sampling import GREEDY, Sampling  # noqa: E402
from megatron_implicit.solver import ResidualNorm, SolveSettings  # noqa: E402
from megatron_implicit.solver.settings import override  # noqa: E402

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class PretrainedModel(nn.Module):
    """A model with the configuration it was trained with.

    Args:
        model: as ``build_model`` returns it.
        config: resolved; its solver and inference sections are the defaults of every call.
        tokenizer_fingerprint: of the tokenizer its training data was made with; None where that is not known, because
            it comes from another program or a conversion: then the data section says nothing about the model.
    """

    def __init__(self, model: nn.Module, config: Config, tokenizer_fingerprint: Optional[str] = None) -> None:
        super().__init__()
        self.model, self.config, self.tokenizer_fingerprint = model, config, tokenizer_fingerprint

    def forward(
        self,
        input_ids: Tensor,
        mode: Mode = "simultaneous",
        chunk_size: Optional[int] = None,
        window_size: Optional[int] = None,
        residual_norm: ResidualNorm = "sample",
        lengths: Optional[Sequence[int] | Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        **solver_overrides: Any,
    ) -> ModelOutput:
        """Logits, hidden states and solver statistics.

        After ``train()`` this is the training forward (solve, then passes with gradient); after ``eval()`` the
        inference solve, without gradient.

        Args:
            input_ids: [b, s] integers below the vocabulary's size.
            mode: simultaneous (all tokens at once), sequential (token by token, with committed states), chunked, or
                window (a sliding window of tokens iterates, and what has settled is committed behind it).
            chunk_size: tokens of a chunk in chunked mode.
            window_size: tokens of the window in window mode.
            residual_norm: "sample", over all tokens of a sample that are solved together; "batch" for the reference's
                one norm over the whole batch; or "token": every token must reach the tolerance by itself, which makes
                it mean the same in all modes.
            lengths: [b] tokens of each sample, where the rest of its row is padding at the end.
            attention_mask: [b, s] the same as a mask, 1 for tokens; the padding may come first instead.
            solver_overrides: values of the config's ``solver`` section in training, of ``inference`` in eval.

        Returns:
            Logits and hidden states are 0 at padding, whose ids are ignored.

        Raises:
            ConfigError: an unknown mode or override, or input that does not fit the model; in one line.
        """
        padding = self._padding(input_ids, lengths, attention_mask)
        input_ids = input_ids.to(next(self.parameters()).device)
        if padding is not None:
            input_ids = padding.to_the_end(input_ids)
        self.check_ids(input_ids)
        solve_mode = self._mode(mode, chunk_size, window_size, residual_norm)
        with self._solving(residual_norm, solver_overrides):
            out = evaluate(self.model, input_ids, solve_mode, padding.lengths if padding is not None else None)
        if padding is None:
            return out
        trace = out.trace if mode == "simultaneous" else out.trace.map(padding.back)
        return ModelOutput(padding.back(out.logits), padding.back(out.hidden), trace)

    def session(self, batch: int, capacity: Optional[int] = None, **solver_overrides: Any) -> InferenceSession:
        """Sequences that grow, with kept states: ``session.advance(ids)`` solves the next tokens of every sample.

        Args:
            batch: samples.
            capacity: most tokens of a sample (Llama's caches; Mamba2's states do not grow).
            solver_overrides: values of the config's ``inference`` section.

        Raises:
            ConfigError: an unknown override.
        """
        self._refuse_training("a session")
        with self._solving("sample", solver_overrides):
            return InferenceSession(self.model, batch, capacity)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        capacity: Optional[int] = None,
        **solver_overrides: Any,
    ) -> list[Generation]:
        """Continues each prompt; no sample's tokens depend on its companions. ``inference.generation`` streams them.

        Args:
            prompts: token ids, at least one a prompt, of any lengths.
            max_tokens: most tokens to generate for each.
            sampling: how tokens are chosen; greedy by default.
            stop_ids: tokens that end a sample, like the end of text.
            capacity: most tokens of a sample, prompt included; None makes room for ``max_tokens``.
            solver_overrides: values of the config's ``inference`` section.

        Raises:
            ConfigError: prompts that cannot be answered, or an unknown override.
            CapacityError: a prompt longer than the cache.
        """
        longest = max((len(prompt) for prompt in prompts), default=0)
        session = self.session(len(prompts), capacity or longest + max_tokens, **solver_overrides)
        return TokenStream(session, prompts, max_tokens, sampling, stop_ids=stop_ids).finish()

    @property
    def keeps_cache(self) -> bool:
        """Whether the memory of a session grows with its capacity (attention), or is constant (Mamba2)."""
        return self.config.architecture == "llama"

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises ConfigError where ids [b, s] are not tokens of the model's vocabulary."""
        vocabulary = self.config.model.vocab_size
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ConfigError(
                f"input_ids hold {wrong}, outside the vocabulary of {vocabulary}: use the model's tokenizer"
            )

    def _padding(
        self, input_ids: Tensor, lengths: Optional[Sequence[int] | Tensor], attention_mask: Optional[Tensor]
    ) -> Optional[Padding]:
        if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise ConfigError(
                f"input_ids must be integers of shape [b, s], not {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        if lengths is None and attention_mask is None:
            return None
        self._refuse_training("padding")
        if lengths is not None and attention_mask is not None:
            raise ConfigError("lengths and attention_mask say the same: give one of them")
        given = (len(lengths),) if lengths is not None else tuple(attention_mask.shape)
        if given != tuple(input_ids.shape[: len(given)]):
            name = "lengths" if lengths is not None else "attention_mask"
            raise ConfigError(f"{name} has shape {given}, which does not fit input_ids {tuple(input_ids.shape)}")
        if lengths is not None:
            return Padding.of_lengths(lengths, input_ids.shape[1])
        return Padding.of_mask(attention_mask.to(next(self.parameters()).device))

    def _mode(self, mode: Mode, chunk_size: Optional[int], window_size: Optional[int], norm: str) -> SolveMode:
        solve_mode = SolveMode.named(mode, chunk_size, window_size)
        if mode != "simultaneous":
            self._refuse_training(f"mode={mode!r}")
        if mode == "window" and norm == "batch":
            raise ConfigError("residual_norm='batch' has no meaning in window mode, which decides by token: drop it")
        return solve_mode

    def _refuse_training(self, what: str) -> None:
        if self.training:
            raise ConfigError(f"{what} belongs to an inference solve: call eval() first")
        if self.config.parallel.sequence:
            raise ConfigError(f"{what} passes states on and cannot shard the sequence: set parallel.sequence=false")

    @contextlib.contextmanager
    def _solving(self, norm: ResidualNorm, overrides: dict[str, Any]) -> Iterator[None]:
        """The decoder with the settings of one call; what else uses it finds those it had."""
        settings, decoder = self._settings(norm, overrides), self.model.decoder
        if settings is None:
            yield
            return
        name = "solver" if self.training else "inference"
        before = getattr(decoder, name)
        setattr(decoder, name, settings)
        try:
            yield
        finally:
            setattr(decoder, name, before)

    def _settings(self, norm: ResidualNorm, overrides: dict[str, Any]) -> Optional[SolveSettings]:
        """Of a call; None of an explicit model."""
        if not self.config.implicit:
            if overrides:
                raise ConfigError(f"{self.config.model.family} has no solver to override: drop {', '.join(overrides)}")
            return None
        if norm not in get_args(ResidualNorm):
            raise ConfigError(f"residual_norm={norm!r} is unknown: use one of {', '.join(get_args(ResidualNorm))}")
        if norm == "token" and self.config.parallel.sequence:
            raise ConfigError("residual_norm='token' needs whole sequences on each rank: set parallel.sequence=false")
        if self.training:
            return SolveSettings.training(override(self.config.solver, overrides), norm=norm)
        return SolveSettings.inference(override(self.config.inference, overrides), norm=norm)


def load_pretrained(
    path: str | pathlib.Path, dtype: Literal["float32", "bfloat16"] = "float32", device: str | None = None
) -> PretrainedModel:
    """Loads a model for inference, analysis or further training.

    Args:
        path: a checkpoint of ours (a run's folder, its checkpoints/ folder, or one step's folder), or a folder with
            config.json and weights: of the paper's public implementation, a Llama or Mamba2 of transformers, an
            exported implicit model, or a state-spaces/mamba2 folder.
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
    if target.index is not None:  # joining the group makes the process's own device the current one
        place = dataclasses.replace(place, local_rank=target.index)
    start_process_group(place)
    from megatron_implicit.conversion.formats import recognise

    load = _load_checkpoint if recognise(path) in (None, "megatron") else _load_foreign
    with torch.random.fork_rng(devices=[]):  # building groups seeds the generators; the caller's stay as they are
        model, config, tokenizer = load(path, _DTYPES[dtype], torch.distributed.get_world_size())
    return PretrainedModel(model.to(target), config, tokenizer).eval()


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


_Loaded = tuple[nn.Module, Config, Optional[str]]
"""A model, its configuration, and the fingerprint of its data's tokenizer."""


def _load_foreign(path: Path, precision: str, world_size: int) -> _Loaded:
    """A folder of another program, one tensor in memory at a time."""
    from megatron_implicit.conversion.formats import open_model, recognise
    from megatron_implicit.conversion.reference import load_reference_weights
    from megatron_implicit.conversion.stored import LazyTensors
    from megatron_implicit.models import build_model

    stored = open_model(path, recognise(path))
    config = _for_this_job(stored.config, precision, world_size)
    start_model_parallel(config.parallel)
    model = build_model(config, initialise=False)
    load_reference_weights(model, LazyTensors(stored.tensors), str(path))
    return model, config, None


def _load_checkpoint(path: Path, precision: str, world_size: int) -> _Loaded:
    from megatron_implicit.checkpoint import load_model_weights, locate_checkpoint, read_checkpoint_config
    from megatron_implicit.checkpoint.fingerprint import tokenizer_fingerprint
    from megatron_implicit.checkpoint.layout import read_state
    from megatron_implicit.models import build_model

    step_folder = locate_checkpoint(path)
    config = _for_this_job(read_checkpoint_config(step_folder), precision, world_size)
    start_model_parallel(config.parallel)
    model = build_model(config, initialise=False)
    load_model_weights(model, step_folder)
    return model, config, tokenizer_fingerprint(config, read_state(step_folder))
