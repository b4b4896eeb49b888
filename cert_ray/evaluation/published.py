"""Published scores, to stand beside measured ones and be marked as published. Percent, pass@k by k.

Sources: Zan et al. 2022 (arXiv:2206.06888) for every row; the authors' sample file for PyCodeGPT on PandasEval. Others
measured them, with other samples, temperatures (the best of ten) and evaluators, so they come without intervals.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """A model's scores on one benchmark as its paper gives them."""

    benchmark: str
    model: str
    pass_at_k: dict[int, float]


def _human_eval(model: str, *scores: float) -> PublishedScore:
    return PublishedScore("HumanEval", model, dict(zip((1, 10, 100), scores, strict=True)))


PUBLISHED: tuple[PublishedScore, ...] = (
    _human_eval("PyCodeGPT 110M", 8.32, 13.53, 18.3),
    _human_eval("CodeGen-mono 350M", 12.76, 23.11, 35.19),
    _human_eval("CodeParrot 110M", 3.80, 6.57, 12.78),
    _human_eval("PolyCoder 160M", 2.13, 3.35, 4.88),
    _human_eval("Codex 85M", 8.22, 12.81, 22.4),
    _human_eval("AlphaCode 89M", 4.3, 12.2, 20.0),
    _human_eval("GPT-Neo 125M", 0.75, 1.88, 2.97),
    PublishedScore("PandasEval", "PyCodeGPT 110M, the authors' sample file", {1: 6.93}),
)


def published_for(benchmark: str) -> list[PublishedScore]:
    """The published scores on `benchmark`, in the order above."""
    return [one for one in PUBLISHED if one.benchmark == benchmark]
