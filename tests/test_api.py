"""``load_pretrained`` in a plain Python process: reference folders, modes, and input that does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_implicit import load_pretrained
from megatron_implicit.errors import CheckpointError, ConfigError
from megatron_implicit.training.validation import measure_loss
from tests import goldens


def write_reference(folder: Path, family: str, *, pickled: bool = False) -> Path:
    """A golden model as a reference folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(str(goldens.arrays(family)["config_json"]), encoding="utf-8")
    tensors = goldens.state_dict(family)
    tensors["criterion.decoder.weight"] = tensors["word_emb.emb.weight"].clone()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


IDS = torch.from_numpy(goldens.arrays("implicit_mamba2")["input_ids"])


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_a_reference_folder_gives_the_reference_logits(tmp_path: Path, family: str, one_process: None) -> None:
    lm = load_pretrained(write_reference(tmp_path, family, pickled="llama" in family))
    ids = torch.from_numpy(goldens.arrays(family)["input_ids"])
    for mode, case in (("simultaneous", "eval"), ("sequential", "seq")):
        out = lm(ids, mode=mode, residual_norm="batch")
        assert float((out.logits - goldens.tensor(family, f"{case}/logits")).abs().max()) <= 1e-5
        assert out.logits.shape == (2, 24, 128)
        assert out.hidden.shape == (2, 24, 64)
    trained = lm.train()(ids)
    assert float((trained.logits - goldens.tensor(family, "train/logits")).abs().max().detach()) <= 1e-5
    assert float((trained.hidden - goldens.tensor(family, "train/last_hidden")).abs().max().detach()) <= 1e-5


def test_it_works_in_a_plain_process_without_a_launcher(tmp_path: Path) -> None:
    folder = write_reference(tmp_path, "implicit_mamba2")
    program = (
        "import sys, torch; from megatron_implicit import load_pretrained; lm = load_pretrained(sys.argv[1]);"
        "print(tuple(lm(torch.zeros(1, 3, dtype=torch.long)).logits.shape))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 3, 128)"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory, one_process: None):
    """The implicit Mamba2 golden."""
    return load_pretrained(write_reference(tmp_path_factory.mktemp("reference"), "implicit_mamba2"))


def test_loading_leaves_the_callers_random_generator_alone(tmp_path: Path, one_process: None) -> None:
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    load_pretrained(write_reference(tmp_path, "explicit_llama"))
    assert torch.equal(torch.rand(3), expected)


def test_solver_overrides_carry_the_configurations_names(lm) -> None:
    out = lm.train()(IDS, max_iterations=4, phantom_steps=1)
    assert float((out.logits - goldens.tensor("implicit_mamba2", "bounded/logits")).abs().max().detach()) <= 1e-5
    assert out.trace.evaluations.tolist() == [4, 4]
    assert lm.eval()(IDS, max_iterations=3, tolerance=0.0).trace.evaluations.tolist() == [2, 2]
    assert lm(IDS).trace.evaluations.tolist() != [2, 2], "an override must not outlive its call"


def test_overrides_do_not_reach_a_later_measurement(lm) -> None:
    """Validation and the perplexity of an evaluation call the model's decoder, not ``lm``."""
    batch = {"tokens": IDS, "labels": IDS, "loss_mask": torch.ones(IDS.shape)}
    expected = measure_loss(lm.model, [batch], torch.device("cpu"))
    lm(IDS, max_iterations=2, residual_norm="token")
    lm.session(2, max_iterations=3)
    assert measure_loss(lm.model, [batch], torch.device("cpu")) == expected


def test_tight_solves_agree_over_modes_and_with_the_float64_fixed_point(lm) -> None:
    tight = {"tolerance": 1e-6, "max_iterations": 400}
    expected = goldens.tensor("implicit_mamba2", "fp/logits").float()
    whole = lm.eval()(IDS, **tight)
    assert not whole.logits.requires_grad
    assert float((whole.logits - expected).abs().max()) <= 1e-4
    for chunk in (1, 5, 24):
        part = lm(IDS, mode="chunked", chunk_size=chunk, **tight)
        assert float((part.logits - expected).abs().max()) <= 1e-4
        assert part.trace.evaluations.shape == (2, 24)
    assert torch.equal(lm(IDS, mode="chunked", chunk_size=1).logits, lm(IDS, mode="sequential").logits)


@pytest.mark.parametrize("mode", ["simultaneous", "sequential"])
def test_no_sample_depends_on_its_companions(lm, mode: str) -> None:
    together = lm.eval()(IDS, mode=mode)
    for index in range(len(IDS)):
        alone = lm(IDS[index : index + 1], mode=mode)
        assert float((together.logits[index] - alone.logits[0]).abs().max()) <= 1e-5
        assert torch.equal(together.trace.evaluations[index], alone.trace.evaluations[0])


def test_bfloat16_matrices_keep_a_float32_iterate(tmp_path: Path, one_process: None) -> None:
    lm = load_pretrained(write_reference(tmp_path, "implicit_llama"), dtype="bfloat16")
    out = lm(torch.from_numpy(goldens.arrays("implicit_llama")["input_ids"]), residual_norm="batch")
    assert out.hidden.dtype == torch.float32
    assert next(p for n, p in lm.named_parameters() if n.endswith("weight_v")).dtype == torch.bfloat16
    assert float((out.logits - goldens.tensor("implicit_llama", "eval/logits")).abs().max()) <= 0.1


REFUSED_CALLS = [
    (dict(mode="widow", window_size=4), "mode='widow' is unknown: use simultaneous, sequential, chunked or window"),
    (dict(mode="window"), "window_size=None must be a positive number"),
    (dict(mode="window", window_size=4, residual_norm="batch"), "residual_norm='batch' has no meaning in window mode"),
    (dict(mode="sequential", chunk_size=4), "chunk_size=4 is for mode='chunked'"),
    (dict(patience=0), "inference.patience=0 must be positive"),
    (dict(lengths=[25, 3]), r"lengths=\[25, 3\] must lie between 0 and the 24 tokens"),
    (dict(lengths=[3]), r"lengths has shape \(1,\), which does not fit"),
    (dict(attention_mask=torch.ones(2, 23)), r"attention_mask has shape \(2, 23\)"),
    (dict(attention_mask=torch.tensor([[1, 0] * 12] * 2)), "attention_mask must mark one run of tokens a sample"),
    (dict(attention_mask=torch.ones(2, 24), lengths=[3, 3]), "lengths and attention_mask say the same"),
    (dict(mode="chunked"), "chunk_size=None must be a positive number"),
    (dict(max_iter=3), "solver override 'max_iter' is unknown"),
    (dict(max_iterations=1), "inference.max_iterations=1 must be at least 2"),
    (dict(stop="smple"), "inference.stop=smple must be one of batch, sample"),
    (dict(damping=7.0), r"inference.damping=7.0 must lie in \(0, 1\]"),
    (dict(input_ids=torch.full((1, 2), 128)), "input_ids hold 128, outside the vocabulary of 128"),
    (dict(input_ids=torch.full((1, 2), -1)), "input_ids hold -1"),
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "must be integers of shape"),
]


@pytest.mark.parametrize("arguments, message", REFUSED_CALLS, ids=[text[:25] for _, text in REFUSED_CALLS])
def test_calls_that_cannot_be_answered_are_refused(lm, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lm.eval()(**({"input_ids": IDS} | arguments))


class _Exploit:
    """Unpickling it would create a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "executed",)


def _drop_key(folder: Path) -> None:
    tensors = goldens.state_dict("implicit_mamba2")
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, folder / "model.safetensors")


def _other_shape(folder: Path) -> None:
    tensors = goldens.state_dict("implicit_mamba2")
    tensors["backbone.layers.1.mixer.D"] = torch.ones(9)
    save_file(tensors, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def _unsafe_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"word_emb.emb.weight": _Exploit(folder)}, folder / "pytorch_model.bin")


def _other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["n_layer"] = 4
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = [
    (_drop_key, "lacks backbone.norm_f.weight"),
    (_other_shape, "backbone.layers.1.mixer.D has shape"),
    (_truncate, "model.safetensors cannot be read"),
    (_unsafe_pickle, "pytorch_model.bin cannot be read .* unsafe"),
    (_other_config, "lacks backbone.layers.3"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor pytorch_model.bin"),
    (lambda folder: (folder / "config.json").unlink(), "holds no checkpoint"),
    (lambda folder: (folder / "config.json").write_text('{"backbone_config": '), "config.json is not valid JSON"),
]


@pytest.mark.parametrize("damage, message", BROKEN, ids=[text[:30] for _, text in BROKEN])
def test_a_damaged_reference_folder_is_named(tmp_path: Path, damage, message: str, one_process: None) -> None:
    folder = write_reference(tmp_path, "implicit_mamba2")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists()
