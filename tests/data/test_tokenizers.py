from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_implicit.errors import DataError

NASTY = [
    "",
    " ",
    "     five spaces before and after     ",
    " " * 5000,
    "\n\n \t\r\n\x0b\x0c\x00\x01\x7f\x85",
    "\u2581 the mark that stands for a space \u2581\u2581",
    "caf\u00e9, cafe\u0301, \u00a0no-break, \u200bzero width, \ufeffmark, \u2028line\u2029paragraph",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u6f22\u5b57 \u0627\u0644\u0639 \U0010ffff \ufffd",
    "<unk> <s> </s> <|endoftext|> <0x41> \u2047",
    "0123456789" * 50,
]


def random_unicode(count: int) -> list[str]:
    rng = random.Random(5)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return ["".join(map(chr, rng.choices(points, k=rng.randint(1, 60)))) for _ in range(count)]


@pytest.fixture(scope="module")
def byte_level(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json."""
    from tokenizers import ByteLevelBPETokenizer

    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(texts[:300], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save(str(path))
    return path


def test_sentencepiece_reproduces_the_whole_corpus(texts: list[str], tokenizer: Tokenizer) -> None:
    assert len(texts) > 4000
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_any_text_round_trips_and_never_holds_an_end_of_document(
    text: str, tokenizer: Tokenizer, byte_level: Path
) -> None:
    for each in (tokenizer, load_tokenizer(byte_level)):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert each.eod not in ids
        assert all(0 <= i < each.vocab_size for i in ids)


def test_random_unicode_round_trips(tokenizer: Tokenizer, byte_level: Path) -> None:
    for each in (tokenizer, load_tokenizer(byte_level)):
        for text in random_unicode(300):
            assert each.decode(each.encode(text)) == text


def test_training_is_deterministic_and_the_loaded_file_is_the_same_tokenizer(texts: list[str], tmp_path: Path) -> None:
    first = train_sentencepiece(texts[:500], tmp_path / "a.model", 600)
    second = train_sentencepiece(texts[:500], tmp_path / "elsewhere" / "b.model", 600)
    loaded = load_tokenizer(tmp_path / "a.model")
    assert first.fingerprint == second.fingerprint == loaded.fingerprint
    assert loaded.fingerprint == hashlib.sha256((tmp_path / "elsewhere" / "b.model").read_bytes()).hexdigest()
    assert first.vocab_size == loaded.vocab_size == 600
    assert train_sentencepiece(texts[:500], tmp_path / "c.model", 601).fingerprint != first.fingerprint


def test_a_tokenizer_is_not_replaced_by_another_one_unless_asked(texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    first = train_sentencepiece(texts[:500], path, 600)
    train_sentencepiece(texts[:500], path, 600)
    with pytest.raises(DataError, match="--overwrite"):
        train_sentencepiece(texts[:500], path, 700)
    assert load_tokenizer(path).fingerprint == first.fingerprint
    train_sentencepiece(texts[:500], path, 700, overwrite=True)
    assert load_tokenizer(path).vocab_size == 700
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]


def test_the_fingerprint_of_a_tokenizer_json_ignores_its_layout_but_not_its_content(
    byte_level: Path, tmp_path: Path
) -> None:
    description = json.loads(byte_level.read_text())
    spread = tmp_path / "spread.json"
    spread.write_text(json.dumps(dict(reversed(description.items())), indent=8))
    description["model"]["merges"].pop()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(description))
    fingerprint = load_tokenizer(byte_level).fingerprint
    assert load_tokenizer(spread).fingerprint == fingerprint
    assert load_tokenizer(other).fingerprint != fingerprint


@pytest.mark.parametrize(
    "content", [b"", b"not a tokenizer", b"{broken", b"{}", b'{"model": {}}', bytes(range(256)) * 50]
)
def test_a_file_that_is_no_tokenizer_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is neither"):
        load_tokenizer(path)


def test_training_without_text_or_for_too_many_pieces_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", " \n "], tmp_path / "a.model", 500)
    with pytest.raises(DataError, match="90000 pieces"):
        train_sentencepiece(["a few words only"], tmp_path / "a.model", 90000)
    assert not list(tmp_path.iterdir())
