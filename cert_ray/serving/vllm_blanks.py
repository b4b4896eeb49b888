"""Makes vLLM's answers to a prompt that ended in blanks begin with them. Imported by vLLM's processes only.

In: vLLM's configuration, and each request's `extra_args`. Out: logits without the tokens that cannot begin such an
answer (`boundaries.py` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from cert_ray.serving.boundaries import FirstTokens
from cert_ray.serving.vllm_engine import START


class StartsWithBlanks(AdapterLogitsProcessor):  # type: ignore[misc]
    """Rules out tokens that cannot continue a text that must begin with given blanks."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        model = vllm_config.model_config
        tokenizer = Tokenizer.from_file(str(Path(model.tokenizer) / "tokenizer.json"))
        self._first_tokens = FirstTokens(tokenizer, model.get_vocab_size())

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may be ruled out."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """What restricts one request; None if its prompt did not end in blanks."""
        start = (params.extra_args or {}).get(START)
        return partial(self._restrict, start) if start else None

    def _restrict(self, start: str, drawn: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        left = start
        for token in drawn:
            left = self._first_tokens.left_after(left, token) or ""
            if not left:
                return logits_V
        refused_V = self._first_tokens.refused(left)
        return logits_V if refused_V is None else logits_V.masked_fill(refused_V.to(logits_V.device), float("-inf"))
