"""What the serving tests build: a small tokenizer, tiny random models, and an engine that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from cert_ray.serving.boundaries import cut_at
from cert_ray.serving.engines import Completion
from cert_ray.sketching import prompt_format

TEXTS = [
    "import pandas as pd\nimport numpy as np\n\n\ndef head(df, n):\n    return df.head(n)\n",
    "df = pd.DataFrame({'a': [1, 2, 3]})\nprint(df.to_string())\nx = df['a'].astype(float)\n",
    "class Thing:\n    def __init__(self, number):\n        self.number = number\n",
]


def small_tokenizer() -> Tokenizer:
    """Byte-level BPE with the project's special tokens, trained on three snippets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in prompt_format.SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def save_model(folder: Path, architecture: str = "gpt_neo", seed: int = 0, window: int = 64) -> str:
    """A random model of some thousand parameters, with the small tokenizer, as `folder`."""
    tokenizer = small_tokenizer()
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": vocab_size}
    model: torch.nn.Module
    if architecture == "gpt_neo":
        layers = [[["global", "local"], 1]]
        shape = {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": window,
            "window_size": 8,
        }
        model = GPTNeoForCausalLM(GPTNeoConfig(**shape, **ends, attention_types=layers))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shape, **ends, max_position_embeddings=window))
    for parameter in model.parameters():  # far enough from uniform that greedy has no ties
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


class ScriptedEngine:
    """An `Engine` that answers with given texts. A text may hold special tokens, as `<|number|>`."""

    def __init__(
        self, tokenizer: Tokenizer, script: Callable[[str], Sequence[tuple[str, float]]], context_tokens: int = 512
    ) -> None:
        """`script` maps the decoded prompt, special tokens shown, to the (text, mean_logprob) of the samples."""
        self.tokenizer, self.context_tokens = tokenizer, context_tokens
        self._script = script
        self.prompts: list[str] = []
        self.requests: list[dict[str, object]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        starts: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        answers = []
        for prompt in prompts:
            shown = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
            self.prompts.append(shown)
            self.requests.append({"n": n, "stop": tuple(stop), "starts": starts})
            script = list(self._script(shown))
            answers.append([self._completion(*script[place % len(script)], stop) for place in range(n)])
        return answers

    def _completion(self, text: str, mean_logprob: float, stop: Sequence[str]) -> Completion:
        self.tokenizer.encode_special_tokens = False  # here, `<|number|>` means the token
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return Completion(ids, cut_at(prompt_format.decode_code(self.tokenizer, ids), stop), "stop", mean_logprob)
