"""A checkpoint becomes a Hugging Face folder whose logits are those of the trained engine, to the bit."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPTNeoForCausalLM
from typer.testing import CliRunner

from cert_ray import cli
from cert_ray.errors import CheckpointError, DiskFullError
from cert_ray.tokens.vocabulary import load_tokenizer, tokenizer_digest
from cert_ray.training import checkpoints, export
from cert_ray.training.deepspeed_engine import Engine
from cert_ray.training.presets import preset_config
from tests.training.conftest import write_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
]


@pytest.fixture
def trained(make_config, tmp_path) -> tuple[torch.nn.Module, Path]:
    """A model after one step, and its checkpoint."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 64, 16, 0, 1))  # the tokenizer has 62
    engine = Engine(model, make_config())
    ids = torch.randint(0, 62, (4, 17))
    engine.train_step([(ids, torch.ones_like(ids, dtype=torch.bool))], 1e-2)
    folder = tmp_path / "step-000001"
    engine.save(folder / export.ENGINE_FOLDER)
    model.config.save_pretrained(folder / export.MODEL_FOLDER)
    write_tokenizer(folder / export.TOKENIZER_FOLDER)
    checkpoints.seal_part(folder, step=1, rank=0, world_size=1, zero_stage=1, run_digest="d")
    return model, folder


def test_logits_of_the_export_equal_those_of_the_engine(trained, tmp_path):
    model, checkpoint = trained
    files = export.export_checkpoint(str(checkpoint), str(tmp_path / "model"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    ids = torch.arange(2, 18)[None]
    model.eval()
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, model(ids).logits)
    assert tokenizer_digest(load_tokenizer(str(tmp_path / "model"))) == tokenizer_digest(
        write_tokenizer(tmp_path / "t")
    )
    tokens = load_tokenizer(str(tmp_path / "model")).get_vocab_size()
    assert tokens != model.get_input_embeddings().num_embeddings
    assert f"| tokens of the tokenizer | {tokens} |" in (tmp_path / "model" / "README.md").read_text()
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_card_of_a_checkpoint_of_an_earlier_version_says_what_it_does_not_know(trained, tmp_path):
    export.export_checkpoint(str(trained[1]), str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| started from | not recorded here, nor whether that was dequantised, nor its licence |" in card


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    _, checkpoint = trained
    states = next((checkpoint / "engine" / "engine").glob("*model_states.pt"))
    states.write_bytes(states.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=states.name):
        export.export_checkpoint(str(checkpoint), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors 0.8
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_disk_that_fills_is_told_as_one(trained, tmp_path, monkeypatch, error):
    def fills(*_, **__):
        raise error

    _, checkpoint = trained
    monkeypatch.setattr(GPTNeoForCausalLM, "save_pretrained", fills)
    with pytest.raises(DiskFullError, match=r"the exported model cannot be written, a disk is full: .*TMPDIR\) has "):
        export.export_checkpoint(str(checkpoint), str(tmp_path / "model"))


def test_another_error_of_the_disk_stays_what_it_is(trained, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    _, checkpoint = trained
    monkeypatch.setattr(GPTNeoForCausalLM, "save_pretrained", fails)
    with pytest.raises(SafetensorError, match="os error 5"):
        export.export_checkpoint(str(checkpoint), str(tmp_path / "model"))


def test_a_dry_run_names_the_step_and_writes_nothing(trained, tmp_path):
    _, checkpoint = trained
    result = CliRunner().invoke(cli.app, ["export", str(checkpoint), str(tmp_path / "model"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["step"] == 1
    assert not (tmp_path / "model").exists()
