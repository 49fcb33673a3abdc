"""Prompts from a command line or a file, as token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompt:
    """What a sample begins with."""

    ids: list[int]
    """At least one token."""
    text: str
    """What to show of it."""

    @classmethod
    def of_text(cls, text: str, tokenizer: Tokenizer) -> "Prompt":
        """The ids of a text; an empty one begins after the end of another, as texts did in training."""
        return cls(tokenizer.encode(text) or [tokenizer.eod], text)

    @classmethod
    def of_ids(cls, written: str, tokenizer: Optional[Tokenizer]) -> "Prompt":
        """Of ids written as "1,2,3".

        Raises:
            ConfigError: something else is written.
        """
        try:
            ids = [int(part) for part in written.split(",")]
        except ValueError:
            raise ConfigError(f"--prompt-ids {written!r} must be token ids separated by commas, like 1,2,3") from None
        if min(ids) < 0 or (tokenizer is not None and max(ids) >= tokenizer.vocab_size):
            limit = "" if tokenizer is None else f" below the tokenizer's {tokenizer.vocab_size}"
            raise ConfigError(f"--prompt-ids {written!r} holds an unknown token: ids are numbers from 0{limit}")
        return cls(ids, " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids))


def read_prompts(path: str) -> list[str]:
    """One prompt a line (empty lines are left out), or of a .jsonl file the "prompt" of each line.

    Raises:
        DataError: the file cannot be read or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"cannot read prompts from {path}: {reason}") from None
    if path.endswith(".jsonl"):
        prompts = [_prompt_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompt: write one a line")
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise DataError(f'{place}: expected an object with a "prompt" text')
    return prompt
