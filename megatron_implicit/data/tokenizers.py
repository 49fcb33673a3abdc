"""Tokenizers behind one small protocol: SentencePiece models and Hugging Face ``tokenizer.json`` files.

Training code needs five things of a tokenizer and nothing else: see ``Tokenizer``. ``load_tokenizer`` decides by the
file's content which kind it is.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Union

from megatron_implicit.data.byte_bpe import FastByteBPE, fast_byte_bpe
from megatron_implicit.errors import DataError

PathLike = Union[str, "os.PathLike[str]"]

END_OF_DOCUMENT = "<|endoftext|>"
"""Piece that ``train_sentencepiece`` reserves for the end of a document."""

_WHITESPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character, so it cannot tell the two apart in its input."""

_HF_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """What the package needs of a tokenizer."""

    vocab_size: int
    """Entries of the vocabulary, added tokens included; every id is below it."""
    eod: int
    """Id that ends a document; ``encode`` never produces it."""
    fingerprint: str
    """sha256 (hex) of the canonical bytes of the model: equal for equal tokenizers, wherever their file lies."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without an end of document."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``."""


class SentencePieceTokenizer:
    """A SentencePiece ``.model``. The text round-trips exactly if the model was made by ``train_sentencepiece``."""

    def __init__(self, model: bytes, name: str) -> None:
        """``model``: bytes of the file; ``name``: what to call it in errors. Raises DataError."""
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise _not_a_tokenizer(name) from error
        self.vocab_size = self._processor.vocab_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(
                f"tokenizer {name} has no end-of-sequence piece to end documents with; train one that has"
                " (tools/train_tokenizer.py)"
            )
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._mark_ids = self._find_mark_ids()

    def encode(self, text: str) -> list[int]:
        if self._mark_ids is None or _WHITESPACE_MARK not in text:
            return self._processor.encode(text)
        first, *rest = text.split(_WHITESPACE_MARK)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._mark_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def _find_mark_ids(self) -> list[int] | None:
        """Byte pieces that spell the whitespace mark itself, or None where a model cannot splice them in."""
        pieces = [f"<0x{byte:02X}>" for byte in _WHITESPACE_MARK.encode("utf-8")]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        if not all(self._processor.is_byte(i) for i in ids):
            return None
        spliced = self._processor.encode("a") + ids + self._processor.encode("b")
        return ids if self.decode(spliced) == f"a{_WHITESPACE_MARK}b" else None


class HuggingFaceTokenizer:
    """A Hugging Face ``tokenizer.json``. Special tokens spelled out in a text are encoded as ordinary text.

    Byte-level BPE is encoded by ``byte_bpe`` where that is shown to give the same ids, which is looked into (a second
    or two) when the first text is encoded.
    """

    def __init__(self, description: dict[str, Any], name: str) -> None:
        """``description``: the parsed file; ``name``: what to call it in errors. Raises DataError."""
        import tokenizers

        canonical = json.dumps(description, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(canonical)
        except Exception as error:  # the library raises bare Exception for any unusable description
            raise _not_a_tokenizer(name) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        known = [self._tokenizer.token_to_id(token) for token in _HF_END_OF_DOCUMENT]
        known = [i for i in known if i is not None]
        if not known:
            raise DataError(
                f"tokenizer {name} has none of the end-of-document tokens {', '.join(_HF_END_OF_DOCUMENT)};"
                " add one to its added_tokens"
            )
        self.eod = known[0]
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8")).hexdigest()
        self._description = description

    @property
    def is_fast(self) -> bool:
        """Whether texts are encoded by ``byte_bpe``."""
        return self._fast is not None

    @functools.cached_property
    def _fast(self) -> FastByteBPE | None:
        return fast_byte_bpe(self._description, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        if self._fast is not None:
            return self._fast.encode(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path: PathLike) -> Tokenizer:
    """The tokenizer in file ``path``, a SentencePiece model or a ``tokenizer.json``.

    Raises:
        DataError: no such file, or neither kind of tokenizer.
    """
    name = os.fspath(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {name}: {error.strerror}; train one with tools/train_tokenizer.py or name"
            " another file"
        ) from error
    if not content:
        raise _not_a_tokenizer(name)
    if not content.lstrip().startswith(b"{"):
        return SentencePieceTokenizer(content, name)
    try:
        description = json.loads(content)
    except ValueError as error:
        raise _not_a_tokenizer(name) from error
    return HuggingFaceTokenizer(description, name)


def copy_tokenizer(path: PathLike, folder: PathLike) -> Path:
    """Puts a copy of the tokenizer file beside the datasets in ``folder``, where training looks for it."""
    content = Path(path).read_bytes()
    target = Path(folder) / ("tokenizer.json" if content.lstrip().startswith(b"{") else "tokenizer.model")
    _publish(target, content, overwrite=True)
    return target


def train_sentencepiece(
    documents: Iterable[str],
    output: PathLike,
    vocab_size: int,
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9999,
    overwrite: bool = False,
) -> Tokenizer:
    """Train a SentencePiece model that reproduces any text exactly, and write it to ``output`` in one move.

    No normalisation, no dummy prefix, digits one by one, every byte a piece (so line breaks and rare characters need no
    vocabulary of their own). The same documents in the same order give the same bytes.

    Args:
        documents: texts; each is cut at line breaks for training.
        output: file to write; its folder is made.
        vocab_size: pieces, the 256 bytes and two special ones included.
        model_type: "bpe" or "unigram".
        character_coverage: share of the text's characters that get a piece of their own.
        overwrite: replace another tokenizer at ``output``; datasets made with it would no longer open.

    Raises:
        DataError: no text, more pieces asked for than the text gives, or another tokenizer at ``output``.
    """
    options = dict(vocab_size=vocab_size, model_type=model_type, character_coverage=character_coverage)
    model = _train(_Lines(documents), options)
    tokenizer = SentencePieceTokenizer(model, os.fspath(output))
    _publish(Path(output), model, overwrite)
    return tokenizer


def _train(lines: _Lines, options: dict[str, Any]) -> bytes:
    """The bytes of a model trained with ``options`` and ``_EXACT``."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, minloglevel=3, **_EXACT, **options
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        if not lines.count:
            raise DataError("no text to train a tokenizer on: every document is empty") from error
        reason = str(error).strip().rsplit("] ", 1)[-1].rstrip(".")  # after the source line it quotes
        raise DataError(
            f"SentencePiece cannot train {options['vocab_size']} pieces on {lines.count} lines ({reason});"
            " choose another vocabulary size or more text"
        ) from error
    return model.getvalue()


_LONGEST_LINE = 1 << 20
"""Bytes of the longest line that training looks at; SentencePiece skips longer ones."""

_EXACT: dict[str, Any] = dict(
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    unk_id=0,
    eos_id=1,
    bos_id=-1,
    pad_id=-1,
    eos_piece=END_OF_DOCUMENT,
    max_sentence_length=_LONGEST_LINE,
    num_threads=1,  # more threads change the model's bytes
)
"""Options that make a model exact and its bytes a function of the text alone."""


class _Lines:
    """Lines of documents, counted; remembers an error of its source, which SentencePiece would replace by its own."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.count = 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._documents:
                for line in document.splitlines():
                    if line.strip():
                        self.count += 1
                        yield line
        except BaseException as error:
            self.error = error
            raise


def _not_a_tokenizer(name: str) -> DataError:
    return DataError(
        f"{name} is neither a SentencePiece model nor a tokenizer.json; make one with tools/train_tokenizer.py"
    )


def _publish(path: Path, content: bytes, overwrite: bool) -> None:
    """Writes ``content`` to ``path`` durably and in one move, unless it is there already."""
    if path.exists() and path.read_bytes() == content:
        return
    if path.exists() and not overwrite:
        raise DataError(
            f"{path} exists and differs from the tokenizer just trained; datasets may depend on it: name"
            " another output, or add --overwrite"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
