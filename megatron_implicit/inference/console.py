"""Generated text on a terminal, as it comes; tokens coloured by the evaluations they took."""

from __future__ import annotations

import bisect
import statistics
from typing import Optional, Sequence

from rich.console import Console
from rich.text import Text

from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.inference.generation import GeneratedToken, Generation
from megatron_implicit.inference.text import TextStream

_BOUNDS = (1, 3, 5, 7, 11, 23)
"""Most evaluations of each colour but the last: language needs 4 to 9 mostly, with a tail to 13 and beyond."""
_STYLES = ("grey62", "color(33)", "color(43)", "color(76)", "color(220)", "color(208)", "bold color(196)")
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
ENDINGS = {"end": "end of text", "length": "most tokens", "cache": "the cache is full"}
"""Words for ``Generation.stopped``."""


class GenerationPrinter:
    """Prints prompts and what is generated after them.

    Args:
        console: where to.
        tokenizer: None prints ids.
        show_iterations: colour tokens by evaluations; where there are no colours, a number after each says them.
        hidden: ids that are not printed (the end of a text).
    """

    def __init__(
        self, console: Console, tokenizer: Optional[Tokenizer], *, show_iterations: bool, hidden: Sequence[int]
    ) -> None:
        self._console, self._tokenizer = console, tokenizer
        self._show_iterations, self._hidden = show_iterations, frozenset(hidden)
        self._stream: Optional[TextStream] = None
        self._most = 0

    def begin(self, prompt: str, ids: list[int], title: Optional[str] = None) -> None:
        """Prints a prompt, under a title where there are several."""
        if title is not None:
            self._console.print(Text(f"── {title} ──", style="dim"))
        self._console.print(Text(prompt, style="dim" if self._show_iterations else ""), end="", soft_wrap=True)
        self._stream = TextStream(self._tokenizer, ids) if self._tokenizer is not None else None
        self._most = 0

    def token(self, entry: GeneratedToken) -> None:
        """Prints a token, or keeps it until its character is whole."""
        if entry.token in self._hidden:
            return
        self._most = max(self._most, entry.evaluations)  # of all tokens that make up a character
        self._print(f"{entry.token} " if self._stream is None else self._stream.push(entry.token))

    def end(self, generation: Generation) -> None:
        """Ends the text; with ``show_iterations`` says what it took."""
        self._print(self._stream.flush() if self._stream is not None else "")
        self._console.print()
        if self._show_iterations and generation.tokens:
            self._console.print(Text(summary(generation), style="dim"), soft_wrap=True)

    def legend(self) -> None:
        """Says what the colours mean."""
        if not self._show_iterations or self._console.color_system is None:
            return
        line = Text().append("evaluations a token: ", style="dim")
        lows = [1, *(bound + 1 for bound in _BOUNDS)]
        for low, high, style in zip(lows, _BOUNDS, _STYLES):
            line.append(f"{low} " if low == high else f"{low}–{high} ", style=style)
        line.append(f"{lows[-1]}+", style=_STYLES[-1])
        self._console.print(line, soft_wrap=True)

    def _print(self, text: str) -> None:
        if not text:
            return
        style, mark = "", ""
        if self._show_iterations and self._console.color_system is not None:
            style = style_of(self._most)
        elif self._show_iterations:
            mark = str(self._most).translate(_SUPERSCRIPTS)
        seen = len(text.rstrip()) if mark else len(text)
        self._console.print(Text(text[:seen] + mark + text[seen:], style=style), end="", soft_wrap=True)
        self._console.file.flush()
        self._most = 0


def style_of(evaluations: int) -> str:
    """The colour of a token, from grey and blue (few) to red (many)."""
    return _STYLES[bisect.bisect_left(_BOUNDS, evaluations)]


def summary(generation: Generation) -> str:
    """One line: tokens, evaluations, what did not converge, why it stopped."""
    counts = [entry.evaluations for entry in generation.tokens]
    unconverged = sum(not entry.converged for entry in generation.tokens)
    parts = [
        f"{len(counts)} tokens",
        f"evaluations a token: mean {statistics.mean(counts):.1f}, maximum {max(counts)}",
        *([f"{unconverged} not converged"] if unconverged else []),
        *([f"stopped: {ENDINGS[generation.stopped]}"] if generation.stopped else []),
    ]
    return " · ".join(parts)
