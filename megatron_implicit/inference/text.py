"""Text in and out: the tokenizer that belongs to a model, prompts as ids, and generated ids as text while they come."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from megatron_implicit.config import DataConfig
from megatron_implicit.data.datasets import open_tokenizer
from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer
from megatron_implicit.errors import DataError

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
_CONTEXT = 8
"""Tokens before a new one that are decoded with it: a token's text may depend on what it follows."""
_INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are not yet a character."""


def find_tokenizer(folder: Path, data: DataConfig, given: Optional[str] = None) -> Tokenizer:
    """The tokenizer ``given``, or the one in the model's folder, or the one beside the data it was trained on.

    Args:
        folder: that the model was loaded from.
        data: section of the model's configuration.
        given: a tokenizer file.

    Raises:
        DataError: there is none, in one line that names the remedy.
    """
    if given is not None:
        return load_tokenizer(given)
    for name in TOKENIZER_NAMES:
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    if (folder / "config.json").is_file():  # a model folder of another format, whose data we know nothing about
        raise DataError(f"no {' or '.join(TOKENIZER_NAMES)} in {folder}: name the model's tokenizer with --tokenizer")
    try:
        return open_tokenizer(data)
    except (DataError, OSError):
        place = data.tokenizer or data.path
        raise DataError(f"no tokenizer in {folder} or with the data at {place}: name one with --tokenizer") from None


class TextStream:
    """Text of one token after another; a character whose bytes are still incomplete is held back.

    Args:
        tokenizer: of the ids.
        prompt: ids that come before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._start_after(prompt)

    def push(self, token: int) -> str:
        """The text that is known with this token; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        new = text[self._shown :]
        self._start_after(self._ids)
        return new

    def flush(self) -> str:
        """What was held back, should no more tokens come."""
        return self._tokenizer.decode(self._ids)[self._shown :]

    def _start_after(self, ids: list[int]) -> None:
        self._ids = ids[-_CONTEXT:]
        self._shown = len(self._tokenizer.decode(self._ids)) if self._ids else 0
