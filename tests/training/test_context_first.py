"""A model of both stages all the way in small: dataset, view, training, export, answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.answers import Route
from cert_ray.serving.sampling import Sampling
from cert_ray.tokens.encoding import PackConfig, View
from cert_ray.tokens.pack import pack_in_process
from cert_ray.tokens.vocabulary import TokenizerConfig, train_on_dataset
from cert_ray.training import worker
from tests.tokens.datasets import sketched_document, write_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
]

PROMPT = "import numpy as np\n\n\nx ="


def test_it_learns_to_sketch_and_to_fill_in(tmp_path: Path, make_config, copy_report) -> None:
    names = "abcdefghijklmnopqrstuvw"
    rows = [sketched_document(f"import numpy as np\n\n\n{name} = np.zeros(7)\n") for name in names]
    dataset, tokenizer, tokens = (str(tmp_path / name) for name in ("dataset", "tokenizer", "tokens"))
    write_dataset(dataset, [rows])
    train_on_dataset(dataset, tokenizer, TokenizerConfig(vocab_size=320), seed=0)
    pack_in_process(dataset, tokenizer, tokens, PackConfig(view=View.CONTEXT_FIRST, context_tokens=47))
    config = make_config(
        tokenizer=tokenizer, tokens=tokens, output=str(tmp_path / "model"), steps=36, warmup_steps=4, micro_batch=8,
        zero_stage=0,
    )  # fmt: skip
    worker.run(config, "digest", 0, 1, copy_report(config.output))
    answerer = Answerer.load(ModelConfig(model=config.output))
    (answer,) = answerer.answer([PROMPT], Sampling(n=2, max_tokens=16, temperature=0.0))
    assert (answer.route, answer.sketch) == (Route.GENERATOR, " np.zeros(number)")
    assert [choice.text.rstrip() for choice in answer.choices] == [" np.zeros(7)"] * 2
