"""Text in and out of generation: prompts, characters of several tokens, colours."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_implicit.config import ModelConfig
from megatron_implicit.data.tokenizers import Tokenizer, train_sentencepiece
from megatron_implicit.errors import ConfigError, DataError
from megatron_implicit.inference.console import GenerationPrinter, summary
from megatron_implicit.inference.generation import GeneratedToken, Generation
from megatron_implicit.inference.prompts import Prompt, read_prompts
from megatron_implicit.inference.text import TextStream, check_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = [f"the {word} of {i}\n" for i in range(40) for word in ("house", "river", "sea")]
    return train_sentencepiece(lines, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


@pytest.mark.parametrize("text", ["the river", "  two  spaces\n\nand lines", "naïve €5 — 日本語 🙂", "\ttab "])
def test_a_stream_of_tokens_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for split in range(len(ids)):
        stream = TextStream(tokenizer, ids[:split])
        shown = [stream.push(token) for token in ids[split:]]
        prompt = tokenizer.decode(ids[:split])
        if "\ufffd" not in prompt:  # the prompt did not end inside a character
            assert prompt + "".join(shown) + stream.flush() == text
            assert not any("\ufffd" in part for part in shown)


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    assert "".join(stream.push(token) for token in tokenizer.encode("🙂")[:-1]) == ""
    assert "\ufffd" in stream.flush()


def test_a_vocabulary_that_padding_does_not_explain_is_doubted(tokenizer: Tokenizer, one_process: None, capsys) -> None:
    for rows, warnings in ((1024, 0), (1324, 1)):
        model = SimpleNamespace(config=SimpleNamespace(model=ModelConfig(vocab_size=rows)), tokenizer_fingerprint=None)
        check_tokenizer(model, tokenizer, "tokenizer.model", "name another")
        assert capsys.readouterr().err.count("tokenizer.model has only 300 of the model's 1324 tokens") == warnings


def test_prompts_come_as_text_or_ids(tokenizer: Tokenizer) -> None:
    assert Prompt.of_text("", tokenizer).ids == [tokenizer.eod]
    assert Prompt.of_ids("3, 4", tokenizer).ids == [3, 4]
    for written in ("", "1,x", "1,,2"):
        with pytest.raises(ConfigError, match="must be token ids separated by commas"):
            Prompt.of_ids(written, tokenizer)
    with pytest.raises(ConfigError, match="unknown token: ids are numbers from 0 below the tokenizer's 300"):
        Prompt.of_ids("1,300", tokenizer)


def test_prompt_files_are_lines_or_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one\n\ntwo words\n")
    lines.write_text('{"prompt": "one\\ntwo"}\n{"prompt": ""}\n')
    assert read_prompts(str(text)) == ["one", "two words"]
    assert read_prompts(str(lines)) == ["one\ntwo", ""]
    lines.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match='line 2: expected an object with a "prompt" text'):
        read_prompts(str(lines))
    for content, message in ((b"\n", "holds no prompt"), (b"\xff\xfe", "it is not UTF-8 text")):
        text.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_prompts(str(text))
    with pytest.raises(DataError, match="No such file"):
        read_prompts(str(tmp_path / "none"))


def printed(tokenizer: Tokenizer, *, colours: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=colours, color_system="256" if colours else None, width=40)
    printer = GenerationPrinter(console, tokenizer, show_iterations=True, hidden=[tokenizer.eod])
    counts = [2, 30, 5, 5]
    ids = [*(tokenizer.encode(piece)[0] for piece in ("the", " river", "\n")), tokenizer.eod]
    tokens = [GeneratedToken(0, token, count, count < 20) for token, count in zip(ids, counts)]
    generation = Generation(tokenizer.encode("[x] "), tokens, "end")
    printer.begin("[x] ", generation.prompt)
    for entry in tokens:
        printer.token(entry)
    printer.end(generation)
    printer.legend()
    return output.getvalue()


def test_tokens_are_coloured_by_their_evaluations(tokenizer: Tokenizer) -> None:
    coloured = printed(tokenizer, colours=True)
    assert "\x1b[38;5;33m" in coloured and "\x1b[1;38;5;196m" in coloured  # few in blue, many in red
    assert "mean 10.5, maximum 30" in coloured and "1 not converged" in coloured and "end of text" in coloured
    assert "24+" in coloured.splitlines()[-1]


def test_without_colours_numbers_say_it(tokenizer: Tokenizer) -> None:
    lines = printed(tokenizer, colours=False).splitlines()
    assert lines[0].startswith("[x] ") and "²" in lines[0] and "³⁰" in lines[0]
    assert not any("\x1b" in line for line in lines)


def test_a_summary_needs_no_colours() -> None:
    generation = Generation([1], [GeneratedToken(0, 2, 4, True), GeneratedToken(0, 3, 6, True)], "length")
    assert summary(generation) == "2 tokens · evaluations a token: mean 5.0, maximum 6 · stopped: most tokens"
