"""Our model in lm-eval against lm-eval's own for transformers, on the same weights."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_implicit import load_pretrained
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.evaluation.downstream.harness_model import HarnessModel
from tests.evaluation.downstream.test_harness_model import PAIRS, requests

pytestmark = pytest.mark.usefixtures("one_process")
GENERATE = [(context or "A", {"until": ["e "], "max_gen_toks": 10}) for context, _ in PAIRS]


@pytest.fixture
def hf_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's HFLM. Its module imports accelerate, for more devices than one: a stand-in does where it is absent."""
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError:
        stand_in, utilities = types.ModuleType("accelerate"), types.ModuleType("accelerate.utils")
        for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
            setattr(stand_in, name, None)
        utilities.get_max_memory = None
        monkeypatch.setitem(sys.modules, "accelerate", stand_in)
        monkeypatch.setitem(sys.modules, "accelerate.utils", utilities)
    from lm_eval.models.huggingface import HFLM

    return HFLM


def theirs(hf_model: Any, folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    return hf_model(pretrained=model, tokenizer=words, max_length=40, device="cpu", **options)


def compare(ours: HarnessModel, other: Any) -> None:
    pairs = requests("loglikelihood", PAIRS)
    found, wanted = ours.loglikelihood(pairs), other.loglikelihood(pairs, disable_tqdm=True)
    for (score, greedy), (their_score, their_greedy) in zip(found, wanted, strict=True):
        assert score == pytest.approx(their_score, abs=1e-4) and greedy == their_greedy
    texts = requests("loglikelihood_rolling", [(context + continuation,) for context, continuation in PAIRS])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        other.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4
    )


def test_a_llama_scores_and_generates_as_in_transformers(
    hf_model: Any, llama_folder: Path, tokenizer: Tokenizer
) -> None:
    ours = HarnessModel(load_pretrained(llama_folder), tokenizer, batch_size=4, max_length=40)
    other = theirs(hf_model, llama_folder, batch_size=3)
    compare(ours, other)
    generate = requests("generate_until", GENERATE)
    assert ours.generate_until(generate) == other.generate_until(generate, disable_tqdm=True)


def test_an_exported_implicit_model_scores_as_in_transformers(
    hf_model: Any, exported_folder: Path, tokenizer: Tokenizer
) -> None:
    """One text at a time on their side, which gives padding to the model as if it were text."""
    ours = HarnessModel(load_pretrained(exported_folder), tokenizer, batch_size=4, max_length=40)
    compare(ours, theirs(hf_model, exported_folder, batch_size=1))
