"""Numbers of parameters of one rank by formula; ``models.parameters`` counts those of a model that was built."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_implicit.comm.partition import partition
from megatron_implicit.config import Config


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    matrices: int = 0
    """In the run's precision: projections, convolutions, embedding."""
    vectors: int = 0
    """In float32 whatever the precision: gains, norms, biases, one number a head."""

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.matrices + other.matrices, self.vectors + other.vectors)

    def __mul__(self, times: int) -> "Parameters":
        return Parameters(self.matrices * times, self.vectors * times)

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.vectors

    def stored_bytes(self, element: int) -> int:
        """Bytes of the parameters, with matrices of ``element`` bytes."""
        return self.matrices * element + self.vectors * 4


@dataclass(frozen=True)
class Widths:
    """Local widths of a layer on rank 0 of a tensor group, the rank with the most."""

    model: int
    """h."""
    injected: int
    """Rows of in_proj or linear_qkv: of the injection u."""
    mixed: int
    """Columns of the mixer's output projection."""
    convolved: int = 0
    """Mamba2: channels of the convolution."""
    heads: int = 0
    """Heads of the mixer."""
    keys: int = 0
    """Llama: rows of the keys, and of the values."""
    ffn: int = 0
    """Llama: computed width of the MLP."""
    stored_ffn: int = 0
    """Llama: width of the MLP that parameters have."""


def widths(config: Config, tensor: int) -> Widths:
    """Local widths of a layer under ``tensor`` ranks."""
    model = config.model
    h = model.hidden_size
    if config.architecture == "mamba2":
        inner = model.expand * h
        heads = inner // model.head_dim
        groups = model.num_groups // tensor if model.num_groups >= tensor else model.num_groups
        bc = 2 * groups * model.state_size
        return Widths(
            h, (2 * inner + heads) // tensor + bc, inner // tensor, inner // tensor + bc, heads=heads // tensor
        )
    keys = h // model.num_heads * model.num_query_groups // tensor
    ffn = partition(model.ffn_size, tensor, 0, align=True)
    return Widths(
        h, h // tensor + 2 * keys, h // tensor, heads=model.num_heads // tensor, keys=keys,
        ffn=ffn.computed, stored_ffn=ffn.size,
    )  # fmt: skip


def layer_parameters(config: Config, tensor: int) -> Parameters:
    """One layer: matrices, and with weight norm a gain for each of their rows."""
    at = widths(config, tensor)
    linears = [(at.injected, at.model), (at.model, at.mixed)]
    if config.architecture == "mamba2":
        linears.append((at.convolved, config.model.conv_width))
        vectors = at.convolved + 3 * at.heads + at.mixed + at.model  # conv bias; A, D, dt; gated norm; norm
    else:
        linears += [(2 * at.stored_ffn, at.model), (at.model, at.stored_ffn)]
        vectors = 2 * at.model  # two norms
    gains = sum(rows for rows, _ in linears) if config.implicit else 0
    return Parameters(sum(rows * columns for rows, columns in linears), vectors + gains)


def injection_parameters(config: Config, tensor: int) -> Parameters:
    """W_inj, its gains and biases; nothing in explicit models. Every stage has them."""
    at = widths(config, tensor)
    return Parameters(at.injected * at.model, 2 * at.injected) if config.implicit else Parameters()


def vocabulary_rows(config: Config, tensor: int) -> int:
    """Rows of the embedding that rank 0 stores."""
    return partition(config.model.vocab_size, tensor, 0, align=True).size


def stage_parameters(config: Config, tensor: int, layers: int, *, first: bool, last: bool) -> Parameters:
    """One rank of a stage with ``layers`` layers: injection on every stage, its norm on the first, the embedding on the
    first and, as the tied head, on the last, the final norm there too."""
    h = config.model.hidden_size
    ends = Parameters(vectors=h * (first and config.implicit) + h * last)
    if first or last:
        ends += Parameters(vocabulary_rows(config, tensor) * h)
    return layer_parameters(config, tensor) * layers + injection_parameters(config, tensor) + ends
