"""What ``tools/generate.py`` does with its options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Optional, Protocol

import torch
from rich.console import Console
from rich.text import Text

from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import CapacityError, ConfigError, DataError
from megatron_implicit.inference.console import GenerationPrinter
from megatron_implicit.inference.generation import Generation, TokenStream
from megatron_implicit.inference.prompts import Prompt, read_prompts
from megatron_implicit.inference.sampling import Sampling
from megatron_implicit.inference.session import InferenceSession, SolveMode
from megatron_implicit.inference.text import TextModel, find_tokenizer


class LoadedModel(TextModel, Protocol):
    """What generating needs of ``api.PretrainedModel``."""

    keeps_cache: bool

    def session(self, batch: int, capacity: Optional[int] = None, **solver_overrides: Any) -> InferenceSession:
        """A batch of sequences that grow."""


class GenerateCommand:
    """A loaded model with the options of the command line.

    Args:
        lm: as ``load_pretrained`` returns it; in a job of several processes, its shards.
        arguments: options by their names in ``tools/generate.py``.

    Raises:
        ConfigError, DataError: options that do not fit the model.
    """

    def __init__(self, lm: LoadedModel, arguments: argparse.Namespace) -> None:
        self.lm, self.arguments = lm, arguments
        self.sampling = Sampling(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.seed
        )
        self.mode = SolveMode.named(arguments.prompt_mode, arguments.chunk_size, arguments.window_size)
        self.tokenizer = self._find_tokenizer()
        self.overrides = {
            name: value for name in ("max_iterations", "tolerance", "damping", "warm_start")
            if (value := getattr(arguments, name)) is not None
        }  # fmt: skip
        if arguments.cache_tokens is not None and not lm.keeps_cache:
            raise ConfigError(
                f"--cache-tokens has no meaning for {lm.config.model.family}, which has no cache: drop it"
            )
        for name in ("max_tokens", "batch_size"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
        lm.session(1, 1, **self.overrides)  # refuses what the model's solver does not take

    def run(self) -> None:
        """Generates for the prompts given, or asks for them."""
        options = self.arguments
        texts = [*options.prompt, *(read_prompts(options.prompt_file) if options.prompt_file else [])]
        if texts or options.prompt_ids:
            prompts = [Prompt.of_text(text, self.tokenizer) for text in texts]
            self.generate(prompts + [Prompt.of_ids(written, self.tokenizer) for written in options.prompt_ids])
        elif sys.stdin.isatty():
            self._ask()
        else:
            self.generate([Prompt.of_text(self._from_first_rank(sys.stdin.read), self.tokenizer)])

    def _find_tokenizer(self) -> Optional[Tokenizer]:
        """The model's; None where only ids are given and there is none."""
        given, ids_only = self.arguments.tokenizer, bool(self.arguments.prompt_ids) and not self.arguments.prompt
        try:
            return find_tokenizer(self.lm, Path(self.arguments.checkpoint), given)
        except DataError:
            if given is None and ids_only and not self.arguments.prompt_file:
                return None
            raise

    def generate(self, prompts: list[Prompt]) -> None:
        """Prints what follows each prompt."""
        self._check_cache(prompts)
        size, results = self.arguments.batch_size, []
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            stream = self._stream(batch, first)
            titles = [f"prompt {first + i + 1}" for i in range(len(batch))] if len(prompts) > 1 else []
            self._show(stream, batch, titles)
            results += stream.generations
        self._write(results)

    def _ask(self) -> None:
        """Asks for one prompt after another."""
        while (text := self._from_first_rank(_typed)) is not None:
            try:
                self.generate([Prompt.of_text(text, self.tokenizer)])
            except CapacityError as error:
                self._console().print(Text(f"error: {error}"), soft_wrap=True)

    def _check_cache(self, prompts: list[Prompt]) -> None:
        capacity = self.arguments.cache_tokens
        for number, prompt in enumerate(prompts, 1):
            if capacity is not None and len(prompt.ids) > capacity:
                raise CapacityError(needed=len(prompt.ids), capacity=capacity, what=f"prompt {number}: ")

    def _stream(self, batch: list[Prompt], first: int) -> TokenStream:
        longest = max(len(prompt.ids) for prompt in batch)
        capacity = self.arguments.cache_tokens or longest + self.arguments.max_tokens
        ends = () if self.tokenizer is None or self.arguments.ignore_end else (self.tokenizer.eod,)
        return TokenStream(
            self.lm.session(len(batch), capacity, **self.overrides),
            [prompt.ids for prompt in batch],
            self.arguments.max_tokens,
            dataclasses.replace(self.sampling, seed=self.sampling.seed + first),
            stop_ids=ends,
            mode=self.mode,
            vocabulary=self.tokenizer.vocab_size if self.tokenizer is not None else None,
        )

    def _show(self, stream: TokenStream, batch: list[Prompt], titles: list[str]) -> None:
        """One prompt is printed as it comes, of several each when the batch is done."""
        hidden = () if self.tokenizer is None else (self.tokenizer.eod,)
        printer = GenerationPrinter(
            self._console(), self.tokenizer, show_iterations=self.arguments.show_iterations, hidden=hidden
        )
        if len(batch) > 1:
            stream.finish()
        for index, prompt in enumerate(batch):
            printer.begin(prompt.text, prompt.ids, titles[index] if titles else None)
            for entry in stream.generations[index].tokens if len(batch) > 1 else (step[0] for step in stream):
                printer.token(entry)
            printer.end(stream.generations[index])
        printer.legend()

    def _console(self) -> Console:
        """Of the first rank; the others keep silent."""
        return Console(highlight=False, quiet=torch.distributed.get_rank() != 0)

    def _from_first_rank(self, read: Callable[[], Optional[str]]) -> Optional[str]:
        """What the first rank reads, on all ranks."""
        box = [read() if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _write(self, results: list[Generation]) -> None:
        if self.arguments.json is None or torch.distributed.get_rank() != 0:
            return
        entries = [
            {
                "prompt_ids": result.prompt,
                "ids": result.ids,
                "text": None if self.tokenizer is None else self.tokenizer.decode(result.ids),
                "evaluations": [entry.evaluations for entry in result.tokens],
                "converged": [entry.converged for entry in result.tokens],
                "stopped": result.stopped,
            }
            for result in results
        ]
        Path(self.arguments.json).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _typed() -> Optional[str]:
    """A line typed at a prompt; None at the end of the input."""
    try:
        return input("prompt> ")
    except EOFError:
        print()
        return None
