"""A tokenizer for the small models, and folders of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer
from tests.conversion import folders

VOCABULARY = 128
"""That of the golden models."""
QUESTIONS = Path(__file__).parent / "questions"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE of the questions that transformers reads too: it knows no other characters, and has an end of text only."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.train_from_iterator((path.read_text() + "\n" for path in sorted(QUESTIONS.rglob("*.jsonl"))), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The same as our protocol."""
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A small random Llama of transformers with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    folders.random_llama(folder, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def implicit_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """The golden implicit Mamba2 as a reference folder with a tokenizer."""
    folder = folders.write_reference(tmp_path_factory.mktemp("implicit"), "implicit_mamba2")
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def exported_folder(tmp_path_factory: pytest.TempPathFactory, implicit_folder: Path, one_process: None) -> Path:
    """The same as a folder that transformers loads with the code in it."""
    folder = folders.converted(implicit_folder, "reference", "hf", tmp_path_factory.mktemp("exported") / "model")
    (folder / "tokenizer.json").write_bytes((implicit_folder / "tokenizer.json").read_bytes())
    return folder
