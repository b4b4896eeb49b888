"""n samples of one prompt, drawn jointly: samples that begin alike are one branch, with one row of logits.

In: `Work`, and for each step the logits after each branch. Out: the next token of each branch that goes on, and at the
end a `Completion` for each sample. No model in here.

At a step each sample of a branch draws its token with its own random number (`sampling.Streams`), and the branch splits
into those that drew alike. That is drawing each sample by itself, with the shared computations done once: the samples
are independent, the first m of n are those of n = m, and no order needs to be hidden. Where logits are not exact to
the last bit (batches of other sizes round otherwise: about 1e-7 in fp32, 1e-2 in bf16), a number that falls on the
boundary between two tokens may go the other way, which is rare in fp32 and is not in bf16.

A sample ends at an end of text, at the token that completes a stop string, or at the last token it may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from cert_ray.serving.boundaries import FirstTokens, StopWatch, cut_at, drop_start, settled
from cert_ray.serving.engines import Completion, Drawn, FinishReason, TokenLogprobs, Work
from cert_ray.serving.sampling import Streams
from cert_ray.sketching import prompt_format

Top = tuple[tuple[int, float], ...]  # likeliest tokens with their log-probabilities


@dataclass(slots=True)
class Branch:
    """Samples that have drawn the same tokens so far."""

    samples: npt.NDArray[np.int64]
    start_left: str  # blanks that they must still begin with
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of `ids`, and of the end of text
    tops: tuple[Top, ...] = ()


class JointSamples:
    """The samples of one piece of work while they are drawn."""

    def __init__(
        self, work: Work, context_tokens: int, tokenizer: Tokenizer, end_ids: frozenset[int], first_tokens: FirstTokens
    ) -> None:
        """`work.prompt` must leave room for one token."""
        self.work = work
        self.branches = [Branch(np.arange(work.n), work.start)]
        self.ended: list[tuple[Completion, npt.NDArray[np.int64]]] = []
        self._steps = min(work.max_tokens, context_tokens - len(work.prompt))
        self._step = 0
        self._tokenizer = tokenizer
        self._end_ids = end_ids | work.stop_token_ids
        self._first_tokens = first_tokens
        self._watch = StopWatch(tokenizer, work.stop, work.start)
        self._streams = Streams(work.seed, work.prompt)
        self._told = [0] * work.n  # characters of each sample's text that were told
        self._tokens = 0
        if self._steps == 0:
            self._end(self.branches.pop(), ended=False)

    def uniforms(self) -> list[npt.NDArray[np.float64]]:
        """The numbers with which the samples of each branch draw their next token."""
        distinct = self.work.streams or self.work.n
        uniform_N = self._streams.at(self._step, min(self.work.n, distinct))
        return [uniform_N[branch.samples % distinct] for branch in self.branches]

    def refused(self) -> list[torch.Tensor | None]:
        """For each branch the tokens that would break the blanks that it must begin with, bool [V]."""
        return [
            self._first_tokens.refused(branch.start_left) if branch.start_left else None for branch in self.branches
        ]

    def take(
        self, tokens: Sequence[npt.NDArray[np.int64]], logits_BV: torch.Tensor, totals_B1: torch.Tensor
    ) -> tuple[list[int], list[int], bool]:
        """Add the drawn tokens, one array per branch. The next tokens, their branches before, and whether any ended.

        Both tensors are row by row for the branches; `totals_B1` are the logits' `sampling.log_totals`.
        """
        self._step += 1
        grown: list[Branch] = []
        parents: list[int] = []
        ended_before = len(self.ended)
        for place, (branch, drawn) in enumerate(zip(self.branches, tokens, strict=True)):
            logits_V, total = logits_BV[place], float(totals_B1[place])
            top = self._top(logits_V, total)
            distinct, first = np.unique(drawn, return_index=True)
            for token in distinct[np.argsort(first)].tolist():
                samples = branch.samples[drawn == token] if len(distinct) > 1 else branch.samples
                child = self._grow(branch, token, samples, float(logits_V[token]) - total, top)
                if child is not None:
                    grown.append(child)
                    parents.append(place)
        self.branches = grown
        return [branch.ids[-1] for branch in grown], parents, len(self.ended) > ended_before

    def _top(self, logits_V: torch.Tensor, total: float) -> Top | None:
        return None if self.work.logprobs is None else likeliest(logits_V, total, self.work.logprobs)

    def _grow(
        self, branch: Branch, token: int, samples: npt.NDArray[np.int64], logprob: float, top: Top | None
    ) -> Branch | None:
        """The branch after one more token; None when that was its last."""
        logprobs = (*branch.logprobs, logprob)
        if token in self._end_ids:
            self._end(Branch(samples, "", branch.ids, logprobs, branch.tops), ended=True)
            return None
        self._tokens += len(samples)
        tops = branch.tops if top is None else (*branch.tops, top)
        start_left = branch.start_left
        if start_left:
            start_left = start_left[len(self._first_tokens.text_of(token)) :]
        child = Branch(samples, start_left, (*branch.ids, token), logprobs, tops)
        ended = self._watch.seen(child.ids)
        if not ended and self._step < self._steps:
            return child
        self._end(child, ended=ended)
        return None

    def _end(self, branch: Branch, *, ended: bool) -> None:
        whole = drop_start(prompt_format.decode_code(self._tokenizer, branch.ids), self.work.start)
        text = cut_at(whole, self.work.stop)
        reason: FinishReason = "stop" if ended or len(text) < len(whole) else "length"
        mean = sum(branch.logprobs) / len(branch.logprobs) if branch.logprobs else 0.0
        told = None
        if self.work.logprobs is not None:
            told = tell_logprobs(self._tokenizer, branch.ids, branch.logprobs, branch.tops, self.work.start, len(text))
        self.ended.append((Completion(branch.ids, text, reason, mean, told), branch.samples))

    def settled_text(self) -> list[tuple[int, str, FinishReason | None]]:
        """Sample, text that was not told yet and will stay, and how it ended if it did; each is told once."""
        news: list[tuple[int, str, FinishReason | None]] = []
        for branch in self.branches:
            text = drop_start(prompt_format.decode_code(self._tokenizer, branch.ids), self.work.start)
            shown = "" if branch.start_left else settled(text, self.work.stop)
            for sample in branch.samples.tolist():
                if len(shown) > self._told[sample] >= 0:
                    news.append((sample, shown[self._told[sample] :], None))
                    self._told[sample] = len(shown)
        for completion, samples in self.ended:
            for sample in samples.tolist():
                if self._told[sample] >= 0:
                    news.append((sample, completion.text[self._told[sample] :], completion.finish_reason))
                    self._told[sample] = -1
        return news

    def finish(self, cached_tokens: int, prompt_logprobs: TokenLogprobs | None) -> Drawn:
        """What was drawn; samples that have not ended are None."""
        samples: list[Completion | None] = [None] * self.work.n
        for completion, numbers in self.ended:
            for number in numbers.tolist():
                samples[number] = completion
        return Drawn(tuple(samples), self._tokens, cached_tokens, prompt_logprobs)


def likeliest(logits_V: torch.Tensor, total: float, count: int) -> Top:
    """The likeliest tokens with their log-probabilities."""
    if count == 0:
        return ()
    values, ids = logits_V.topk(count)
    return tuple((token, value - total) for token, value in zip(ids.tolist(), values.tolist(), strict=True))


def tell_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Top | None],
    start: str,
    characters: int,
) -> TokenLogprobs:
    """Log-probabilities of the tokens in which the first `characters` of their text, `start` apart, begin."""
    texts, offsets = [], []
    for count in range(len(ids) + 1):
        text = prompt_format.decode_code(tokenizer, ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(drop_start(text, start))
        offsets.append(len(texts[-1]))
    kept = sum(offset < characters for offset in offsets[:-1])
    tokens = tuple(texts[place + 1][offsets[place] :] for place in range(kept))
    shown: list[dict[str, float] | None] = []
    for place, token in enumerate(tokens):
        top, logprob = tops[place], logprobs[place]
        if top is None or logprob is None:
            shown.append(None)
            continue
        alternatives = {token: logprob}
        for number, value in top:
            alternatives.setdefault(tokenizer.decode([number], skip_special_tokens=False), value)
        shown.append(alternatives)
    return TokenLogprobs(tokens, tuple(logprobs[:kept]), tuple(shown), tuple(offsets[:kept]))
