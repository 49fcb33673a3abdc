"""The language models that several studies measure: one of each family, trained alike, and held-out text for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor

from megatron_implicit.api import PretrainedModel, load_pretrained
from megatron_implicit.data.shipped import prepare_shipped_corpus
from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.perplexity import open_split, refuse_unknown_data
from megatron_implicit.evaluation.studies.study import StudyContext
from megatron_implicit.evaluation.studies.training import Training, train_all

FAMILIES: tuple[str, ...] = ("implicit_mamba2", "explicit_mamba2", "implicit_llama", "explicit_llama")
IMPLICIT: tuple[str, ...] = ("implicit_mamba2", "implicit_llama")
NAMES = {
    "implicit_mamba2": "implicit Mamba2", "explicit_mamba2": "Mamba2",
    "implicit_llama": "implicit Llama", "explicit_llama": "Llama",
}  # fmt: skip
"""Of the families, as figures and tables show them."""


@dataclass(frozen=True)
class LanguageModels:
    """How the models are trained."""

    preset: str
    """Size of the presets in launch/configs/."""
    shipped: bool
    """Whether they read the repository's own corpus; otherwise what is at the presets' ``data.path``."""
    overrides: dict[str, Any]
    """Dotted configuration keys and values, on top of the preset."""


TINY = LanguageModels(
    "tiny", True,
    {
        "data.sequence_length": 128, "train.global_batch_size": 16, "train.micro_batch_size": 16,
        "train.validation_batches": 2, "train.validate_every": 100,
        "data.split": "[0.9, 0.05, 0.05]", "checkpoint.save_every": 250,
    },
)  # fmt: skip
"""500 steps: two to six minutes each on a CPU core."""
PAPER = LanguageModels("130m", False, {})
"""207B tokens each at the presets' length and batch."""


def trainings(models: LanguageModels, context: StudyContext, families: Sequence[str] = FAMILIES) -> list[Training]:
    """The runs of these families, with their data ready."""
    overrides = dict(models.overrides)
    if models.shipped:
        folder = context.root / "data"
        prepare_shipped_corpus(folder)
        overrides["data.path"] = folder
    return [Training(f"language_{family}", f"{family}_{models.preset}", overrides) for family in families]


def open_models(
    models: LanguageModels, context: StudyContext, families: Sequence[str] = FAMILIES
) -> dict[str, PretrainedModel]:
    """Trained models in eval mode by family, on the fastest device; trains what is not trained yet.

    With ``context.checkpoint`` it is that model alone.

    Raises:
        ConfigError: the checkpoint's family is none of ``families``.
        MachineError: a training failed.
    """
    if context.checkpoint is not None:
        lm = load_pretrained(context.checkpoint)
        if lm.config.model.family not in families:
            raise ConfigError(
                f"{context.checkpoint} is {lm.config.model.family}; {context.name} measures {' or '.join(families)}"
            )
        return {lm.config.model.family: lm}
    trained = train_all(trainings(models, context, families), context)
    return {family: load_pretrained(run.folder) for family, run in zip(families, trained)}


def verdict(met: Mapping[str, bool]) -> str:
    """Whether a claim holds, by the families it was judged for."""
    holding, failing = ([NAMES[family] for family in met if met[family] is holds] for holds in (True, False))
    if not met:
        return "not judged"
    if holding and failing:
        return f"confirmed for {' and '.join(holding)}, refuted for {' and '.join(failing)}"
    return "refuted" if failing else "confirmed"


def held_out_text(lm: PretrainedModel, tokens: int, sequences: int, split: str = "validation") -> Tensor:
    """Packed held-out documents, [sequences, tokens + 1]; fewer sequences where the split has no more.

    The one sample that a split's end fills up with padding is left out: these are texts, every token of which counts.

    Args:
        lm: its configuration says data, split shares and seed.
        tokens: of a sequence, not counting the label of its last one.
        sequences: at most.

    Raises:
        DataError: the data is missing, of another tokenizer, or has no such split; or the model comes from no run.
    """
    refuse_unknown_data(lm, "studies need the checkpoint of a run")
    data = dataclasses.replace(lm.config.data, sequence_length=tokens)
    samples = open_split(lm, data, split)
    whole = (sample for sample in map(samples.__getitem__, range(len(samples))) if sample["loss_mask"].all())
    rows = [torch.cat((sample["tokens"], sample["labels"][-1:])) for sample in islice(whole, sequences)]
    return torch.stack(rows).long()
