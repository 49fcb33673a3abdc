from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_implicit.data.tokenizers import load_tokenizer


def test_a_tokenizer_of_the_shipped_corpus(work: Any, corpus: Path) -> None:
    done = work.run("train_tokenizer", "--input", corpus, "--output", "out/tokenizer.model", "--vocab-size", 4096)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4096 pieces" in done.stdout
    assert load_tokenizer(work.folder / "out" / "tokenizer.model").vocab_size == 4096
    assert list(work.contents()) == ["out/tokenizer.model"]


def test_training_again_changes_nothing_and_another_size_is_refused(work: Any, jsonl: Path) -> None:
    command = ("train_tokenizer", "--input", jsonl, "--output", "t.model", "--vocab-size")
    assert work.run(*command, 300).returncode == 0
    before = work.contents()
    assert work.run(*command, 300).returncode == 0
    assert work.contents() == before
    work.fails("add --overwrite", *command, 301)
    assert work.run(*command, 301, "--overwrite").returncode == 0
    assert load_tokenizer(work.folder / "t.model").vocab_size == 301


@pytest.mark.parametrize(
    ("file", "content", "size", "words"),
    [
        ("missing.jsonl", None, 300, "no input file missing.jsonl"),
        ("empty.jsonl", b"", 300, "no text"),
        ("blank.jsonl", b'{"text": ""}\n{"text": " "}\n', 300, "no text"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', 300, "error: bad.jsonl:2: not valid JSON"),
        ("short.txt", b"too little", 30000, "30000 pieces"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    file: str, content: bytes | None, size: int, words: str, work: Any
) -> None:
    if content is not None:
        (work.folder / file).write_bytes(content)
    work.fails(words, "train_tokenizer", "--input", file, "--output", "t.model", "--vocab-size", size)


def test_wrong_usage_is_one_line_with_exit_code_2(work: Any) -> None:
    work.fails("--output, --vocab-size", "train_tokenizer", "--input", "a", code=2)
    arguments = ("--input", "a", "--output", "b", "--vocab-size", "many")
    work.fails("invalid int value: 'many'", "train_tokenizer", *arguments, code=2)
    assert "--vocab-size" in work.run("train_tokenizer", "--help").stdout
