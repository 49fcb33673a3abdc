"""There and back through every format: the same bits, the same config.json, the reference's numbers in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_implicit import load_pretrained
from megatron_implicit.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_model_weights,
    read_checkpoint_config,
    save_checkpoint,
)
from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.conversion.reference_config import reference_config
from megatron_implicit.models import build_model
from megatron_implicit.training.optimizer import prepare_training
from tests import goldens, traces
from tests.conversion import folders
from tests.models.test_golden import TRAINING_CASES, check_inference_case, check_training_case

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_a_reference_folder_comes_back_bit_by_bit_and_with_its_config(tmp_path: Path, family: str) -> None:
    reference = folders.write_reference(tmp_path / "reference", family, pickled="llama" in family)
    middle = folders.converted(reference, "reference", "megatron", tmp_path / "middle")
    back = folders.converted(middle, "megatron", "reference", tmp_path / "back")
    assert folders.same_tensors(back, goldens.state_dict(family))
    assert folders.config_json(back) == folders.config_json(reference)


def test_a_config_that_training_forgot_is_made_anew() -> None:
    for family in goldens.FAMILIES:
        expected = json.loads(str(goldens.arrays(family)["config_json"]))
        assert reference_config(goldens.golden_config(family)) == expected


def resave(source: str, target: str, layout: traces.Layout) -> None:
    """Loads a checkpoint for training on a layout and saves it from there, as a run that has done no step."""
    config = layout.apply(read_checkpoint_config(Path(source)))
    start_model_parallel(config.parallel, config.train.seed)
    model = build_model(config, initialise=False)
    load_model_weights(model, Path(source))
    parts = prepare_training(config, model)
    state = TrainingState(parent=source)
    save_checkpoint(CheckpointFolder(Path(target)), config, state, parts.model.module, parts.optimizer, parts.scheduler)


LAYOUTS = [
    pytest.param(traces.Layout(tensor=2), id="TP2", marks=pytest.mark.acceptance),
    pytest.param(traces.Layout(tensor=2, pipeline=2), id="TP2xPP2"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_a_training_layout_in_between_changes_nothing(pool, tmp_path: Path, family: str, layout: traces.Layout) -> None:
    reference = folders.write_reference(tmp_path / "reference", family)
    middle = folders.converted(reference, "reference", "megatron", tmp_path / "middle")
    processes = layout.tensor * layout.pipeline
    pool(processes).run(resave, str(middle), str(tmp_path / "checkpoints"), layout, timeout=300)
    back = folders.converted(tmp_path / "checkpoints", "megatron", "reference", tmp_path / "back")
    assert folders.same_tensors(back, goldens.state_dict(family))
    assert folders.config_json(back) == folders.config_json(reference)


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_the_reference_numbers_survive_every_format(tmp_path: Path, family: str) -> None:
    reference = folders.write_reference(tmp_path / "reference", family)
    hf = folders.converted(reference, "reference", "hf", tmp_path / "hf")
    last = folders.converted(hf, "hf", "megatron", tmp_path / "last")
    lm = load_pretrained(last)
    for case in ("eval", "seq"):
        check_inference_case(goldens.run_inference_case(family, case, lm=lm), family, case)
    cases = [case for each, case in TRAINING_CASES if each == family]
    for case in sorted(cases, key="nonconv".__eq__):  # last: it changes the parameters
        check_training_case(goldens.run_training_case(family, case, lm=lm), family, case)


@pytest.mark.parametrize("cell", [{}, {"ngroups": 2}], ids=["one group", "two groups"])
def test_a_mamba_ssm_folder_comes_back_and_means_the_same_in_transformers(tmp_path: Path, cell: dict) -> None:
    from transformers import Mamba2ForCausalLM

    source = folders.write_mamba_ssm(tmp_path / "source", **cell)
    middle = folders.converted(source, "mamba_ssm", "megatron", tmp_path / "middle")
    back = folders.converted(middle, "megatron", "mamba_ssm", tmp_path / "back")
    expected, found = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (source, back))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert folders.config_json(back) == folders.config_json(source)
    hf = folders.converted(source, "mamba_ssm", "hf", tmp_path / "hf")
    ids = torch.randint(0, folders.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = Mamba2ForCausalLM.from_pretrained(hf).eval()(ids).logits
    assert float((load_pretrained(source)(ids).logits - theirs).abs().max()) <= 1e-4


def test_other_dtypes_are_kept_or_made_on_request(tmp_path: Path) -> None:
    reference = folders.write_reference(tmp_path / "reference", "implicit_mamba2")
    report = folders.report(reference, "reference", "megatron", tmp_path / "half", dtype="bfloat16")
    assert 0 < max(tensor.error for tensor in report.mapped) < 0.02
    back = folders.converted(tmp_path / "half", "megatron", "reference", tmp_path / "back")
    expected = {key: value.bfloat16() for key, value in goldens.state_dict("implicit_mamba2").items()}
    assert folders.same_tensors(back, expected)
    assert folders.config_json(back)["torch_dtype"] == "bfloat16"
    ids = torch.from_numpy(goldens.arrays("implicit_mamba2")["input_ids"])
    for dtype in ("float32", "bfloat16"):
        logits = load_pretrained(tmp_path / "half", dtype=dtype)(ids, residual_norm="batch").logits
        assert float((logits - goldens.tensor("implicit_mamba2", "eval/logits")).abs().max()) <= 0.1


def test_the_report_names_every_tensor_by_layer(tmp_path: Path) -> None:
    reference = folders.write_reference(tmp_path / "reference", "implicit_llama")
    report = folders.report(reference, "reference", "hf", tmp_path / "hf")
    assert {tensor.name for tensor in report.mapped} == set(goldens.state_dict("implicit_llama"))
    assert report.unmapped == {"criterion.decoder.weight": "repeats the embedding"}
    assert [part for part in report.layers() if part.startswith("layer")] == ["layer 0", "layer 1", "layer 2"]
    assert report.parameters == sum(value.numel() for value in goldens.state_dict("implicit_llama").values())
    assert all(tensor.error == 0 for tensor in report.mapped)
