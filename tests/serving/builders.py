"""What the serving tests build: a small tokenizer, tiny random models, and an engine that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from cert_ray.serving.boundaries import cut_at
from cert_ray.serving.engines import DEFAULT_HOOKS, Completion, Drawn, Hooks, Work
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


def save_model(
    folder: Path,
    architecture: str = "gpt_neo",
    seed: int = 0,
    window: int = 64,
    spread: float = 0.3,
    hidden_size: int = 32,
) -> str:
    """A random model of some thousand parameters, with the small tokenizer, as `folder`.

    The wider the `spread` of the weights, the farther the model is from saying every token alike.
    """
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
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=window, **ends))
    elif architecture == "codegen":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": window, "rotary_dim": 4}
        model = CodeGenForCausalLM(CodeGenConfig(**shape, **ends))
    elif architecture == "mistral":  # every layer local, and key heads shared
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": window}
        model = MistralForCausalLM(MistralConfig(**shape, **ends))
    else:
        shape = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"hidden_size": hidden_size}  # of a Llama alone
        model = LlamaForCausalLM(LlamaConfig(**shape, **ends, max_position_embeddings=window))
    for parameter in model.parameters():  # far enough from uniform that greedy has no ties
        torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


class ScriptedEngine:
    """An `Engine` that answers with given texts. A text may hold special tokens, as `<|number|>`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[str], Sequence[tuple[str, float]]],
        context_tokens: int = 512,
        infill_tokens: tuple[int, int, int] | None = None,
        *,
        takes_drafts: bool = True,
    ) -> None:
        """`script` maps the decoded prompt, special tokens shown, to the (text, mean_logprob) of the samples."""
        self.tokenizer, self.context_tokens, self.infill_tokens = tokenizer, context_tokens, infill_tokens
        self.takes_drafts = takes_drafts
        self._script = script
        self.prompts: list[str] = []
        self.requests: list[Work] = []
        self.left_undrawn = 0

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        """The samples end one by one, in order."""
        hooks.check()
        shown = self.tokenizer.decode(list(work.prompt), skip_special_tokens=False)
        self.prompts.append(shown)
        self.requests.append(work)
        script = list(self._script(shown))
        samples: list[Completion | None] = [None] * work.n
        for place in range(work.n):
            samples[place] = self._completion(*script[place % len(script)], work)
            ended = [(sample, 1) for sample in samples if sample is not None]
            if hooks.enough is not None and place + 1 < work.n and hooks.enough(ended, ()):
                self.left_undrawn += work.n - place - 1
                break
        for place, sample in enumerate(samples):
            if hooks.streams_text and sample is not None:
                middle = len(sample.text) // 2
                hooks.on_text(place, sample.text[:middle], None)
                hooks.on_text(place, sample.text[middle:], sample.finish_reason)
        return Drawn(tuple(samples), sum(len(sample.ids) for sample in samples if sample is not None))

    def _completion(self, text: str, mean_logprob: float, work: Work) -> Completion:
        self.tokenizer.encode_special_tokens = False  # here, `<|number|>` means the token
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        whole = prompt_format.decode_code(self.tokenizer, ids)
        keeps = None if work.template is None else work.template.end_in(whole, is_over=True) is not None
        return Completion(ids, cut_at(whole, work.stop), "stop", mean_logprob, keeps_to_template=keeps)
