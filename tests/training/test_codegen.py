"""CodeGen, the paper's second base, all the way in small: warm start, training steps, export, loading, serving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.engines import Work
from cert_ray.serving.sampling import Sampling
from cert_ray.sketching import Placeholder
from cert_ray.sketching.prompt_format import encode_pair
from cert_ray.tokens.vocabulary import adopt_tokenizer, load_tokenizer
from cert_ray.training import worker
from tests.training.conftest import write_pack
from tests.training.test_warm_start import codegen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
]


def test_codegen_goes_from_warm_start_to_an_answer(tmp_path: Path, make_config, copy_report) -> None:
    base = codegen(tmp_path / "base")
    adopt_tokenizer(base, str(tmp_path / "tokenizer"), 32)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    write_pack(tmp_path / "pack", tokenizer)
    config = make_config(
        base=base, tokenizer=str(tmp_path / "tokenizer"), tokens=str(tmp_path / "pack"), output=str(tmp_path / "model"),
        steps=4, warmup_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    outcome = worker.run(config, "digest", 0, 1, copy_report(config.output))
    assert outcome.records[-1].loss < outcome.records[0].loss
    exported = AutoModelForCausalLM.from_pretrained(config.output, use_safetensors=True)
    assert type(exported).__name__ == "CodeGenForCausalLM"
    assert exported.get_input_embeddings().num_embeddings >= tokenizer.get_vocab_size()
    prompt = encode_pair(tokenizer, "x = number", [Placeholder(4, 10, "number")], "x = ")
    with torch.no_grad():
        expected = exported.eval()(torch.tensor([prompt])).logits[0, -1].argmax().item()
    answerer = Answerer.load(ModelConfig(sketcher=config.output, generator=config.output))
    drawn = answerer._generator.draw(Work(prompt=tuple(prompt), max_tokens=1, temperature=0.0))
    assert drawn.samples[0] is not None
    assert drawn.samples[0].ids in ((expected,), ())  # () where it is the end of text
    (answer,) = answerer.answer(["x = "], Sampling(n=2, max_tokens=4, temperature=0.5))
    assert len(answer.choices) == 2
