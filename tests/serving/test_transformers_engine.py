"""The engine: what the model alone would say, streams that depend on the request alone, and ends where they belong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cert_ray.errors import InputError, RequestError
from cert_ray.gpt_neo import FusedSelfAttention
from cert_ray.serving import packed_attention
from cert_ray.serving.engines import Completion, EngineConfig, Work
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.sketching import prompt_format
from tests.serving.builders import save_model

PROMPTS = ["import pandas as pd\n", "df = pd.DataFrame(", "def head(df, n):\n    return"]


@pytest.fixture(scope="module", params=["gpt_neo", "llama", "gpt2", "mistral", "codegen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(folder: str) -> TransformersEngine:
    return TransformersEngine(folder)


def encode(engine: TransformersEngine, text: str) -> list[int]:
    return prompt_format.encode_code(engine.tokenizer, text)


def work(engine: TransformersEngine, text: str, **changed: Any) -> Work:
    options: dict[str, Any] = {"n": 4, "max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    return Work(tuple(encode(engine, text)), **{**options, **changed})


def generate(engine: TransformersEngine, *texts: str, **changed: Any) -> list[list[Completion]]:
    with ThreadPoolExecutor(len(texts)) as pool:  # so that they share forward passes
        drawn = list(pool.map(lambda text: engine.draw(work(engine, text, **changed)), texts))
    return [[sample for sample in one.samples if sample is not None] for one in drawn]


def test_greedy_equals_transformers_greedy(engine: TransformersEngine, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for text in PROMPTS:
        ids = torch.tensor([encode(engine, text)])
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=1)
        ours = generate(engine, text, n=1, temperature=0.0, max_tokens=20)[0][0]
        theirs = [token for token in expected[0, ids.shape[1] :].tolist() if token != 0]
        assert list(ours.ids) == theirs


def test_gpt_neo_is_served_with_fused_attention(engine: TransformersEngine) -> None:
    if engine._model.config.model_type == "gpt_neo":
        kinds = {type(block.attn.attention) for block in engine._model.transformer.h}
        assert all(issubclass(kind, FusedSelfAttention) for kind in kinds)


def test_mean_logprob_is_that_of_a_full_forward_pass(engine: TransformersEngine, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = encode(engine, PROMPTS[0])
    for completion in generate(engine, PROMPTS[0])[0]:
        drawn = [*completion.ids, *([0] if completion.finish_reason == "stop" else [])]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[torch.arange(len(drawn)), drawn].mean().item()
        assert completion.mean_logprob == pytest.approx(expected, abs=1e-4)


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(engine: TransformersEngine) -> None:
    """Log-probabilities differ in their last bits, for batches of other sizes round otherwise."""
    together = generate(engine, *PROMPTS, max_tokens=30)
    for others in (generate(engine, *PROMPTS[::-1], max_tokens=30)[1], generate(engine, PROMPTS[1], max_tokens=30)[0]):
        assert [sample.ids for sample in others] == [sample.ids for sample in together[1]]
        for one, other in zip(others, together[1], strict=True):
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-4)


def test_more_samples_begin_with_the_fewer_ones(engine: TransformersEngine, folder: str) -> None:
    few = generate(engine, PROMPTS[0], n=3)[0]
    narrow = TransformersEngine(folder, EngineConfig(max_rows=2))
    assert [sample.ids for sample in generate(narrow, PROMPTS[0], n=7)[0][:3]] == [sample.ids for sample in few]


def test_samples_are_distinct_streams(engine: TransformersEngine) -> None:
    """The released code drew the same 50 samples again and again."""
    samples = generate(engine, PROMPTS[0], n=60, max_tokens=16)[0]
    assert len(samples) == 60
    assert len({sample.ids for sample in samples}) == 60


def test_another_seed_gives_another_answer(engine: TransformersEngine) -> None:
    first, again, other = (generate(engine, PROMPTS[0], seed=seed)[0] for seed in (1, 1, 2))
    assert [sample.ids for sample in first] == [sample.ids for sample in again]
    assert [sample.ids for sample in first] != [sample.ids for sample in other]


def test_samples_end_at_a_stop_string(engine: TransformersEngine) -> None:
    free = generate(engine, PROMPTS[1], n=8, max_tokens=30)[0]
    stop = next(sample.text[3:6] for sample in free if len(sample.text) > 12 and sample.text[3:6].isascii())
    cut = generate(engine, PROMPTS[1], n=8, max_tokens=30, stop=(stop,))[0]
    for whole, short in zip(free, cut, strict=True):
        assert short.text == whole.text.split(stop)[0]
        if stop in whole.text:
            assert short.finish_reason == "stop"
        if stop in whole.text and min(short.ids) >= len(prompt_format.SPECIAL_TOKENS):
            before_last = prompt_format.decode_code(engine.tokenizer, short.ids[:-1])
            assert stop not in before_last  # no token was drawn after the one that completed it


def test_an_answer_begins_with_the_blanks_asked_for(engine: TransformersEngine) -> None:
    for sample in generate(engine, "def head(df, n):\n", n=10, max_tokens=10, top_p=1.0, start="    ")[0]:
        assert prompt_format.decode_code(engine.tokenizer, sample.ids).startswith("    ")
        assert sample.text == prompt_format.decode_code(engine.tokenizer, sample.ids)[4:]


def test_an_answer_ends_with_the_window(engine: TransformersEngine) -> None:
    text = " df" * (engine.context_tokens - 5)
    length = len(encode(engine, text))
    sample = generate(engine, text, n=1, max_tokens=100, temperature=0.0)[0][0]
    assert len(sample.ids) <= engine.context_tokens - length


def test_an_empty_prompt_is_answered(engine: TransformersEngine) -> None:
    assert len(generate(engine, "", n=2)[0]) == 2


def test_a_prompt_longer_than_the_window_is_refused_with_both_lengths(engine: TransformersEngine) -> None:
    text = " df" * 200
    with pytest.raises(RequestError) as refused:
        generate(engine, text)
    assert refused.value.status == 400
    assert str(engine.context_tokens) in refused.value.message
    assert str(len(encode(engine, text))) in refused.value.message


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, folder: str) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        TransformersEngine(str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"no config\.json"):
        TransformersEngine(str(tmp_path))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="no safetensors"):
        TransformersEngine(str(tmp_path))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.add_special_tokens(["<|one_more|>"])
    tokenizer.save(f"{folder}/tokenizer.json")
    with pytest.raises(InputError, match="tokenizer has"):
        TransformersEngine(folder)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize(("factor", "dtype"), [(float("nan"), "float32"), (1e5, "float16")])
def test_a_model_whose_numbers_are_not_finite_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    dtype: Literal["float32", "float16"],
    is_packed: bool,
) -> None:
    folder = save_model(tmp_path, "llama")
    weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
    weights = {name: tensor * factor for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    if not is_packed:
        monkeypatch.setattr(packed_attention, "enable", lambda _: False)
    with pytest.raises(
        InputError, match=r"not finite\. Its weights may be damaged, or too large for .*float16"
    ) as refused:
        TransformersEngine(folder, EngineConfig(dtype=dtype))
    assert str(refused.value).startswith(folder)


def test_a_model_that_is_finite_only_by_itself_is_run_by_itself(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = packed_attention.forward

    def lost(*args: Any) -> list[torch.Tensor]:
        return [logits * torch.nan for logits in forward(*args)]

    monkeypatch.setattr(packed_attention, "forward", lost)
    engine = TransformersEngine(folder)
    assert not engine.is_packed
    assert len(generate(engine, PROMPTS[0])[0]) == 4
