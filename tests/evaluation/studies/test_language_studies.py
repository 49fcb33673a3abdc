"""Studies of language models: their parts, and every one of them from training to report."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_implicit.data.shipped import prepare_shipped_corpus
from megatron_implicit.data.tokenizers import load_tokenizer
from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.perplexity import open_split
from megatron_implicit.evaluation.studies import (
    StudyContext,
    adaptive_compute,
    command,
    duality,
    jacobian,
    language_models,
    length_extrapolation,
    phantom_gradient,
)
from megatron_implicit.data.datasets import open_tokenizer
from megatron_implicit.evaluation.studies.language_models import TINY, LanguageModels, held_out_text, open_models
from megatron_implicit.evaluation.studies.word_classes import classify
from tests.inference.models import random_ids, small_model

pytestmark = pytest.mark.usefixtures("one_process")

SHORT = LanguageModels(
    "tiny", True,
    {
        **TINY.overrides, "train.steps": 3, "train.validate_every": 0, "data.sequence_length": 16,
        "train.global_batch_size": 4, "train.micro_batch_size": 4, "model.hidden_size": 32,
        "model.num_layers": 1, "model.head_dim": 16, "model.state_size": 8, "checkpoint.save_every": 0,
        "checkpoint.asynchronous": "false", "inference.damping": 0.4, "inference.max_iterations": 20,
    },
)  # fmt: skip
"""Three steps of one narrow layer of Mamba2."""
FAMILY = "implicit_mamba2"


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama"])
def test_the_modes_agree_within_the_bars(kind: str) -> None:
    settings = duality.Settings(TINY, sequences=2, tokens=24, chunks=(1, 4, 8))
    values = duality.measure(small_model(kind), random_ids(2, 25), settings)
    logit, perplexity = duality.differences(values)
    assert 0 < logit <= duality.LOGIT_BAR and perplexity <= duality.PERPLEXITY_BAR
    assert list(values["modes"]) == ["simultaneous", "sequential", "chunks of 4", "chunks of 8"]
    assert all(mode["unconverged"] == 0 for mode in values["modes"].values())


def test_perplexity_by_position_and_the_cost_of_reading_on() -> None:
    losses = torch.arange(8.0).repeat(3, 1)
    assert length_extrapolation.binned_perplexity(losses, 4) == pytest.approx([np.exp(1.5), np.exp(5.5)])
    assert length_extrapolation.cut(torch.arange(7)[None], 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    whole, restarted = torch.ones(4, 3, 6), torch.ones(4, 3, 6)
    whole[:, 1:, -2:] += 0.5
    cost = length_extrapolation.cost_of_reading_on(whole, restarted, 2)
    assert cost["ratio"] == pytest.approx([1.0, np.exp(0.5), np.exp(0.5)]) and cost["error"] == [0, 0, 0]
    assert cost["overall"] == pytest.approx([np.exp(0.5), 0])


def test_bins_of_evaluations() -> None:
    evaluations = torch.tensor([[1.0, 2, 3, 4, 9], [3.0, 4, 5, 6, 9]])
    assert adaptive_compute.by_position(evaluations, 2)["mean"] == pytest.approx([2.5, 6.0])
    loss = torch.tensor([0.3, 0.1, 0.2, 0.9, 0.7, 0.8])
    found = adaptive_compute.by_quantile(torch.arange(6.0), loss, 2)
    assert found["x"] == pytest.approx([0.2, 0.8]) and found["mean"] == pytest.approx([1.0, 4.0])
    classes = np.array([["number", "other word"]])
    assert adaptive_compute.by_class(np.array([[4.0, 6.0]]), classes)["number"]["mean"] == 4.0


def test_rank_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert adaptive_compute.rank_correlation(x, x.exp()) == pytest.approx(1.0)
    assert adaptive_compute.rank_correlation(x, -x) == pytest.approx(-1.0)
    assert adaptive_compute.rank_correlation(x, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
    assert adaptive_compute.rank_correlation(x, torch.ones(4)) == 0.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies with the shipped corpus, prepared once."""
    folder = tmp_path_factory.mktemp("studies")
    prepare_shipped_corpus(folder / "tiny" / "data")
    return folder


def test_classes_of_words(root: Path) -> None:
    tokenizer = load_tokenizer(root / "tiny" / "data" / "tokenizer.model")
    text = "And the LORD said unto Zerubbabel, 42 of them; don't extrapolate"
    found = {"And": "function word", "the": "function word", "LORD": "capitalised", "Zerubbabel": "capitalised"}
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode([i]).strip() for i in ids]
    classes = classify(tokenizer, ids)
    assert len(classes) == len(ids)
    for piece, name in zip(pieces, classes):
        assert found.get(piece, name) == name
        if piece in {",", ";"}:
            assert name == "punctuation"
        if piece.isdigit():
            assert name == "number"
    assert {"inside a word", "other word", "number", "punctuation"} <= set(classes)


def test_a_checkpoint_of_another_family_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_models, "load_pretrained", lambda path: small_model("explicit_mamba2"))
    context = StudyContext("duality", "tiny", root, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="is explicit_mamba2; duality measures implicit_mamba2 or implicit_llama"):
        open_models(TINY, context, ("implicit_mamba2", "implicit_llama"))


def test_the_studies_run_from_training_to_report(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        length_extrapolation: length_extrapolation.Settings(SHORT, 2, 4, 2, 4),
        duality: duality.Settings(SHORT, sequences=1, tokens=8, chunks=(1, 4)),
        adaptive_compute: adaptive_compute.Settings(SHORT, sequences=2, tokens=16, caps=(1, 2), position_bins=4),
        phantom_gradient: phantom_gradient.Settings(SHORT, 1, 8, steps=(1, 4, 16), dampings=(0.8,)),
        jacobian: jacobian.Settings(SHORT, (6,), 1, 8, (4,), tokens=8, power_iterations=20),
    }
    for module, settings in small.items():
        monkeypatch.setattr(module, "SIZES", {"tiny": settings})
        monkeypatch.setattr(module, "open_models", lambda chosen, context, *_: open_models(chosen, context, [FAMILY]))
    for module in (jacobian, phantom_gradient):  # three steps do not make a contraction
        monkeypatch.setattr(module, "open_models", lambda *_: {FAMILY: small_model.__wrapped__(FAMILY)})
        monkeypatch.setattr(module, "held_out_text", lambda lm, tokens, sequences: random_ids(sequences, tokens + 1))
    names = {name: path for name, path in command.STUDIES.items() if path in {module.__name__ for module in small}}
    monkeypatch.setattr(command, "STUDIES", names)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run_paper(parser.parse_args(["--output", str(root), "--workers", "1"])) == 0
    for name in names:
        result = json.loads((root / "tiny" / name / "result.json").read_text())
        assert result["finding"] and result["tables"] and result["figures"]
        assert all((root / "tiny" / name / figure["file"]).stat().st_size > 5000 for figure in result["figures"])
    assert (root / "tiny" / "report.html").stat().st_size > 100_000


def _model_of_the_corpus(root: Path) -> argparse.Namespace:
    lm = small_model("implicit_mamba2")
    data = replace(lm.config.data, path=str(root / "tiny" / "data"), split=[0.9, 0.05, 0.05])
    config = replace(lm.config, model=replace(lm.config.model, vocab_size=4096), data=data)
    return argparse.Namespace(config=config, tokenizer_fingerprint=open_tokenizer(data).fingerprint)


def test_held_out_text_carries_the_label_of_its_last_token(root: Path) -> None:
    lm = _model_of_the_corpus(root)
    short, longer = held_out_text(lm, 8, 4), held_out_text(lm, 16, 2)
    assert short.shape == (4, 9) and longer.shape == (2, 17)


def test_held_out_text_leaves_out_what_is_filled_up_with_padding(root: Path) -> None:
    lm = _model_of_the_corpus(root)
    samples = open_split(lm, replace(lm.config.data, sequence_length=512), "validation")
    padded = [index for index in range(len(samples)) if not samples[index]["loss_mask"].all()]
    assert len(padded) == 1 and padded[0] < len(samples) - 1
    rows = held_out_text(lm, 512, len(samples))
    assert len(rows) == len(samples) - 1
    for row, index in zip(rows, (index for index in range(len(samples)) if index not in padded)):
        assert torch.equal(row[:-1], samples[index]["tokens"])
