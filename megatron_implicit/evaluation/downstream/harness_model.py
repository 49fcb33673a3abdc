"""lm-eval's view of a loaded model: loglikelihoods of continuations and texts, and generation, in batches."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_implicit.api import PretrainedModel
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import ConfigError, DataError, DivergedError
from megatron_implicit.inference.generation import TokenStream
from megatron_implicit.inference.sampling import GREEDY, Sampling
from megatron_implicit.inference.session import Mode, SolveMode
from megatron_implicit.solver import SolveTrace

T = TypeVar("T")
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class HowToSolve:
    """How texts are solved: what a call of the model takes."""

    mode: Mode = "simultaneous"
    chunk_size: Optional[int] = None
    """Tokens of a chunk in chunked mode."""
    window_size: Optional[int] = None
    """Tokens of the window in window mode."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values of the config's ``inference`` section."""

    def __post_init__(self) -> None:
        self.named()

    def named(self) -> SolveMode:
        """The mode; raises ConfigError where a size is missing or not of this mode."""
        return SolveMode.named(self.mode, self.chunk_size, self.window_size)


class SolveStatistics:
    """What the solves behind the scores took, by token."""

    def __init__(self) -> None:
        self.tokens, self.evaluations, self.unconverged = 0, 0, 0

    def add(self, trace: SolveTrace, lengths: list[int]) -> None:
        """Adds one batch, whose trace is by sample or by token (padding: converged, without evaluations)."""
        weights = torch.tensor(lengths) if trace.evaluations.ndim == 1 else torch.ones(1, dtype=torch.long)
        self.tokens += sum(lengths)
        self.evaluations += int((trace.evaluations.cpu() * weights).sum())
        self.unconverged += int((~trace.converged.cpu().bool() * weights).sum())

    def as_dict(self) -> dict[str, Any]:
        """For the results; without any solve both are None."""
        known = self.tokens > 0
        return {
            "evaluations_mean": self.evaluations / self.tokens if known else None,
            "unconverged_fraction": self.unconverged / self.tokens if known else None,
        }


class HarnessModel(TemplateLM):
    """A model that ``load_pretrained`` opened, as lm-eval's ``LM``.

    A text begins after an end of document, as texts did in training; nothing else is put before a context. What is
    longer than ``max_length`` loses its beginning. No score depends on the other texts of its batch.

    Args:
        lm: in eval mode; in a tensor-parallel job every process calls the same methods.
        tokenizer: the model's.
        how: the mode and the solver's values; generation goes on token by token in any mode.
        batch_size: texts at a time.
        max_length: most tokens of a context; None takes the sequence length of training.
        report: called with requests done and in all.

    Raises:
        ConfigError: numbers below 1, or a tokenizer with more tokens than the model.
    """

    def __init__(
        self,
        lm: PretrainedModel,
        tokenizer: Tokenizer,
        how: HowToSolve = HowToSolve(),
        batch_size: int = 8,
        max_length: Optional[int] = None,
        report: Report = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.max_length = lm.config.data.sequence_length if max_length is None else max_length
        for name, value in (("batch_size", batch_size), ("max_length", self.max_length)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if tokenizer.vocab_size > lm.config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {lm.config.model.vocab_size}: "
                "name the model's own with --tokenizer"
            )
        self.lm, self.batch_size, self.statistics = lm, batch_size, SolveStatistics()
        self._words, self._how, self._report = tokenizer, how, report  # TemplateLM.tokenizer is one of transformers

    @property
    def eot_token_id(self) -> int:
        """End of document: what a text without context follows."""
        return self._words.eod

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **_: Any) -> list[int]:
        """Ids of a text; our tokenizers add nothing to it."""
        return self._words.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the results' config."""
        return {
            "family": self.lm.config.model.family,
            "tokenizer": self._words.fingerprint,
            "max_length": self.max_length,
            **self.statistics.as_dict(),
        }

    # ------------------------------------------------------------------------------------------------- loglikelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether it is what greedy decoding gives) of each continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text; a long one in windows of ``max_length``, each token scored once."""
        windows = [
            (index, make_disjoint_window(pair))
            for index, request in enumerate(requests)
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        scores = self._loglikelihood_tokens([(("", requests[index].args[0]), *pair) for index, pair in windows])
        totals = [0.0] * len(requests)
        for (index, _), (score, _) in zip(windows, scores):
            totals[index] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of ((context, continuation), their ids); the longest texts first, so that a batch is of similar lengths."""
        for texts, context, continuation in requests:
            self._check(texts, context, continuation)
        answers: list[Optional[tuple[float, bool]]] = [None] * len(requests)
        for batch in self._batches(requests, lambda request: request[1] + request[2]):
            for index, answer in zip(batch, self._score([requests[index][1:] for index in batch])):
                answers[index] = answer
        return answers

    def _check(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> None:
        if not context or not continuation:
            raise DataError(
                f"the tokenizer gives {texts[1]!r} no token of its own after {texts[0][-40:]!r}: "
                "begin it with a space or a new word"
            )
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"max_length={self.max_length} is less than the {len(continuation)} tokens of {texts[1][:40]!r}: "
                "give a larger --max-length"
            )

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Of (context, continuation) as ids: one call of the model for all."""
        inputs = [(context + continuation)[-self.max_length - 1 : -1] for context, continuation in pairs]
        ids, lengths = _padded(inputs)
        how = self._how
        out = self.lm(
            ids, mode=how.mode, chunk_size=how.chunk_size, window_size=how.window_size, lengths=lengths,
            **how.overrides,
        )  # fmt: skip
        self.statistics.add(out.trace, lengths)
        for (_, continuation), logits, length in zip(pairs, out.logits, lengths):
            scored = logits[length - len(continuation) : length]
            targets = torch.tensor(continuation, device=scored.device)
            score = float(scored.log_softmax(-1).gather(-1, targets[:, None]).double().sum())
            if not math.isfinite(score):
                raise DivergedError("the model's logits are not finite: measure an earlier checkpoint")
            yield score, bool((scored.argmax(-1) == targets).all())

    # ----------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What each context goes on with, up to the first of its stop strings, which is left out."""
        answers: list[Optional[str]] = [None] * len(requests)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        for setting in dict.fromkeys(settings):
            wanted = normalize_gen_kwargs(json.loads(setting))
            same = [index for index, other in enumerate(settings) if other == setting]
            for batch in self._batches(same, lambda index: prompts[index]):
                indices = [same[place] for place in batch]
                for index, text in zip(indices, self._generate([prompts[index] for index in indices], wanted)):
                    answers[index] = text
        return answers

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], wanted: dict[str, Any]) -> list[str]:
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise ConfigError(
                f"max_length={self.max_length} leaves no room for a context before {wanted['max_gen_toks']} generated "
                "tokens: give a larger --max-length"
            )
        stream = TokenStream(
            self.lm.session(len(prompts), self.max_length, **self._how.overrides),
            [prompt[-room:] for prompt in prompts],
            wanted["max_gen_toks"],
            _sampling(wanted),
            stop_ids=(self.eot_token_id,),
            mode=self._how.named(),
            vocabulary=self._words.vocab_size,
        )
        stops = [stop for stop in wanted["until"] or () if stop]
        open_samples = set(range(len(prompts)))
        for step in stream:
            open_samples &= {entry.sample for entry in step}
            open_samples -= {index for index in open_samples if _contains(self._text(stream, index), stops)}
            if not open_samples:
                break
        texts = (self._text(stream, index) for index in range(len(prompts)))
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _text(self, stream: TokenStream, sample: int) -> str:
        return self._words.decode(token for token in stream.generations[sample].ids if token != self.eot_token_id)

    # -------------------------------------------------------------------------------------------------------- batches

    def _batches(self, items: Sequence[T], ids_of: Callable[[T], list[int]]) -> Iterator[list[int]]:
        """Indices of items by falling length of their ids, in an order that depends on the ids alone."""
        order = sorted(range(len(items)), key=lambda index: (-len(ids_of(items[index])), ids_of(items[index])))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield batch
            self._report(start + len(batch), len(order))


def _padded(sequences: list[list[int]]) -> tuple[Tensor, list[int]]:
    """[b, s] ids with padding at the end, and the lengths."""
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths


def _sampling(wanted: dict[str, Any]) -> Sampling:
    temperature = wanted.get("temperature") or 0.0
    if not wanted.get("do_sample") or temperature == 0:
        return GREEDY
    filters = {name: wanted[name] for name in ("top_k", "top_p", "min_p") if wanted.get(name) is not None}
    return Sampling(temperature=temperature, **filters)


def _contains(text: str, stops: list[str]) -> bool:
    return any(stop in text for stop in stops)
