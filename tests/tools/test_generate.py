"""tools/generate.py on a reference folder: what users see, one process against two, and bad input."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_implicit import load_pretrained
from megatron_implicit.errors import MegatronImplicitError
from tests.test_api import write_reference
from tests.tools.conftest import REPOSITORY

TOOL = REPOSITORY / "tools" / "generate.py"
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Llama with a tokenizer of letters beside it."""
    folder = write_reference(tmp_path_factory.mktemp("model"), "implicit_llama")
    write_letters(folder / "tokenizer.json")
    return folder


def write_letters(path: Path, more: int = 0) -> None:
    """A tokenizer.json with one token a letter, and ``more`` others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<|endoftext|>", *LETTERS, *(f"<{i}>" for i in range(more))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))


def command(folder: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(TOOL), "--checkpoint", str(folder), *arguments],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_two_processes_generate_what_one_does(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("once upon\na\n", encoding="utf-8")
    arguments = ["--prompt-file", str(prompts), "--max-tokens", "8", "--ignore-end", "--temperature", "0.9"]
    results = {}
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        done = command(folder, *arguments, "--show-iterations", "--json", str(output), processes=processes)
        assert done.returncode == 0, done.stderr
        results[processes] = json.loads(output.read_text()), done.stdout
    assert results[1] == results[2]
    entries, shown = results[1]
    assert [len(entry["ids"]) for entry in entries] == [8, 8]
    assert "── prompt 1 ──\nonce upon" in shown and "── prompt 2 ──\na" in shown
    assert shown.count("8 tokens · evaluations a token: mean") == 2


def test_an_error_is_one_line_and_exit_code_2(folder: Path) -> None:
    done = command(folder, "--prompt", "abc", "--tolerance", "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: inference.tolerance=-1.0 must not be negative\n"


# ---------------------------------------------------------------- in this process


class InProcess:
    """The command with a loaded model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lm = folder, load_pretrained(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(TOOL.parent))
            self.parser = runpy.run_path(str(TOOL), run_name="tool")["_parser"]()

    def run(self, *arguments: str) -> None:
        from megatron_implicit.inference.command import GenerateCommand

        GenerateCommand(self.lm, self.parser.parse_args(["--checkpoint", str(self.folder), *arguments])).run()


@pytest.fixture(scope="module")
def generate(folder: Path, one_process: None) -> InProcess:
    return InProcess(folder)


def test_an_empty_prompt_begins_a_new_text(generate: InProcess, tmp_path: Path, capsys) -> None:
    generate.run("--prompt", "", "--max-tokens", "3", "--ignore-end", "--json", str(tmp_path / "out.json"))
    (entry,) = json.loads((tmp_path / "out.json").read_text())
    assert entry["prompt_ids"] == [0]
    assert capsys.readouterr().out.rstrip("\n") == entry["text"].replace("<|endoftext|>", "").rstrip("\n")
    assert max(entry["ids"]) < 1 + len(LETTERS), "the model has more rows than the tokenizer has tokens"


@pytest.mark.parametrize("length", [1, 500])
def test_prompts_of_any_length(generate: InProcess, tmp_path: Path, length: int) -> None:
    prompt = ("the quick fox " * 40)[:length]
    generate.run("--prompt", prompt, "--max-tokens", "2", "--ignore-end", "--json", str(tmp_path / "out.json"))
    (entry,) = json.loads((tmp_path / "out.json").read_text())
    assert (len(entry["prompt_ids"]), len(entry["ids"]), entry["stopped"]) == (length, 2, "length")


def test_prompts_are_asked_for(generate: InProcess, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    typed = iter(["abc", "x" * 30, "d"])
    asked = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    generate.run("--max-tokens", "2", "--cache-tokens", "20")
    lines = capsys.readouterr().out.splitlines()
    assert asked == ["prompt> "] * 4
    assert [line[:3] for line in lines[:2]] == ["abc", "err"]
    assert lines[1].startswith("error: prompt 1: 30 tokens do not fit the cache of 20")
    assert lines[2].startswith("d")


REFUSED = [
    (["--prompt", "abcdef", "--cache-tokens", "4"], "prompt 1: 6 tokens do not fit the cache of 4"),
    (["--prompt-ids", "1,99999"], "holds an unknown token: ids are numbers from 0 below the tokenizer's 30"),
    (["--prompt-ids", ""], "must be token ids separated by commas"),
    (["--prompt", "a", "--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
    (["--prompt", "a", "--top-p", "0.5"], "top_p has no effect at temperature=0"),
    (["--prompt", "a", "--prompt-mode", "window"], "window_size=None must be a positive number"),
    (["--prompt", "a", "--prompt-mode", "chunked", "--window-size", "3"], "chunk_size=None must be"),
    (["--prompt", "a", "--tokenizer", "/nowhere/t.json"], "cannot read tokenizer /nowhere/t.json"),
    (["--prompt", "a", "--max-iterations", "1"], "inference.max_iterations=1 must be at least 2"),
    (["--prompt-file", "/nowhere/prompts.txt"], "cannot read prompts from /nowhere/prompts.txt: No such file"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[" ".join(entry[0])[:40] for entry in REFUSED])
def test_bad_input_is_one_line(generate: InProcess, arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(MegatronImplicitError) as caught:
        generate.run(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_tokenizer_that_is_not_the_models_is_refused(generate: InProcess, tmp_path: Path) -> None:
    write_letters(tmp_path / "other.json", more=200)
    with pytest.raises(MegatronImplicitError, match="other.json has 230 tokens and the model 128"):
        generate.run("--prompt", "a", "--tokenizer", str(tmp_path / "other.json"))


def test_without_a_tokenizer_ids_do(one_process: None, tmp_path: Path, capsys) -> None:
    bare = InProcess(write_reference(tmp_path, "implicit_mamba2"))
    bare.run("--prompt-ids", "5,6,7", "--max-tokens", "3")
    assert len(capsys.readouterr().out.split()) == 6
    with pytest.raises(MegatronImplicitError, match="no tokenizer.json or .* in .*: name the model's tokenizer"):
        bare.run("--prompt", "abc")
    with pytest.raises(MegatronImplicitError, match="--cache-tokens has no meaning for implicit_mamba2"):
        bare.run("--prompt-ids", "5", "--cache-tokens", "9")
