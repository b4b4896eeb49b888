r"""Where an answer begins and ends: stop strings, and blanks at the end of a prompt.

In: token numbers, a tokenizer, strings. Out: cut text, and which tokens may come first. No model in here.

A prompt that ends in blanks (`return `, an indent, a line break) is a trap for byte-level BPE. In training text, blanks
belong to the token after them (` df`, or `\n   ` before ` return`), so a model given the lone blank is off its
distribution; after a lone line break it goes on in the first column. So the blanks are cut from the prompt, the answer
is made to begin with them, token by token, and then they are removed from the answer. They do not count as drawn
tokens, and stop strings are not looked for in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from tokenizers import Tokenizer

# The paper, Inference 4: a completion is cut at the first of these.
PAPER_STOPS: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")

# A stop string may begin inside a token, so this many tokens more than its bytes are decoded. Assumed: no UTF-8
# character spreads over more than four tokens.
_TAIL_SLACK_TOKENS = 4

_BLANKS = " \t\r\n"
# Most blanks at a prompt's end that are drawn again: the last ones. Assumed: a blank line and a deep indent.
_MOST_BLANKS = 64


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Offset of the first stop string in `text`, or None."""
    found = [offset for offset in (text.find(stop) for stop in stops if stop) if offset >= 0]
    return min(found) if found else None


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string, which is not included."""
    return text[: first_stop(text, stops)]


def split_trailing_blanks(prompt: str) -> tuple[str, str]:
    """`prompt` without the spaces, tabs and line breaks at its end (at most 64 of them), and those blanks."""
    size = len(prompt.rstrip(_BLANKS))
    most = len(prompt) - _MOST_BLANKS
    if size < most:  # cut where a line begins, if there is such a place
        size = max(most, prompt.find("\n", most))
    return prompt[:size], prompt[size:]


def drop_start(text: str, start: str) -> str:
    """`text` without `start`. It must begin with `start`, or be the beginning of it."""
    return text[len(start) :] if text.startswith(start) else text.removeprefix(text if start.startswith(text) else "")


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing `text` that stays, even if more text completes a stop string or a character."""
    text = cut_at(text, stops).rstrip("\N{REPLACEMENT CHARACTER}")
    longest = max(map(len, stops), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return text[:-size]
    return text


class StopWatch:
    """Notices a stop string as soon as its last token is there, by decoding only the last few tokens."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], start: str = "") -> None:
        """`start` is what all texts begin with; it is not searched."""
        self._tokenizer = tokenizer
        self._start = start
        self._stops = tuple(stop for stop in stops if stop)
        longest_bytes = max((len(stop.encode()) for stop in self._stops), default=0)
        self._tail_tokens = longest_bytes + _TAIL_SLACK_TOKENS
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)

    def seen(self, ids: Sequence[int]) -> bool:
        """Whether a stop string ends within the last tokens of `ids`."""
        if not self._stops:
            return False
        first = max(0, len(ids) - self._tail_tokens)
        # Text on both sides of a placeholder must not join into a stop string; the text before it was searched earlier.
        special = [place for place, token in enumerate(ids[first:], first) if token in self._special_ids]
        first = special[-1] + 1 if special else first
        text = self._tokenizer.decode(list(ids[first:]))
        if first < len(self._start):  # each token has at least one character, so these may begin in the start
            text = drop_start(text, self._start[len(self._tokenizer.decode(list(ids[:first]))) :])
        return first_stop(text, self._stops) is not None


class FirstTokens:
    """Which tokens may come next while an answer must still begin with some blanks."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is that of the model, which may be padded beyond the tokenizer's."""
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        self._texts = tuple(tokenizer.decode([token], skip_special_tokens=True) for token in range(known))
        self._vocab_size = vocab_size
        self._refused = lru_cache(maxsize=64)(self._find_refused)

    def text_of(self, token: int) -> str:
        """The text of one token; empty for special tokens and for ids that the tokenizer does not know."""
        return self._texts[token] if token < len(self._texts) else ""

    def left_after(self, start: str, token: int) -> str | None:
        """The rest of the blanks `start` after `token`; None if `token` is not part of them."""
        text = self.text_of(token)
        return start[len(text) :] if text and start.startswith(text) else None

    def refused(self, start: str) -> torch.Tensor | None:
        """Tokens that cannot begin an answer starting with the blanks `start`, bool [V]; None if that would be all."""
        return self._refused(start)

    @cached_property
    def _by_blanks(self) -> dict[str, tuple[list[int], list[int]]]:
        """For each run of blanks that tokens begin with: the tokens that are only that run, and the others."""
        found: dict[str, tuple[list[int], list[int]]] = {}
        for token, text in enumerate(self._texts[: self._vocab_size]):
            blanks = text[: len(text) - len(text.lstrip(_BLANKS))]
            if blanks:
                found.setdefault(blanks, ([], []))[blanks != text].append(token)
        return found

    def _find_refused(self, start: str) -> torch.Tensor | None:
        refused_V = torch.ones(self._vocab_size, dtype=torch.bool)
        for blanks, (alone, others) in self._by_blanks.items():
            if blanks.startswith(start):
                refused_V[[*alone, *others]] = False
            elif start.startswith(blanks):
                refused_V[alone] = False
        return None if bool(refused_V.all()) else refused_V
