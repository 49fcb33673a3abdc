"""Folders that are damaged, malicious or mean something else: named in one line; nothing run, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_implicit import load_pretrained
from megatron_implicit.errors import CheckpointError, MegatronImplicitError
from tests import goldens
from tests.conversion import folders

pytestmark = pytest.mark.usefixtures("one_process")


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def refused(folder: Path, source: str, target: str, words: str, **options: Any) -> None:
    """The conversion ends in one line that holds ``words``; there is no output and nothing in the folder ran."""
    output = folder.parent / "output"
    with pytest.raises(MegatronImplicitError, match=words) as caught:
        folders.converted(folder, source, target, output, **options)
    assert "\n" not in str(caught.value)
    assert not list(folder.parent.glob("output*"))
    assert not (folder / "executed").exists()


def edit_config(folder: Path, **values: Any) -> None:
    """Changes keys of config.json."""
    (folder / "config.json").write_text(json.dumps(folders.config_json(folder) | values), encoding="utf-8")


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A change of model.safetensors."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def replace(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    """One tensor more, or another one."""
    return edit_tensors(lambda tensors: tensors.update({name: value}))


def as_pickle(value: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Weights as a pickle of some value."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(value(folder), folder / "pytorch_model.bin")

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


D = "backbone.layers.1.mixer.D"
REFERENCE = {
    "malicious pickle": (as_pickle(lambda folder: {"x": Exploit(folder / "executed")}), "cannot be read .* unsafe"),
    "pickle of something else": (as_pickle(lambda folder: {"model": {"x": torch.ones(2)}}), "not a state dict of tens"),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(D)), f"lacks {D}: it does not hold the model"),
    "extra tensor": (replace("backbone.extra", torch.ones(3)), "has unexpected backbone.extra"),
    "other shape": (replace(D, torch.ones(9)), rf"{D} has shape \(9,\) instead of \(8,\)"),
    "integers": (replace(D, torch.ones(8, dtype=torch.int64)), f"{D} has dtype int64: weights are float32"),
    "double precision": (replace(D, torch.ones(8, dtype=torch.float64)), f"{D} has dtype float64: give --dtype"),
    "head that differs though tied": (
        replace("criterion.decoder.weight", torch.zeros(128, 64)),
        "criterion.decoder.weight differs from the embedding although tie_embeddings=true",
    ),
    "no head though untied": (
        lambda folder: (
            edit_config(folder, tie_embeddings=False),
            edit_tensors(lambda tensors: tensors.pop("criterion.decoder.weight"))(folder),
        ),
        "lacks the output head although tie_embeddings=false",
    ),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no JSON": (lambda folder: (folder / "config.json").write_text('{"backbone_config'), "is not valid JSON"),
    "other model": (lambda folder: edit_config(folder, head_bias=True), "head_bias=True is not supported"),
    "text for a number": (lambda folder: edit_config(folder, vocab_size="many"), "vocab_size='many': it must be a pos"),
    "text for a section": (lambda folder: edit_config(folder, deq_params="none"), "deq_params='none': it must be an"),
    "text in the solver": (
        lambda folder: edit_config(folder, deq_params={"solver": {"f_max_iter": "4"}, "training": {}}),
        "f_max_iter='4': it must be a positive integer",
    ),
}


@pytest.mark.parametrize("damage, words", REFERENCE.values(), ids=REFERENCE)
def test_a_damaged_reference_folder_is_named(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    folder = folders.write_reference(tmp_path / "reference", "implicit_mamba2")
    damage(folder)
    refused(folder, "reference", "megatron", words)


def test_double_precision_is_converted_on_request(tmp_path: Path) -> None:
    folder = folders.write_reference(tmp_path / "reference", "implicit_mamba2")
    replace(D, torch.full((8,), 1 / 3, dtype=torch.float64))(folder)
    back = folders.converted(folder, "reference", "reference", tmp_path / "output", dtype="float32")
    assert torch.equal(folders.tensors(back)[D], torch.full((8,), 1 / 3))


def test_an_untied_head_is_its_own(tmp_path: Path) -> None:
    folder = folders.write_reference(tmp_path / "reference", "explicit_llama")
    edit_config(folder, tie_embeddings=False)
    head = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    replace("criterion.decoder.weight", head)(folder)
    middle = folders.converted(folder, "reference", "megatron", tmp_path / "middle")
    back = folders.converted(middle, "megatron", "reference", tmp_path / "back")
    assert folders.same_tensors(back, goldens.state_dict("explicit_llama") | {"criterion.decoder.weight": head})


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00006.safetensors").unlink()


def point_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))


HF = {
    "missing shard": (drop_shard, "model-00002-of-00006.safetensors is missing"),
    "shard elsewhere": (point_outside, "which is not a file beside it"),
    "head_dim": (lambda folder: edit_config(folder, head_dim=32), "head_dim=32 is not supported"),
    "attention bias": (lambda folder: edit_config(folder, attention_bias=True), "attention_bias=True is not supported"),
    "scaled rotary": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}),
        "rope_type=llama3 is not supported",
    ),
    "older scaled rotary": (
        lambda folder: edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type=linear is not"
    ),
    "tied in the config only": (
        lambda folder: edit_config(folder, tie_word_embeddings=True),
        "lm_head.weight differs from the embedding although tie_word_embeddings=true",
    ),
    "quantized": (lambda folder: edit_config(folder, quantization_config={"bits": 4}), "quantization_config="),
    "other type": (lambda folder: edit_config(folder, model_type="gpt2"), "is not in the format hf"),
    "width that is text": (lambda folder: edit_config(folder, hidden_size="big"), "config.json has hidden_size='big'"),
    "no heads": (lambda folder: edit_config(folder, num_attention_heads=0), "config.json has num_attention_heads=0"),
    "heads that do not divide": (
        lambda folder: edit_config(folder, num_attention_heads=5, head_dim=None), "hidden_size=64 is not divisible"
    ),
    "null": (lambda folder: edit_config(folder, vocab_size=None), "config.json lacks 'vocab_size'"),
    "base that is text": (lambda folder: edit_config(folder, rope_parameters={"rope_theta": "x"}), "rope_theta='x'"),
    "rotary that is text": (lambda folder: edit_config(folder, rope_parameters="x"), "rope_parameters='x'"),
    "tie that is text": (lambda folder: edit_config(folder, tie_word_embeddings="x"), "source: .*tie_embeddings=x"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "source/config.json is not valid JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama in six shards."""
    return folders.random_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.mark.parametrize("damage, words", HF.values(), ids=HF)
def test_a_llama_we_do_not_build_is_named(tmp_path: Path, llama: Path, damage: Callable, words: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    refused(folder, "hf", "megatron", words)


@pytest.mark.parametrize("change, words", [
    ({"layer": "Mamba1"}, "ssm_cfg.layer=Mamba1"), ({"rmsnorm": False}, "ssm_cfg.rmsnorm=False"),
    ({"dt_limit": [0.1, 1.0]}, "ssm_cfg.dt_limit"), ({"surprise": 1}, "ssm_cfg.surprise=1 is not supported"),
])  # fmt: skip
def test_a_mamba_we_do_not_build_is_named(tmp_path: Path, change: dict, words: str) -> None:
    refused(folders.write_mamba_ssm(tmp_path / "source", **change), "mamba_ssm", "megatron", words)


@pytest.mark.parametrize("values, words", [
    ({"hidden_size": "big"}, "has hidden_size='big': it must be a positive integer"),
    ({"head_dim": 0}, "has head_dim=0"),
    ({"num_heads": 0}, "has num_heads=0: it must"), ({"num_heads": 7}, "num_heads=7 is not supported: only 8 is"),
    ({"chunk_size": "x"}, "has chunk_size='x'"), ({"time_step_limit": 3}, "time_step_limit=3 is not supported"),
    ({"layer_norm_epsilon": "x"}, "has layer_norm_epsilon='x': it must be a number"),
])  # fmt: skip
def test_a_damaged_mamba2_configuration_is_named(tmp_path: Path, values: dict, words: str) -> None:
    keys = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 101, "state_size": 16, "head_dim": 16,
            "num_heads": 8}  # fmt: skip
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba2", **keys, **values}), encoding="utf-8")
    refused(folder, "hf", "megatron", f"source: .*{words}")


@pytest.mark.parametrize("values", [{"pad_vocab_size_multiple": 0}, {"vocab_size": "x"}, {"ssm_cfg": "x"}])
def test_a_damaged_mamba_ssm_configuration_is_named(tmp_path: Path, values: dict) -> None:
    folder = folders.write_mamba_ssm(tmp_path / "source")
    edit_config(folder, **values)
    refused(folder, "mamba_ssm", "megatron", f"source: config.json has {next(iter(values))}=")


CANNOT_BE_SAID = [
    ("implicit_mamba2", "mamba_ssm", "implicit_mamba2 cannot be said in the format mamba_ssm"),
    ("explicit_llama", "mamba_ssm", "explicit_llama cannot be said in the format mamba_ssm"),
]


@pytest.mark.parametrize("family, target, words", CANNOT_BE_SAID)
def test_what_a_format_cannot_say_is_refused(tmp_path: Path, family: str, target: str, words: str) -> None:
    refused(folders.write_reference(tmp_path / "reference", family), "reference", target, words)


def test_a_llama_that_the_reference_does_not_compute_is_refused(tmp_path: Path) -> None:
    folder = folders.random_llama(
        tmp_path / "source", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        num_key_value_heads=2,
    )  # fmt: skip
    refused(folder, "hf", "reference", "model.num_query_groups=2 cannot be said in the format reference")
    edit_config(folder, rms_norm_eps=1e-6)
    refused(folder, "hf", "reference", "model.norm_eps=1e-06 cannot be said in the format reference")


def test_an_implicit_model_is_not_started_twice(tmp_path: Path) -> None:
    folder = folders.write_reference(tmp_path / "reference", "implicit_llama")
    refused(folder, "reference", "megatron", "holds an implicit model already", implicit=True)


# ---------------------------------------------------------------- our checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A converted golden."""
    reference = folders.write_reference(tmp_path / "reference", "implicit_mamba2")
    return folders.converted(reference, "reference", "megatron", tmp_path / "checkpoint")


def with_checksums(folder: Path) -> None:
    """What an attacker would do too."""
    from megatron_implicit.checkpoint.integrity import write_manifest

    (folder / "manifest.json").unlink()
    write_manifest(folder, {})


def test_a_checkpoint_that_is_not_whole_is_named(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    refused(checkpoint, "megatron", "reference", "__0_0.distcp is missing")


def test_a_shard_that_metadata_names_must_be_there(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    with_checksums(checkpoint)
    refused(checkpoint, "megatron", "reference", "__0_0.distcp is missing, it holds")


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_malicious_pickles_of_a_checkpoint_are_not_run(checkpoint: Path, file: str) -> None:
    content = pickle.dumps(Exploit(checkpoint / "executed"))
    (checkpoint / file).write_bytes(content)
    with_checksums(checkpoint)
    with pytest.raises(CheckpointError, match="unsafe"):
        load_pretrained(checkpoint)
    if file == ".metadata":
        refused(checkpoint, "megatron", "reference", r"\.metadata cannot be read \(it asks for posix.mkdir\)")
    else:
        folders.converted(checkpoint, "megatron", "reference", checkpoint.parent / "output")  # needs nothing of it
        assert not (checkpoint / "executed").exists()


def test_a_malicious_tensor_of_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    import io

    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    buffer = io.BytesIO()
    torch.save(Exploit(checkpoint / "executed"), buffer)
    data[: len(buffer.getvalue())] = buffer.getvalue()
    (checkpoint / "__0_0.distcp").write_bytes(bytes(data))
    with_checksums(checkpoint)
    refused(checkpoint, "megatron", "reference", r"__0_0.distcp: .* cannot be read .* unsafe")


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    folder = folders.write_reference(tmp_path / "reference", "explicit_llama")
    output = tmp_path / "output"
    output.mkdir()
    folders.converted(folder, "reference", "megatron", output)  # an empty folder is welcome
    before = {file: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(MegatronImplicitError, match="output exists: give a folder that does not, or an empty one"):
        folders.converted(folder, "reference", "megatron", output)
    assert {file: file.read_bytes() for file in output.iterdir()} == before


def test_an_error_on_the_way_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_implicit.conversion import convert

    folder = folders.write_reference(tmp_path / "reference", "explicit_llama")
    monkeypatch.setattr(convert, "largest_difference", lambda *_: 1.0)
    with pytest.raises(CheckpointError, match="changed on its way by 1.0e"):
        folders.converted(folder, "reference", "megatron", tmp_path / "output")
    assert [entry.name for entry in tmp_path.iterdir()] == ["reference"]
