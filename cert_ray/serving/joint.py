"""n samples of one prompt, drawn jointly: samples that begin alike are one branch, with one row of logits.

In: `Work`, and for each step the logits after each branch and its draft. Out: the next tokens of each branch that goes
on, and at the end a `Completion` for each sample. No model in here.

At a step, each sample of a branch draws its token with its own random number (`sampling.Streams`), and the branch
splits into the samples that drew alike. This equals drawing each sample by itself, but does shared computations once:
the samples are independent, the first m of n are those of n = m, and no order needs to be hidden. But logits are not
exact to the last bit: batches of other sizes round otherwise, by about 1e-7 in fp32 and 1e-2 in bf16. So a number at
the boundary between two tokens may fall the other way, which is rare in fp32 and common in bf16.

**Drafts.** After a branch's last token, more tokens may be fed that its samples may draw next. Samples that do draw a
drafted token use the logits after it, at its own step and with their own numbers; the others split off before it. So a
right draft saves forward passes, and a wrong one changes no sample.

**Templates.** A branch that follows a template (`constraints.py`) draws among the tokens that may come. It is let go
where the model gives these less than the template's `least_share`; from there on it is as free as any.

A sample ends at an end of text, at the token that completes a stop string or its template, or at its token limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from cert_ray.serving.boundaries import FirstTokens, StopWatch, cut_at, drop_start, settled
from cert_ray.serving.constraints import Course
from cert_ray.serving.drafts import Expected
from cert_ray.serving.engines import Completion, Drawn, Enough, FinishReason, TokenLogprobs, Work
from cert_ray.serving.sampling import Streams, log_totals
from cert_ray.sketching import prompt_format

Top = tuple[tuple[int, float], ...]  # likeliest tokens with their log-probabilities

_MOST_KNOWN: Final = 32  # tokens of a template fed at once; assumed
_MOST_APART: Final = 64  # tokens in a row that may leave a character incomplete; assumed: one has four bytes at most
_KEPT_STEPS: Final = 256  # branches differ in length by the drafts they drew; numbers of older steps are drawn again


@dataclass(slots=True)
class Branch:
    """Samples that have drawn the same tokens so far."""

    samples: npt.NDArray[np.int64]
    start_left: str  # blanks that they must still begin with
    course: Course | None = None  # what the template still asks for
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of `ids`, and of the end of text
    tops: tuple[Top, ...] = ()
    row: int = 0  # among the last feed's logits: that of the token before the last of `ids`
    draft: list[int] = field(default_factory=list)  # fed after the last of `ids`
    blanks: int = 0  # how many of `ids` hold only the blanks that the samples must begin with


@dataclass(slots=True)
class Drawing:
    """A branch that draws its next token from a row of the feed's logits; `ahead` was fed after that row's token."""

    branch: Branch
    row: int
    ahead: list[int]


class JointSamples:
    """The samples of one piece of work while they are drawn."""

    def __init__(
        self,
        work: Work,
        context_tokens: int,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        first_tokens: FirstTokens,
        course: Course | None = None,
        draft_tokens: int = 0,
    ) -> None:
        """`work.prompt` must leave room for one token. `course` is that of `work.template`."""
        self.work = work
        self.branches = [Branch(np.arange(work.n), work.start, course)]
        self.drawing: list[Drawing] = []  # branches still to draw at this step; when done, they move to `branches`
        self.ended: list[tuple[Completion, npt.NDArray[np.int64]]] = []
        self.drafted = self.accepted = 0
        self.is_lost = False  # the model's numbers were not finite: there are no samples
        self._room = context_tokens - len(work.prompt)
        self._markers = prompt_format.marker_ids(tokenizer) if work.code_only else ()
        self._tokenizer = tokenizer
        self._end_ids = end_ids | work.stop_token_ids
        self._first_tokens = first_tokens
        self._draft_tokens = draft_tokens
        self._expected = Expected(work.draft if draft_tokens else ())
        self._watch = StopWatch(tokenizer, work.stop, work.start)
        self._streams = Streams(work.seed, work.prompt)
        self._numbers: dict[int, npt.NDArray[np.float64]] = {}  # by step
        self._told = [0] * work.n  # characters of each sample's text that were passed on
        self._tokens = 0
        if work.max_tokens == 0:
            self.end(self.branches.pop(), ended=False)

    def guess(self, room: int, idle: int) -> int:
        """Give branches drafts of at most `room` tokens in total, of which `idle` cost little; returns how many.

        If most drafted tokens so far were not drawn, at most `idle` are guessed. Tokens in which a template leaves no
        choice are not guesses.
        """
        left = room = max(0, room)
        guesses = room if 2 * self.accepted >= self.drafted else min(room, idle)
        for branch in self.branches:
            most = max(0, min(left, self._left(branch) - 1))
            if branch.course is not None and not branch.course.is_free:
                branch.draft = list(branch.course.known[: min(most, _MOST_KNOWN)])
            else:
                branch.draft = self._expected.following(branch.ids, min(most, self._draft_tokens, guesses))
                guesses -= len(branch.draft)
            left -= len(branch.draft)
        self.drafted += room - left
        return room - left

    def _left(self, branch: Branch) -> int:
        """How many tokens may still come."""
        return min(self._room, self.work.max_tokens + branch.blanks) - len(branch.ids)

    def start_drawing(self) -> None:
        """Begin a step: the logits of the branches' tokens and drafts are there, in the order of `branches`."""
        row = 0
        for branch in self.branches:
            self.drawing.append(Drawing(branch, row, branch.draft))
            row += 1 + len(branch.draft)
        self.branches = []

    def uniforms(self) -> list[npt.NDArray[np.float64]]:
        """The numbers with which the samples of each branch in `drawing` draw their next token."""
        distinct = self.work.streams or self.work.n
        return [self._at(len(one.branch.ids))[one.branch.samples % distinct] for one in self.drawing]

    def _at(self, step: int) -> npt.NDArray[np.float64]:
        if step not in self._numbers:
            self._numbers = {kept: row for kept, row in self._numbers.items() if kept > step - _KEPT_STEPS}
            self._numbers[step] = self._streams.at(step, min(self.work.n, self.work.streams or self.work.n))
        return self._numbers[step]

    def restrict(self, logits_BV: torch.Tensor, totals_B1: torch.Tensor) -> None:
        """Rule out, in place, what the branches in `drawing` must not draw, and let branches go.

        Where a branch must begin with blanks, its row of `totals_B1` becomes the total over tokens that keep to them.
        """
        if self._markers:
            logits_BV[:, list(self._markers)] = float("-inf")
        for place, one in enumerate(self.drawing):
            branch, logits_V = one.branch, logits_BV[place]
            refused_V = self._first_tokens.refused(branch.start_left) if branch.start_left else None
            if refused_V is not None:
                logits_V.masked_fill_(refused_V.to(logits_V.device), float("-inf"))
                totals_B1[place] = log_totals(logits_V[None])[0]
            if branch.course is None or branch.course.is_free:
                continue
            assert self.work.template is not None
            refused_V = branch.course.refused.to(logits_V.device)
            share = float(torch.exp(logits_V[~refused_V].logsumexp(0) - logits_V.logsumexp(0)))  # of what may come
            if share >= self.work.template.least_share:
                logits_V.masked_fill_(refused_V, float("-inf"))
            else:
                one.branch = replace(branch, course=None)

    def take(
        self,
        tokens: Sequence[npt.NDArray[np.int64]],
        distinct: Sequence[npt.NDArray[np.int64]],
        logits: Sequence[Sequence[float]],
        logits_BV: torch.Tensor,
        totals: Sequence[float],
    ) -> None:
        """Add the drawn tokens, one array for each branch in `drawing`.

        Branches that drew what was fed after their row are in `drawing` again; the others wait in `branches`.

        Args:
            distinct: each branch's tokens, as `distinct_in_order` gives them; `logits` are theirs.
            totals: each row's `sampling.log_totals`; if one is not finite, the samples are lost.
        """
        drawing, self.drawing = self.drawing, []
        self.is_lost = self.is_lost or not all(map(math.isfinite, totals))
        if self.is_lost:
            self.branches = []
            return
        for place, (one, drawn) in enumerate(zip(drawing, tokens, strict=True)):
            branch, total = one.branch, totals[place]
            top = self._top(logits_BV[place], total)
            for token, logit in zip(distinct[place].tolist(), logits[place], strict=True):
                samples = branch.samples[drawn == token] if len(distinct[place]) > 1 else branch.samples
                child = self.grow(branch, token, samples, logit - total, top)
                if child is None:
                    continue
                child.row = one.row
                if one.ahead and one.ahead[0] == token:
                    self.accepted += 1
                    self.drawing.append(Drawing(child, one.row + 1, one.ahead[1:]))
                else:
                    self.branches.append(child)

    def _top(self, logits_V: torch.Tensor, total: float) -> Top | None:
        return None if self.work.logprobs is None else likeliest(logits_V, total, self.work.logprobs)

    def grow(
        self, branch: Branch, token: int, samples: npt.NDArray[np.int64], logprob: float, top: Top | None
    ) -> Branch | None:
        """The branch after one more token; None if that was its last."""
        logprobs = (*branch.logprobs, logprob)
        if token in self._end_ids:
            last = Branch(samples, "", branch.course, branch.ids, logprobs, branch.tops, blanks=branch.blanks)
            self.end(last, ended=True)
            return None
        tops = branch.tops if top is None else (*branch.tops, top)
        left = self._first_tokens.left_after(branch.start_left, token) if branch.start_left else None
        if left is None:  # also when no token fits the blanks
            self._tokens += len(samples)
        blanks = branch.blanks + (left is not None)
        course = None if branch.course is None else branch.course.after(token)
        child = Branch(samples, left or "", course, (*branch.ids, token), logprobs, tops, blanks=blanks)
        ended = self._watch.seen(child.ids) or self._is_whole(child)
        if not ended and self._left(child) > 0:
            return child
        self.end(child, ended=ended)
        return None

    def _is_whole(self, branch: Branch) -> bool:
        course, template = branch.course, self.work.template
        if course is None or template is None or template.is_cut or not course.is_accepting:
            return False
        if template.fixed[-1]:
            return True
        if "\n" not in self._first_tokens.text_of(branch.ids[-1]):
            return False
        text = prompt_format.decode_code(self._tokenizer, branch.ids)
        return template.end_in(text, is_over=False) is not None

    def end(self, branch: Branch, *, ended: bool) -> None:
        """Draw no more of a branch. `ended`: its last token ended it, as an end of text or of a stop string."""
        whole = prompt_format.decode_code(self._tokenizer, branch.ids)
        keeps: bool | None = None
        held = whole
        if self.work.template is not None:
            end = None if branch.course is None else self.work.template.end_in(whole, is_over=ended)
            keeps, held = end is not None, whole[:end]
            whole = whole if self.work.template.is_cut else held
        whole = drop_start(whole, self.work.start)
        text = cut_at(whole, self.work.stop)
        keeps = keeps and len(text) >= len(drop_start(held, self.work.start))
        reason: FinishReason = "stop" if ended or len(text) < len(whole) else "length"
        logprobs, told = branch.logprobs[branch.blanks :], None
        mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
        if self.work.logprobs is not None:
            start = self.work.start[len(self._tokenizer.decode(list(branch.ids[: branch.blanks]))) :]
            ids, tops = branch.ids[branch.blanks :], branch.tops[branch.blanks :]
            is_sketch, shown = not self.work.code_only, len(text)
            if is_sketch:  # as `voting.read_sketch` reads it
                spelled = drop_start(prompt_format.decode_sketch(self._tokenizer, branch.ids).text, self.work.start)
                shown = len(cut_at(spelled, self.work.stop))
            told = tell_logprobs(self._tokenizer, ids, logprobs, tops, start, shown, is_sketch=is_sketch)
        completion = Completion(branch.ids, text, reason, mean, told, keeps, branch.blanks)
        self.ended.append((completion, branch.samples))

    def leave(self, enough: Enough | None) -> None:
        """Stop drawing the unfinished samples, if `enough` says that the finished ones suffice."""
        if enough is None or not self.ended or not self.branches:
            return
        ended = [(completion, len(numbers)) for completion, numbers in self.ended]
        if enough(ended, [(branch.ids, len(branch.samples)) for branch in self.branches]):
            self.branches = []

    def settled_text(self) -> list[tuple[int, str, FinishReason | None]]:
        """New text that will stay, as (sample, text, how it ended or None). Each piece is given once."""
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
        """What was drawn; unfinished samples are None."""
        samples: list[Completion | None] = [None] * self.work.n
        for completion, numbers in self.ended:
            for number in numbers.tolist():
                samples[number] = completion
        return Drawn(tuple(samples), self._tokens, cached_tokens, prompt_logprobs)


def distinct_in_order(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each of `tokens` once, in order of first appearance."""
    distinct, first = np.unique(tokens, return_index=True)
    ordered: npt.NDArray[np.int64] = distinct[np.argsort(first)]
    return ordered


def likeliest(logits_V: torch.Tensor, total: float, count: int) -> Top:
    """The likeliest tokens with their log-probabilities."""
    if count == 0:
        return ()
    values, ids = logits_V.topk(count)
    found = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple((token, value - total) for token, value in found if value > float("-inf"))


def tell_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Top | None],
    start: str,
    characters: int,
    *,
    is_sketch: bool = False,
) -> TokenLogprobs:
    """Log-probabilities of the tokens that begin within the first `characters` of their text, not counting `start`.

    In a sketch, placeholders are reported as the words that stand for them in its text.
    """
    text = _decode(tokenizer, ids, is_sketch=is_sketch)
    dropped = len(text) - len(drop_start(text, start))
    offsets = [max(0, length - dropped) for length in _text_lengths(tokenizer, ids, is_sketch=is_sketch)]
    offsets[-1] = len(text) - dropped  # an incomplete character at the end stays as it is
    text = text[dropped:]
    kept = sum(offset < characters for offset in offsets[:-1])
    tokens = tuple(text[offsets[place] : offsets[place + 1]] for place in range(kept))
    shown: list[dict[str, float] | None] = []
    for place, token in enumerate(tokens):
        top, logprob = tops[place], logprobs[place]
        if top is None or logprob is None:
            shown.append(None)
            continue
        alternatives = {token: logprob}
        for number, value in top:
            word = _decode(tokenizer, [number], is_sketch=is_sketch)
            alternatives.setdefault(word or tokenizer.decode([number], skip_special_tokens=False), value)
        shown.append(alternatives)
    return TokenLogprobs(tokens, tuple(logprobs[:kept]), tuple(shown), tuple(offsets[:kept]))


def _decode(tokenizer: Tokenizer, ids: Sequence[int], *, is_sketch: bool) -> str:
    if is_sketch:
        return prompt_format.decode_sketch(tokenizer, ids).text
    return prompt_format.decode_code(tokenizer, ids)


def _text_lengths(tokenizer: Tokenizer, ids: Sequence[int], *, is_sketch: bool) -> list[int]:
    """Lengths of the text of the first 0, 1, 2, ... tokens, counting only characters that no further token changes.

    Each time only the end is decoded, together with the tokens before it, since a decoder may let it depend on those.
    Decoding all beginnings of 8,000 tokens took 13 s, during which nobody's tokens were drawn.
    """
    lengths = [0]
    first = read = 0  # where the decoded end begins, and up to where no further token changes it
    before = shown = 0  # characters of the first `read` tokens, and of those from `first` to `read`
    for count in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[first:count], is_sketch=is_sketch)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        lengths.append(max(lengths[-1], before + len(whole) - shown))
        if whole == text or count - read >= _MOST_APART:
            before, first, read = before + len(text) - shown, read, count
            shown = len(_decode(tokenizer, ids[first:read], is_sketch=is_sketch))
    return lengths
