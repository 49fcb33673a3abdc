"""Which class of word each token of a text belongs to, by rule and by a list of English function words."""

from __future__ import annotations

import re
from typing import Sequence

from megatron_implicit.data.tokenizers import Tokenizer

CLASSES = ("function word", "punctuation", "number", "capitalised", "other word", "inside a word")
"""``inside a word``: pieces after the first one of a word of letters, whatever its class."""

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no all both half such what which whose
    i me my mine myself we us our ours ourselves you your yours yourself yourselves thou thee thy thine ye he him his
    himself she her hers herself it its itself they them their theirs themselves who whom one ones
    and or but nor so yet for if then than because as until while although though unless since whereas whether lest
    of in on at by to from with without into unto onto upon about above below under over between among against during
    before after through throughout toward towards within out off up down near beside besides beyond behind per via
    be am is are was were been being do does did doing done doth have has had having hath hast shall should will would
    can could may might must ought art wast wert not never there here when where why how also too very
    """.split()
)
_WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]|_|\s+")


def classify(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The class of every token: that of the word in which its first character that is no space lies.

    A token of spaces alone counts as punctuation. Words at the edges of ``ids`` are judged by what is there of them.

    Args:
        tokenizer: of the ids.
        ids: consecutive tokens of a text.
    """
    ends = [len(tokenizer.decode(ids[:count])) for count in range(1, len(ids) + 1)]
    text, starts = tokenizer.decode(ids), [0, *ends[:-1]]
    spans = [match.span() for match in _WORDS.finditer(text)]
    classes, current = [], 0
    for start, end in zip(starts, ends):
        piece = text[start:end]
        position = start + len(piece) - len(piece.lstrip())
        while current < len(spans) - 1 and spans[current][1] <= position:
            current += 1
        first, last = spans[current] if spans else (position, position)
        classes.append(_class_of(text[first:last], inside=first < position))
    return classes


def _class_of(word: str, inside: bool) -> str:
    if not word or not word[0].isalnum():
        return "punctuation"
    if word[0].isdigit():
        return "number"
    if inside:
        return "inside a word"
    if word.lower() in FUNCTION_WORDS:
        return "function word"
    return "capitalised" if word[0].isupper() else "other word"
