"""Going on from a base: its vocabulary is kept, new tokens start as the mean, and mismatches are refused by name."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from cert_ray import storage
from cert_ray.errors import CertRayError, ConfigError, DiskFullError, InputError, TokenizerMismatchError
from cert_ray.gpt_neo import FusedSelfAttention
from cert_ray.tokens.vocabulary import load_tokenizer, tokenizer_digest
from cert_ray.training import models
from cert_ray.training.presets import preset_config
from tests.training.conftest import PAD, WORDS, write_tokenizer

VOCABULARY = WORDS + 2
ADDED = ("<|number|>", "<|string|>")


def _pack(tokenizer, context_tokens=16, view="xl"):
    return SimpleNamespace(
        view=view,
        vocab_size=tokenizer.get_vocab_size(),
        context_tokens=context_tokens,
        tokenizer_digest=tokenizer_digest(tokenizer),
        end_id=0,
        pad_id=1,
    )


@pytest.fixture(params=["tied", "untied", "padded"])
def base(request, tmp_path) -> tuple[Path, torch.Tensor]:
    """A saved base, and its input embeddings. `padded`: the table has rows beyond the vocabulary."""
    torch.manual_seed(0)
    rows = VOCABULARY + (10 if request.param == "padded" else 0)
    if request.param == "tied":
        config = preset_config("tiny", rows, 16, 0, 1)
    else:
        config = LlamaConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    return tmp_path / "base", model.get_input_embeddings().weight.detach().clone()


def test_added_tokens_start_as_the_mean_and_the_others_stay(base, make_config, tmp_path):
    folder, before = base
    extended = write_tokenizer(tmp_path / "extended", added=ADDED)
    config = make_config(base=str(folder), tokenizer=str(tmp_path / "extended"))
    model = models.load(config, _pack(extended)).model
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(layer.weight) >= VOCABULARY + 2
        mean = layer.weight[:VOCABULARY].mean(dim=0)
        torch.testing.assert_close(layer.weight[VOCABULARY : VOCABULARY + 2], torch.stack([mean, mean]))
    torch.testing.assert_close(model.get_input_embeddings().weight[:VOCABULARY], before[:VOCABULARY])
    assert model.config.vocab_size == len(model.get_input_embeddings().weight)
    logits = model(torch.tensor([[3, VOCABULARY, VOCABULARY + 1]])).logits
    assert torch.isfinite(logits).all()


def test_a_base_with_the_packs_tokenizer_is_taken_as_it_is(tmp_path, make_config):
    model = AutoModelForCausalLM.from_config(preset_config("tiny", VOCABULARY, 16, 0, 1))
    model.save_pretrained(tmp_path / "base")
    tokenizer = write_tokenizer(tmp_path / "base")
    loaded = models.load(make_config(base=str(tmp_path / "base"), tokenizer=None), _pack(tokenizer))
    assert loaded.tokenizer_folder == tmp_path / "base"
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_copy_of_a_remote_base_lies_where_its_owner_removes_it(tmp_path, make_config):
    tokenizer = write_tokenizer(tmp_path / "base")
    AutoModelForCausalLM.from_config(preset_config("tiny", VOCABULARY, 16, 0, 1)).save_pretrained(tmp_path / "base")
    remote, copies = f"memory://bases/{tmp_path.name}", tmp_path / "copies"
    copies.mkdir()
    for file in (tmp_path / "base").iterdir():
        storage.write_bytes(storage.join(remote, file.name), file.read_bytes())
    loaded = models.load(make_config(base=remote, tokenizer=None), _pack(tokenizer), copies)
    (copy,) = copies.iterdir()
    assert loaded.tokenizer_folder == copy
    assert {file.name for file in copy.iterdir()} == {file.name for file in (tmp_path / "base").iterdir()}


def test_gpt_neo_trains_with_fused_attention_from_scratch_and_from_a_folder(tmp_path, make_config, tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    scratch = models.load(make_config(), _pack(tokenizer)).model
    scratch.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    continued = models.load(make_config(base=str(tmp_path / "base"), tokenizer=None), _pack(tokenizer)).model
    for model in (scratch, continued):
        assert {type(block.attn.attention) for block in model.transformer.h} == {FusedSelfAttention}


@pytest.mark.parametrize(
    ("part", "value"),
    [("normalizer", {"type": "Lowercase"}), ("pre_tokenizer", {"type": "WhitespaceSplit"}), ("model.unk_token", PAD)],
)
def test_a_tokenizer_of_equal_ids_that_splits_text_otherwise_is_refused(make_config, tmp_path, part, value):
    AutoModelForCausalLM.from_config(preset_config("tiny", VOCABULARY, 16, 0, 1)).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    write_tokenizer(tmp_path / "other", added=ADDED)
    file = tmp_path / "other" / "tokenizer.json"
    said = json.loads(file.read_text())
    (said["model"] if part.startswith("model") else said)[part.removeprefix("model.")] = value
    file.write_text(json.dumps(said))
    config = make_config(base=str(tmp_path / "base"), tokenizer=str(tmp_path / "other"))
    with pytest.raises(TokenizerMismatchError, match=f"equal ids, but it splits text otherwise .{part}"):
        models.load(config, _pack(load_tokenizer(str(tmp_path / "other"))))


def test_a_pack_of_another_tokenizer_is_refused(base, make_config, tmp_path):
    folder, _ = base
    other = write_tokenizer(tmp_path / "other", words=WORDS - 1)
    with pytest.raises(TokenizerMismatchError, match="packed with another tokenizer"):
        models.load(make_config(base=str(folder), tokenizer=None), _pack(other))
    with pytest.raises(TokenizerMismatchError, match=r"does not extend the tokenizer.*another folder as `run`"):
        models.load(make_config(base=str(folder), tokenizer=str(tmp_path / "other")), _pack(other))


def test_refuses_bases_that_cannot_be_used(base, make_config, tmp_path):
    folder, _ = base
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    pack = _pack(tokenizer)
    with pytest.raises(ConfigError, match="tokenizer: required with the preset tiny"):
        models.load(make_config(tokenizer=None), pack)
    with pytest.raises(ConfigError, match=r"a preset \(tiny, .*modern-110m\), a folder that exists"):
        models.load(make_config(base="tniy"), pack)
    with pytest.raises(ConfigError, match="window of 16 tokens"):
        models.load(make_config(base=str(folder), tokenizer=None), _pack(tokenizer, context_tokens=17))
    next(folder.glob("*.safetensors")).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        models.load(make_config(base=str(folder), tokenizer=None), pack)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        models.load(make_config(base=str(folder), tokenizer=None), pack)


def test_a_hub_id_that_cannot_be_had_says_so(make_config):
    """The test environment is offline, so no id can be."""
    with pytest.raises(ConfigError, match="the hub does not give it"):
        models.load(make_config(base="cert-ray/no-such-model", tokenizer=None), SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bases/smollm2-135m", "cert-ray fetch-base smollm2-135m --output bases/smollm2-135m"),
        ("./absent", "is not a folder; give a preset"),
        ("/absent/model", "is not a folder"),
        ("~/models/absent", "is not a folder"),
        ("runs/first/models/xl", "is not a folder"),
        ("memory://absent/model", "is not a folder"),
    ],
)
def test_a_folder_that_is_not_there_is_told_without_asking_the_hub(name, message, make_config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: asked.append(name))
    for use in (lambda: models.base_shape(name, 100, 16), lambda: models.local_folder(name, "base")):
        with pytest.raises(ConfigError, match=message):
            use()
    assert not asked


def test_the_shape_of_a_hub_id_takes_its_config_alone_and_one_question(tmp_path, monkeypatch):
    preset_config("modern-tiny", 100, 16, 0, 1).save_pretrained(tmp_path)
    asked = []

    def ask(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/there":
            return str(tmp_path)
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert models.base_shape("org/there", 100, 16).hidden_size == 192
    with pytest.raises(
        CertRayError, match=r"service not known\. Check the spelling.*smollm2-135m, by `cert-ray fetch"
    ) as no:
        models.base_shape("org/absent", 100, 16)
    assert not isinstance(no.value, ConfigError)  # it may pass: a run starts again
    assert asked == [("org/there", ["config.json"]), ("org/absent", ["config.json"])]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        models.base_shape("org/absent", 100, 16)


@pytest.mark.parametrize(("status", "lasts"), [(404, True), (401, True), (429, False), (503, False)])
def test_what_the_hub_refuses_for_good_is_told_apart_from_what_may_pass(status, lasts, tmp_path, monkeypatch):
    request = httpx.Request("GET", "https://hub/org/absent")

    def ask(name, allow_patterns):
        raise HfHubHTTPError("no", response=httpx.Response(status, request=request))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()  # is no folder of that model
    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CertRayError, match="the hub does not give it: no") as refused:
        models.base_shape("org/absent", 100, 16)
    assert isinstance(refused.value, ConfigError) == lasts


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("Data error: (os error 28)")]
)
def test_a_disk_that_fills_under_a_download_from_the_hub_is_told_as_one(error, make_config, monkeypatch):
    """The second is as the hub's client tells it that is written in Rust."""

    def ask(name, allow_patterns):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DiskFullError, match=r"'org/absent' cannot be downloaded, the disk of .* is full"):
        models.local_folder("org/absent", "base")


def test_the_shape_of_a_remote_folder_takes_its_config_alone(tmp_path):
    preset_config("modern-tiny", 100, 16, 0, 1).save_pretrained(tmp_path)
    url = f"memory://shapes/{tmp_path.name}"
    storage.write_bytes(f"{url}/config.json", (tmp_path / "config.json").read_bytes())
    storage.write_bytes(f"{url}/model.safetensors", b"not to be read")
    assert models.base_shape(url, 100, 16).hidden_size == 192


def test_of_a_trained_model_in_a_store_the_checkpoints_below_it_stay_there(tmp_path):
    url = f"memory://trained/{tmp_path.name}"
    for name in ("config.json", "model.safetensors", "checkpoints/step-000001/engine/state.pt"):
        storage.write_bytes(f"{url}/{name}", name.encode())
    copied = models.local_folder(url, "base", tmp_path)
    found = {str(file.relative_to(copied)): file.read_text() for file in copied.rglob("*")}
    assert found == {"config.json": "config.json", "model.safetensors": "model.safetensors"}
    storage.remove(f"{url}/model.safetensors")
    assert models.local_folder(url, "base", tmp_path) == copied  # what one worker copied, others of its machine find
    assert (copied / "model.safetensors").is_file()


def test_the_config_says_the_view_that_a_model_read_last(tmp_path, make_config, tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    model = models.load(make_config(), _pack(tokenizer, view="context_first")).model
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["cert_ray_view"] == "context_first"
    continued = models.load(make_config(base=str(tmp_path / "base"), tokenizer=None), _pack(tokenizer)).model
    assert continued.config.cert_ray_view == "xl"


def test_a_model_ends_where_the_packs_documents_do(tmp_path, make_config):
    """The base ends with other tokens, in its config and, as chat models do, in a generation config of its own."""
    made = AutoModelForCausalLM.from_config(preset_config("modern-tiny", VOCABULARY, 16, 2, 2))
    made.generation_config.eos_token_id = [2, 5]
    made.save_pretrained(tmp_path / "base")
    tokenizer = write_tokenizer(tmp_path / "base")
    loaded = models.load(make_config(base=str(tmp_path / "base"), tokenizer=None), _pack(tokenizer)).model
    loaded.save_pretrained(tmp_path / "saved")
    loaded.config.save_pretrained(tmp_path / "model")  # what a checkpoint keeps, and an export is made from
    exported = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    exported.save_pretrained(tmp_path / "export")
    for folder in ("saved", "export"):
        for name in ("config.json", "generation_config.json"):
            told = json.loads((tmp_path / folder / name).read_text())
            assert (told["eos_token_id"], told["pad_token_id"]) == (0, 1), (folder, name)
