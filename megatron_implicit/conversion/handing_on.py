"""What goes along with converted weights: the tokenizer, from beside them or from the data of their run."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Optional

from megatron_implicit.conversion.formats.naming import companions
from megatron_implicit.conversion.stored import StoredModel
from megatron_implicit.data.datasets import tokenizer_file
from megatron_implicit.data.tokenizers import copy_tokenizer, load_tokenizer
from megatron_implicit.errors import DataError
from megatron_implicit.inference.text import TOKENIZER_NAMES

_DESCRIPTION = "tokenizer_config.json"


def hand_on_tokenizer(source: StoredModel, name: str, output: Path) -> Optional[str]:
    """Copies the model's tokenizer.

    Args:
        source: the model.
        name: the format that is written.
        output: the folder that is written.

    Returns:
        the file of the tokenizer; None if there is none, or only one that the run's data was not made with.
    """
    files = companions(source.folder)
    for file in files:
        shutil.copyfile(file, output / file.name)
    found = next((file for file in files if file.name in TOKENIZER_NAMES), None) or _tokenizer_of_run(source)
    if found is None:
        return None
    copied = output / found.name if found in files else copy_tokenizer(found, output)
    if name == "hf" and not (output / _DESCRIPTION).exists():
        _describe(copied)
    return str(found)


def _tokenizer_of_run(source: StoredModel) -> Optional[Path]:
    if source.tokenizer_fingerprint is None:
        return None
    with contextlib.suppress(DataError, OSError):
        file = tokenizer_file(source.config.data)
        if load_tokenizer(file).fingerprint == source.tokenizer_fingerprint:
            return file
    return None


def _describe(file: Path) -> None:
    """Makes AutoTokenizer take the file as it is; for some models it would build another tokenizer from its words."""
    values = {"tokenizer_class": "PreTrainedTokenizerFast"}
    with contextlib.suppress(DataError):  # a tokenizer that cannot end documents has no end to name
        tokenizer = load_tokenizer(file)
        if end := tokenizer.decode([tokenizer.eod]):  # SentencePiece models name it themselves
            values["eos_token"] = end
    file.with_name(_DESCRIPTION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
