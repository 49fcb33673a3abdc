"""Folders of all formats with small random models, and their conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file, save_file

from megatron_implicit.conversion.convert import ConversionReport, convert, open_source
from tests import goldens

VOCABULARY, WIDTH = 101, 64


def write_reference(folder: Path, family: str, *, pickled: bool = False) -> Path:
    """A golden model as a reference folder, with the repetition of the embedding that the reference saves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(str(goldens.arrays(family)["config_json"]), encoding="utf-8")
    tensors = goldens.state_dict(family)
    tensors["criterion.decoder.weight"] = tensors["word_emb.emb.weight"].clone()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def converted(folder: Path, source: str, target: str, output: Path, **options: Any) -> Path:
    """The output folder of a conversion."""
    report(folder, source, target, output, **options)
    return output


def report(
    folder: Path, source: str, target: str, output: Path, *, dtype: Optional[str] = None, implicit: bool = False
) -> ConversionReport:
    """The report of a conversion."""
    return convert(open_source(folder, source, implicit_from_explicit=implicit), target, output, dtype=dtype)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder's model.safetensors."""
    return load_file(folder / "model.safetensors")


def same_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a reference folder holds exactly these tensors, bit by bit."""
    found = tensors(folder)
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )


def config_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def random_llama(folder: Path, **changes: Any) -> Path:
    """A Llama that transformers saved; untied and with a key and value for every head, if not said otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 85, "num_hidden_layers": 2,
           "num_attention_heads": 4, "pad_token_id": None, **changes}
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), folder)


def random_mamba2(folder: Path, **changes: Any) -> Path:
    """A Mamba2 that transformers saved; tied and with one group, if not said otherwise."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_heads": 8, "head_dim": 16, "state_size": 16,
           "num_hidden_layers": 2, "n_groups": 1, "tie_word_embeddings": True, **changes}
    )  # fmt: skip
    return _saved(Mamba2ForCausalLM(config), folder)


@torch.no_grad()
def _saved(model: Any, folder: Path) -> Path:
    """Nothing is accidentally 0 or 1; several shards with an index."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def write_mamba_ssm(folder: Path, **cell: Any) -> Path:
    """A state-spaces/mamba2 folder, with a vocabulary that is padded to a multiple of 16."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(6)
    heads, state, groups, rows = 8, 16, cell.get("ngroups", 1), 112
    channels = 2 * WIDTH + 2 * groups * state

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    model = {"backbone.embedding.weight": draw(rows, WIDTH), "backbone.norm_f.weight": 1 + draw(WIDTH)}
    for layer in range(2):
        model |= {
            f"backbone.layers.{layer}.{name}": value
            for name, value in {
                "norm.weight": 1 + draw(WIDTH), "mixer.dt_bias": draw(heads), "mixer.A_log": draw(heads),
                "mixer.D": draw(heads), "mixer.in_proj.weight": draw(2 * WIDTH + channels + heads, WIDTH),
                "mixer.conv1d.weight": draw(channels, 1, 4), "mixer.conv1d.bias": draw(channels),
                "mixer.norm.weight": 1 + draw(2 * WIDTH), "mixer.out_proj.weight": draw(WIDTH, 2 * WIDTH),
            }.items()
        }  # fmt: skip
    model["lm_head.weight"] = model["backbone.embedding.weight"]
    torch.save(model, folder / "pytorch_model.bin")
    config = {
        "d_model": WIDTH, "d_intermediate": 0, "n_layer": 2, "vocab_size": VOCABULARY,
        "ssm_cfg": {"layer": "Mamba2", "d_state": state, "headdim": 16, **cell}, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
