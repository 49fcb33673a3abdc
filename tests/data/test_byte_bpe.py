"""The fast encoder against Hugging Face, id for id, with the paper's tokenizer and with small ones."""

from __future__ import annotations

import copy
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_implicit.data.byte_bpe import FastByteBPE, fast_byte_bpe
from megatron_implicit.data.neox import fetch_neox_tokenizer
from megatron_implicit.data.tokenizers import load_tokenizer
from megatron_implicit.errors import DataError

POINTS = [*range(0xD800), *range(0xE000, 0x110000)]
SAMPLES = [
    " " * 100_000,
    "x" + " " * 100_000 + "y",
    "\t" * 100_000,
    "\n \t" * 40_000,
    "a" * 100_000,
    "\u3000" * 5_000 + "x",
    "人工知能は、計算という概念と、コンピュータという道具を用いて『知能』を研究する。" * 20,
    "구글은 미국의 다국적 기업이다.\u1100\u1161\u11a8 " * 20,
    "\u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u064e\u0651\u0629 " * 20,
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\ufe0f " * 20,
    "".join(map(chr, range(0x250))),
    "cafe\u0301 \u212b \u1e9b\u0323 \u0344 \u0958 \ufb1d e\u0323\u0302 o\u0304\u0323",
    "<|endoftext|> <|padding|>  <|endoftext|>",
    "'s 't 're 've 'm 'll 'd '\u017f 'S\n's",
    "",
]


@pytest.fixture(scope="module")
def neox() -> dict[str, Any]:
    """The paper's tokenizer.json, parsed."""
    try:
        return json.loads(fetch_neox_tokenizer().read_bytes())
    except DataError as error:
        pytest.skip(str(error))


Pair = tuple[FastByteBPE, Callable[[str], list[int]]]


def encoders(description: dict[str, Any]) -> tuple[FastByteBPE | None, Callable[[str], list[int]]]:
    """(the fast encoder, Hugging Face's)."""
    slow = tokenizers.Tokenizer.from_str(json.dumps(description))
    slow.encode_special_tokens = True
    return fast_byte_bpe(description, slow), lambda text: slow.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def pair(neox: dict[str, Any]) -> Pair:
    fast, slow = encoders(neox)
    assert fast is not None
    return fast, slow


def count_equal(pair: Pair, documents: Iterable[str]) -> int:
    fast, slow = pair
    count = 0
    for count, text in enumerate(documents, start=1):
        if fast.encode(text) != slow(text):
            pytest.fail(f"document {count} differs: {ascii(text[:200])}")
    return count


def code(count: int) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:count]:
        yield path.read_text(encoding="utf-8", errors="replace")[:20_000]


def random_texts(count: int, alphabet: list[str], longest: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choices(alphabet, k=rng.randint(1, longest)))


NEAR_BOUNDARIES = [*" \n\t\r'sdlmvert1a!\x00\x1c\x85\u00a0\u2028\u3000\u0301\u00e9\u00b2\u0416\u4e2d\U0001f600", "  "]


def test_natural_text_code_and_scripts_of_the_world(pair: Pair, texts: list[str]) -> None:
    assert count_equal(pair, texts) + count_equal(pair, code(150)) + count_equal(pair, SAMPLES) > 4500


def test_random_text(pair: Pair) -> None:
    assert count_equal(pair, random_texts(4000, NEAR_BOUNDARIES, 40, seed=1)) == 4000
    assert count_equal(pair, random_texts(1000, list(map(chr, POINTS)), 60, seed=2)) == 1000


@pytest.mark.acceptance
def test_more_random_text_and_code(pair: Pair) -> None:
    count_equal(pair, random_texts(100_000, NEAR_BOUNDARIES, 60, seed=3))
    count_equal(pair, random_texts(10_000, list(map(chr, POINTS)), 100, seed=4))
    count_equal(pair, code(5000))


@pytest.mark.parametrize("template", ["{0}'s", "a{0}1 {0}  {0}\n", "e{0}\u0301{0} "])
def test_every_character_is_of_the_same_class_and_normal_form(pair: Pair, template: str) -> None:
    stop, step = 0x32000, 512  # beyond lie only ideographs, tags and what is unassigned
    points = [point for point in POINTS if point < stop]
    documents = ("".join(template.format(chr(c)) for c in points[i : i + step]) for i in range(0, len(points), step))
    count_equal(pair, documents)


def test_long_white_space_on_either_side_of_the_limit(pair: Pair) -> None:
    lengths = (4095, 4096, 8190, 8191, 8192, 8193, 20_000)
    count_equal(pair, (f"{a}{space * n}{b}" for n in lengths for space in "\t\n \u3000" for a, b in ("  ", "xy")))


def test_the_tokenizer_uses_the_fast_encoder(neox: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(neox))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.is_fast and tokenizer.vocab_size == 50277 and tokenizer.eod == 0
    assert tokenizer.decode(tokenizer.encode("  two  spaces\u00e9")) == "  two  spaces\u00e9"


@pytest.fixture(scope="module")
def small(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A byte-level tokenizer.json without normalisation or added runs of spaces."""
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(texts[:500], vocab_size=1000, special_tokens=["<|endoftext|>"], show_progress=False)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return json.loads(path.read_text())


def test_a_tokenizer_without_runs_of_spaces(small: dict[str, Any], texts: list[str]) -> None:
    pair = encoders(small)
    assert pair[0] is not None
    count_equal(pair, texts[:1000])
    count_equal(pair, random_texts(2000, NEAR_BOUNDARIES, 40, seed=5))
    count_equal(pair, SAMPLES)


def swap_two_merges(description: dict[str, Any]) -> None:
    merges = description["model"]["merges"]
    merges[0], merges[300] = merges[300], merges[0]


def add_an_unreachable_token(description: dict[str, Any]) -> None:
    """thx = t + hx, which its own text never gives: t and h are joined before."""
    model = description["model"]
    for pair in (["h", "x"], ["t", "hx"]):
        model["vocab"]["".join(pair)] = len(model["vocab"])
        model["merges"].append(pair)


@pytest.mark.parametrize(
    "change",
    [
        swap_two_merges,
        add_an_unreachable_token,
        lambda d: d["model"].update(dropout=0.1),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d.update(normalizer={"type": "NFKC"}),
        lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
        lambda d: d["added_tokens"].append(
            {"id": 5000, "content": "abc", "special": False, "normalized": True, "lstrip": False, "rstrip": False,
             "single_word": False}
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_to_be_equal_is_left_to_hugging_face(small: dict[str, Any], change: Any) -> None:
    changed = copy.deepcopy(small)
    change(changed)
    assert encoders(small)[0] is not None
    assert encoders(changed)[0] is None
