"""Llama and Mamba2 of transformers against transformers, and implicit models that bring their own code."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megatron_implicit import load_pretrained
from megatron_implicit.conversion.formats import open_model
from megatron_implicit.conversion.verify import verify
from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from tests import goldens
from tests.conversion import folders

pytestmark = pytest.mark.usefixtures("one_process")
ROPE = {"rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}}
MODELS = {
    "llama with a key and value a head, untied": (folders.random_llama, {}),
    "llama with grouped queries, tied, other base and epsilon": (
        folders.random_llama,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3, **ROPE},
    ),
    "mamba2 with one group, tied": (folders.random_mamba2, {}),
    "mamba2 with two groups, untied, odd blocks": (
        folders.random_mamba2,
        {"n_groups": 2, "tie_word_embeddings": False, "chunk_size": 48, "layer_norm_epsilon": 1e-3},
    ),
}
IDS = torch.randint(0, folders.VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make, changes", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, make, changes: dict) -> None:
    from transformers import AutoModelForCausalLM

    source = make(tmp_path / "source", **changes)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(IDS).logits
    assert float(expected.abs().max()) > 1, "a test that could not fail"
    middle = folders.converted(source, "hf", "megatron", tmp_path / "middle")
    back = folders.converted(middle, "megatron", "hf", tmp_path / "back")
    for folder in (source, middle, back):
        for mode in ({}, {"mode": "chunked", "chunk_size": 16}):
            assert float((load_pretrained(folder)(IDS, **mode).logits - expected).abs().max()) <= 1e-4
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(back).eval()(IDS).logits, expected)
    assert folders.config_json(back) == folders.config_json(source)


def loaded_logits(folder: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a folder on all processes of the job."""
    return load_pretrained(folder)(ids).logits


def test_a_foreign_folder_is_divided_over_a_job(pool, tmp_path: Path) -> None:
    source = folders.random_llama(tmp_path / "source", num_key_value_heads=2)
    expected = load_pretrained(source)(IDS).logits
    for logits in pool(2).run(loaded_logits, str(source), IDS):
        assert float((logits - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("family", ["explicit_llama", "explicit_mamba2"])
def test_our_models_are_written_for_transformers_without_its_config(tmp_path: Path, family: str) -> None:
    reference = folders.write_reference(tmp_path / "reference", family)
    hf = folders.converted(reference, "reference", "hf", tmp_path / "hf")
    outcome = verify(open_model(reference, "reference"), open_model(hf, "hf"), exact=True)
    assert outcome.sides == "megatron_implicit against transformers" and outcome.difference <= 1e-5


PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()

def everything(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found = {"logits": model(ids).logits}
    model.config.inference |= {"tolerance": 1e-6, "max_iterations": 400}
    found["tight"] = model(ids).logits
    found["tokens"] = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    found["without states"] = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
    found["beams"] = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2)
    short = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids[:1, :-5]), dim=1)
    batch, mask = torch.cat((short, ids[1:])), torch.ones_like(ids)
    mask[0, :5] = 0
    found["padded"] = model.generate(batch, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    found["alone"] = model.generate(ids[:1, :-5], max_new_tokens=NEW, do_sample=False)
    found["padded logits"] = model(batch, attention_mask=mask).logits[0, 5:]
    found["alone logits"] = model(ids[:1, :-5]).logits[0]
    states, logits = None, []
    for token in ids.split(1, dim=1):
        out = model(token, states=states, use_cache=True)
        states = out.states
        logits.append(out.logits)
    found["token by token"] = torch.cat(logits, dim=1)
    return found

torch.save([everything(*given) for given in torch.load(sys.argv[1], weights_only=True)], sys.argv[2])
assert not any(name.startswith("megatron") for name in sys.modules), "the folders' code must stand alone"
"""
NEW = 6
"""Tokens that are generated."""


@dataclass
class Exported:
    """A golden model as a folder of its own, its tokens, and what it gives without our package."""

    folder: Path
    ids: torch.Tensor
    found: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def exported(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Both families, in one process that has never seen our package."""
    place, models = tmp_path_factory.mktemp("exported"), {}
    for family in goldens.IMPLICIT:
        reference = folders.write_reference(place / f"{family}-reference", family)
        hf = folders.converted(reference, "reference", "hf", place / family)
        models[family] = Exported(hf, torch.from_numpy(goldens.arrays(family)["input_ids"]))
    torch.save([(str(model.folder), model.ids) for model in models.values()], place / "given.pt")
    program = PROGRAM.replace("NEW", str(NEW))
    command = [sys.executable, "-c", program, str(place / "given.pt"), str(place / "found.pt")]
    environment = os.environ | {"HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for model, found in zip(models.values(), torch.load(place / "found.pt", weights_only=True), strict=True):
        model.found = found
    return models


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_an_exported_implicit_model_loads_alone_and_agrees_with_ours(
    exported: dict[str, Exported], family: str
) -> None:
    found, ids = exported[family].found, exported[family].ids
    lm = load_pretrained(exported[family].folder)
    tight = {"tolerance": 1e-6, "max_iterations": 400}
    assert float((found["logits"] - lm(ids).logits).abs().max()) <= 1e-5
    assert float((found["tight"] - goldens.tensor(family, "fp/logits").float()).abs().max()) <= 1e-4
    sequential = lm(ids, mode="sequential", **tight).logits
    assert float((found["token by token"] - sequential).abs().max()) <= 1e-4
    assert float((found["padded logits"] - found["alone logits"]).abs().max()) <= 1e-5
    assert torch.equal(found["tokens"], found["without states"])
    assert torch.equal(found["padded"][0, ids.shape[1] :], found["alone"][0, ids.shape[1] - 5 :])
    assert found["beams"].shape == (2, ids.shape[1] + 4)
    for _ in range(NEW):
        ids = torch.cat((ids, lm(ids, **tight).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found["tokens"], ids)


def test_an_explicit_model_starts_an_implicit_one(tmp_path: Path) -> None:
    """The effective weights are the explicit model's, and with z = 0 its first projection of the embedding."""
    source = folders.random_llama(tmp_path / "source", tie_word_embeddings=True)
    start = folders.converted(source, "hf", "megatron", tmp_path / "start", implicit=True)
    explicit, implicit = load_pretrained(source), load_pretrained(start)
    assert implicit.config.model.family == "implicit_llama"
    ours, theirs = implicit.model.decoder, explicit.model.decoder
    embedding = implicit.model.embedding(IDS, None)
    with torch.no_grad():
        bound, plain = ours.begin(embedding), theirs.begin(embedding)
        first, other = (d.map.stack.layers[0].self_attention.linear_qkv.rows for d in (ours, theirs))
        assert float((bound.weights[first].weight - plain.weights[other].weight).abs().max()) <= 1e-6
        normed = explicit.model.decoder.map.stack.layers[0].input_layernorm(embedding)
        projected = torch.nn.functional.linear(normed, plain.weights[other].weight)
    assert float((bound.injection - projected).abs().max()) <= 1e-5
    assert torch.isfinite(implicit(IDS, max_iterations=8).logits).all()


TEXTS = ["the river", "  two  spaces\n\nand 17 lines", "naïve €5 — 日本語 🙂", "\ttab \r\n", "e\u0301 ﬁ \u00a0x", ""]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_auto_tokenizer_gives_the_ids_of_a_tokenizer_that_is_handed_on(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    source = folders.write_reference(tmp_path / "source", "explicit_mamba2")  # of Mamba2 it would build GPT-NeoX's
    ours = write_tokenizer(source / name)
    exported = folders.converted(source, "reference", "hf", tmp_path / "exported")
    assert (exported / name).read_bytes() == (source / name).read_bytes()
    theirs = AutoTokenizer.from_pretrained(exported)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (theirs.decode(ours.encode(TEXTS[2])), theirs.eos_token_id) == (TEXTS[2], ours.eod)


def write_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of ours, or a byte-level BPE."""
    words = [f"the {word} of {i}  things\n" for i in range(40) for word in ("house", "river", "sea")]
    if path.suffix == ".model":
        return train_sentencepiece(words, path, 300)
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(words, trainer)
    bpe.save(str(path))
    return load_tokenizer(path)
