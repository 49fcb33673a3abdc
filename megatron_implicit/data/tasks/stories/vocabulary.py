"""Words as tokens: one entry a word, padding and the end of a story before them."""

from __future__ import annotations

from typing import Iterable, Sequence

from megatron_implicit.errors import DataError

PAD, END, QUESTION, STOP = "<pad>", "<eos>", "?", "."
PAD_ID, END_ID = 0, 1


class Vocabulary:
    """Words and their numbers.

    Args:
        words: without padding and end of story; repeated ones count once, in the order of their first appearance.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys((PAD, END, *words)))
        self._ids = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """The number of a word.

        Raises:
            DataError: the word is unknown.
        """
        if word not in self._ids:
            raise DataError(f"the stories' vocabulary of {len(self):,} words does not hold {word!r}")
        return self._ids[word]

    def encode(self, text: str) -> list[int]:
        """Numbers of words between spaces."""
        return [self.id(word) for word in text.split()]

    def text(self, ids: Sequence[int]) -> str:
        """The words with spaces between them."""
        return " ".join(self.words[number] for number in ids)
