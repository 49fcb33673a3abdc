"""Text in and out: the tokenizer that belongs to a model, prompts as ids, and generated ids as text while they come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Protocol

import torch

from megatron_implicit.config import Config
from megatron_implicit.data.datasets import tokenizer_file
from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer
from megatron_implicit.errors import DataError

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
_PADDING = 1024
"""Programs pad vocabularies to multiples of at most this: a model has fewer rows than this beyond its tokenizer's."""
_CONTEXT = 8
"""Tokens before a new one that are decoded with it: a token's text may depend on what it follows."""
_INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are not yet a character."""


class TextModel(Protocol):
    """What choosing a tokenizer needs of ``api.PretrainedModel``."""

    config: Config
    tokenizer_fingerprint: Optional[str]


def find_tokenizer(lm: TextModel, folder: Path, given: Optional[str] = None) -> Tokenizer:
    """The tokenizer ``given``, or the one in the model's folder, or the one beside the data it was trained on.

    Args:
        lm: a loaded model.
        folder: that it was loaded from.
        given: a tokenizer file.

    Raises:
        DataError: there is none, or it is not the model's; in one line that names the remedy.
    """
    file = Path(given) if given is not None else _own_tokenizer(lm, folder)
    tokenizer = load_tokenizer(file)
    check_tokenizer(lm, tokenizer, str(file), "name the model's own with --tokenizer")
    return tokenizer


def check_tokenizer(lm: TextModel, tokenizer: Tokenizer, name: str, remedy: str) -> None:
    """Compares a tokenizer with the one of the model's training data; where that is not known, only the vocabularies.

    Args:
        lm: a loaded model.
        tokenizer: to be used with it.
        name: what to call it.
        remedy: ends the message.

    Raises:
        DataError: it is another one, or has more entries than the model.
    """
    entries, rows = tokenizer.vocab_size, lm.config.model.vocab_size
    if lm.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"the model was trained with another tokenizer (fingerprint {lm.tokenizer_fingerprint[:12]}) than {name} "
            f"({entries} entries, fingerprint {tokenizer.fingerprint[:12]}): {remedy}"
        )
    if entries > rows:
        raise DataError(f"{name} has {entries} tokens and the model {rows}: {remedy}")
    if lm.tokenizer_fingerprint is None and rows - entries >= _PADDING and torch.distributed.get_rank() == 0:
        print(f"warning: {name} has only {entries} of the model's {rows} tokens: is it the model's?", file=sys.stderr)


def _own_tokenizer(lm: TextModel, folder: Path) -> Path:
    for name in TOKENIZER_NAMES:
        if (folder / name).is_file():
            return folder / name
    if lm.tokenizer_fingerprint is None:
        raise DataError(f"no {' or '.join(TOKENIZER_NAMES)} in {folder}: name the model's tokenizer with --tokenizer")
    data = lm.config.data
    try:
        file = tokenizer_file(data)
    except (DataError, OSError):
        file = None
    if file is None or not file.is_file():
        place = data.tokenizer or data.path
        raise DataError(f"no tokenizer in {folder} or with the data at {place}: name one with --tokenizer")
    return file


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
