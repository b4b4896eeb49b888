"""Other runtimes, where they are installed, give an export's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.tokens.vocabulary import save_tokenizer
from cert_ray.training.presets import preset_config
from tests.serving.builders import small_tokenizer


def test_ctranslate2_gives_the_logits_of_a_llama_export(tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = preset_config("modern-tiny", tokenizer.get_vocab_size(), 128, 0, 1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, str(tmp_path / "model"), 128)
    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "model"))
    converted = converter.convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
    ids = tokenizer.encode("import numpy as np\nx = np.zeros(3)\n").ids
    found = np.array(generator.forward_batch([[tokenizer.id_to_token(number) for number in ids]]))[0]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-4)
