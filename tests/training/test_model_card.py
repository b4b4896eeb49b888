"""The card: metadata that the hub's own parser reads, what is known and nothing else, and no clock."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from cert_ray import manifests
from cert_ray.training.model_card import ModelFacts, Score, losses_of, render_card, run_facts
from cert_ray.training.records import StepRecord

FULL: dict[str, Any] = {
    "name": "sketcher",
    "base": "org/some-base",
    "base_is_hub_id": True,
    "licence": "apache-2.0",
    "dequantised_from": "Q4_1",
    "architecture": "LlamaForCausalLM",
    "parameters": 134_515_008,
    "context_tokens": 512,
    "vocab_size": 49_168,
    "view": "sketcher",
    "libraries": ("pandas", "numpy"),
    "dataset": {"read": 1000, "kept": 800},
    "dropped": {"near_duplicate": 200},
    "documents": 600,
    "view_tokens": 123_456,
    "recipe": {"steps": 10, "learning_rate": 0.0003},
    "steps": 10,
    "tokens": 20_480,
    "losses": ((2048, 2.5, None), (20_480, 2.0, 2.1)),
    "unigram_nats": 5.3,
}


def score(**more: Any) -> Score:
    options: dict[str, Any] = {"benchmark": "PandasEval", "system": "model", "mode": "greedy", "k": 1, "value": 0.0693}
    return Score(**{**options, "problems": 101, **more})


def test_the_hubs_parser_reads_the_metadata() -> None:
    card = ModelCard(render_card(ModelFacts(**FULL, scores=(score(),))))
    metadata = card.data.to_dict()
    assert metadata["license"] == "apache-2.0"
    assert metadata["base_model"] == "org/some-base"
    assert metadata["library_name"] == "transformers"
    assert {"sketcher", "pandas", "numpy", "python"} <= set(metadata["tags"])
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("PandasEval", "pass@1", 0.0693)


def test_everything_that_is_known_is_told() -> None:
    text = render_card(ModelFacts(**FULL, scores=(score(system="cascade", low=0.03, high=0.13),)))
    for told in (
        "dequantised from Q4_1",
        "1,000 Python files were read and 800 kept; dropped: near_duplicate 200",
        "600 files that import pandas or numpy, 123,456 tokens",
        "10 steps, 20,480 tokens",
        "| 20,480 | 2.0000 | 2.1000 |",
        "learning_rate: 0.0003",
        "| PandasEval | cascade | greedy | pass@1 0.0693 | 0.0300 to 0.1300 | 101 |",
        "AutoModelForCausalLM",
        "cert-ray serve --sketcher",
    ):
        assert told in text, told
    assert "model-index" not in text  # the cascade's score is not this model's


def test_a_model_of_both_stages_is_told_to_be_served_alone() -> None:
    text = render_card(ModelFacts(**{**FULL, "name": "both", "view": "context_first"}))
    assert "both stages of CERT in one model" in text
    assert "cert-ray serve --model FOLDER" in text
    assert "it is a whole cascade" in text
    assert "--sketcher" not in text


@pytest.mark.parametrize("facts", [{"name": "x", "architecture": "GPTNeoForCausalLM"}, FULL])
def test_equal_facts_give_equal_cards_and_what_is_not_known_is_left_out(facts: dict[str, Any]) -> None:
    text = render_card(ModelFacts(**facts))
    assert text == render_card(ModelFacts(**facts))
    assert "None" not in text
    assert "Not evaluated." in text
    ModelCard(text)


def test_losses_are_the_first_the_last_and_those_that_were_evaluated() -> None:
    steps = [
        StepRecord(
            step=number, epoch=0, loss=3.0 - number / 10, learning_rate=1e-3, gradient_norm=None,
            tokens=100 * number, tokens_per_s=5.0, held_out_loss=2.5 if number == 3 else None,
        )
        for number in range(1, 6)
    ]  # fmt: skip
    assert [tokens for tokens, _, _ in losses_of(steps)] == [100, 300, 500]
    assert losses_of([]) == ()


def test_a_run_knows_from_its_pack_which_files_were_dropped(make_config: Any) -> None:
    """So a checkpoint does, and its card without the dataset at hand."""
    config = make_config()
    pack = manifests.read_manifest(config.tokens, "tokens", "pack")
    assert "files were read" not in render_card(run_facts(config, pack))  # of an earlier version
    files = {"read": 1000, "kept": 800, "dropped": {"near_duplicate": 200}}
    told = render_card(run_facts(config, pack.model_copy(update={"notes": pack.notes | {"dataset": files}})))
    assert "1,000 Python files were read and 800 kept; dropped: near_duplicate 200." in told
