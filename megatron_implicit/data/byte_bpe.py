"""A fast exact encoder for byte-level BPE tokenizers (GPT-2's family, GPT-NeoX among them), with tiktoken.

Hugging Face's encoder spends most of its time on offsets that pretraining never reads. tiktoken has none, but another
regular expression engine, no normalisation and another merge rule. This module accepts a tokenizer only where the two
agree on every text, and here is why they do:

- *Normalisation* is Unicode's NFC or none. Text that Python calls normalised is left alone; other text goes through
  Hugging Face's own normaliser.
- *Splitting* follows GPT-2's expression. Its classes (letters, numbers, white space) are read out of Hugging Face's own
  regular expression engine, code point by code point, and spelled out for tiktoken's. So the two engines may know
  different editions of Unicode.
- *Runs of spaces* that are added tokens (GPT-NeoX has those of 2 to 24) are cut out of the text before anything else.
  Here they are an alternative of the expression, and white space otherwise never reaches over two spaces.
- *Merges*: Hugging Face joins listed pairs by the order of the list, tiktoken any pair whose joined bytes are a token,
  by the token's id. Ids must ascend with the list, so the order is the same. And every token must encode to itself:
  take two neighbours L, R that tiktoken would join into a token T. Nothing was joined across the ends of LR, so within
  it the same happened as when T is encoded alone. That passes through one state of two parts, from which a listed
  merge leads to T; L, R is that state, so the pair is listed.
- *Long white space*, on which tiktoken's backtracking fails, goes to Hugging Face.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

_WINDOW = 4096
"""Characters of a window; where one is all white space, Hugging Face encodes the text."""

_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that a vocabulary may lack."""

_EXPRESSION = r"'s|'t|'re|'ve|'m|'ll|'d{runs}| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|{space}+(?![^{S}])|{space}+"
"""GPT-2's, with classes L (letters), N (numbers), S (white space)."""


class FastByteBPE:
    """Encodes as ``tokenizer.encode(text, add_special_tokens=False)`` does, with special tokens taken as text.

    Made by ``fast_byte_bpe``.
    """

    def __init__(self, tokenizer: HFTokenizer, ranks: dict[bytes, int], longest_run: int, normalizes: bool) -> None:
        import tiktoken

        self._slow = tokenizer
        self._normalizer = tokenizer.normalizer if normalizes else None
        expression = _expression(longest_run)
        self._encode = tiktoken.Encoding(
            "byte_bpe", pat_str=expression, mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        if _has_long_whitespace(text):
            return self._slow.encode(text, add_special_tokens=False).ids
        if self._normalizer is not None and not unicodedata.is_normalized("NFC", text):
            text = self._normalizer.normalize_str(text)
        return self._encode(text)


def fast_byte_bpe(description: dict[str, Any], tokenizer: HFTokenizer) -> Optional[FastByteBPE]:
    """The fast encoder of a tokenizer.json, or None where it is of another kind or equality cannot be shown.

    Args:
        description: the parsed file.
        tokenizer: made from it, with ``encode_special_tokens`` set.
    """
    longest_run = _longest_run_of_spaces(description.get("added_tokens") or [])
    if longest_run is None or not _is_plain_byte_level(description):
        return None
    ranks = _ranks(description["model"])
    if ranks is None or not _every_token_encodes_to_itself(description["model"], tokenizer):
        return None
    for length in range(2, longest_run + 1):
        ranks[b" " * length] = tokenizer.token_to_id(" " * length)
    return FastByteBPE(tokenizer, ranks, longest_run, description.get("normalizer") is not None)


def _is_plain_byte_level(description: dict[str, Any]) -> bool:
    model, splitter = description.get("model") or {}, description.get("pre_tokenizer") or {}
    normalizer = description.get("normalizer") or {"type": "NFC"}
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(option) for option in options)
        and normalizer == {"type": "NFC"}
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space", True)
        and splitter.get("use_regex", True)
    )


def _longest_run_of_spaces(added_tokens: list[dict[str, Any]]) -> Optional[int]:
    """n where the added tokens that are not special are the runs of 2 to n spaces; 1 without any; None for others."""
    ordinary = [token for token in added_tokens if not token.get("special")]
    exact = all(
        token.get("normalized") and not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
        for token in ordinary
    )
    contents = sorted((token["content"] for token in ordinary), key=len)
    if exact and contents == [" " * length for length in range(2, len(contents) + 2)]:
        return len(contents) + 1
    return None


def _ranks(model: dict[str, Any]) -> Optional[dict[bytes, int]]:
    """Id of every byte and merged token, or None where a byte has none or ids do not ascend with the merges."""
    alphabet, vocabulary = _byte_letters(), model["vocab"]
    letters = [letter for letter, byte in alphabet.items() if byte not in _NEVER_IN_UTF8]
    tokens = [*letters, *_merged_tokens(model)]
    ids = [vocabulary.get(token, -1) for token in tokens]
    ascending = ids[len(letters) :]
    if -1 in ids or any(a >= b for a, b in zip(ascending, ascending[1:])) or len(set(ids)) != len(ids):
        return None
    return {bytes(alphabet[letter] for letter in token): i for token, i in zip(tokens, ids)}


def _merged_tokens(model: dict[str, Any]) -> list[str]:
    return ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _byte_letters() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _every_token_encodes_to_itself(model: dict[str, Any], tokenizer: HFTokenizer) -> bool:
    encode = tokenizer.model.tokenize
    return all([part.value for part in encode(token)] == [token] for token in _merged_tokens(model))


def _expression(longest_run: int) -> str:
    classes = {name: _character_class(rest) for name, rest in (("L", r"\P{L}+"), ("N", r"\P{N}+"), ("S", r"\S+"))}
    runs, space = "", f"[{classes['S']}]"
    if longest_run > 1:
        runs, space = f"| {{2,{longest_run}}}", f"(?: (?! )|[{classes['S']}&&[^ ]])"
    return _EXPRESSION.format(runs=runs, space=space, **classes)


def _character_class(rest: str) -> str:
    """The code points that the expression ``rest`` of Hugging Face's engine leaves over, as ranges in tiktoken's."""
    from tokenizers import Regex, normalizers

    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    ranges: list[list[int]] = []
    for point in map(ord, normalizers.Replace(Regex(rest), "").normalize_str(everything)):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges)


def _has_long_whitespace(text: str) -> bool:
    """True where a run of white space of twice the window exists; may be true for half of that, and is cheap."""
    return any(text[start : start + _WINDOW].isspace() for start in range(0, len(text) - _WINDOW + 1, _WINDOW))
