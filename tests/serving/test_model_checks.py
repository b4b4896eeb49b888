"""What is wrong with a model's folder, or with the role that it is given, is told before weights are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cert_ray import storage
from cert_ray.errors import CertRayError, ConfigError, InputError, TokenizerMismatchError
from cert_ray.serving import model_folders
from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.deployment import ServeConfig
from cert_ray.serving.engines import EngineConfig
from cert_ray.serving.model_checks import check_models
from cert_ray.serving.model_folders import load_model
from tests.serving.builders import save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_model(folder, "llama")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "model")


def change(folder: Path, **options: object) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))
    return str(folder)


def refused(folder: Path | str, role: str = "model", engine: EngineConfig | None = None) -> str:
    with pytest.raises(CertRayError) as error:
        check_models({role: str(folder)}, engine or EngineConfig())
    return str(error.value)


@pytest.mark.parametrize("role", ["model", "sketcher", "generator"])
def test_a_model_that_can_be_served_is_not_refused(folder: Path, role: str) -> None:
    check_models({role: str(folder)}, EngineConfig())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named_with_the_role(folder: Path, name: str) -> None:
    (folder / name).unlink()
    shown = "safetensors weights" if name == "model.safetensors" else name
    assert refused(folder, "sketcher") == (
        f"{folder}: it cannot be the sketcher: no {shown} in it. Give the folder that `cert-ray export` wrote, or one "
        "that transformers saved with safetensors."
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", "[" * 100_000, '{"model_type": "llama", "dtype": "x"}', '{"model_type": "x"}'],
)
def test_a_config_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert f"{folder}: it cannot be the model: transformers cannot use its config.json:" in refused(folder)


def test_a_config_of_other_values_is_named_with_what_is_wrong(folder: Path) -> None:
    assert "'hidden_size' expected int, got str" in refused(change(folder, hidden_size="32"))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_tokenizer_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert f"{folder}: it cannot be the model: its tokenizer.json cannot be read:" in refused(folder)


def test_weights_that_were_cut_off_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "its model.safetensors is damaged or was not copied completely" in refused(folder)


def test_a_shard_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "its model.safetensors.index.json names model-00002-of-00002.safetensors, which is missing" in refused(
        folder
    )
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "its model.safetensors.index.json is damaged" in refused(folder)


def test_a_shard_without_a_name_is_damage(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "x.safetensors"}}')
    assert "its model.safetensors.index.json is damaged" in refused(folder)


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    shards = folder / "model.safetensors.index.json"
    shards.write_text("{}")

    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", denied)  # root may read everything
        assert f"{shards}: it cannot be the model: it cannot be read: Permission denied. Let" in refused(folder)
    shards.unlink()
    config = ServeConfig.from_mapping({"model": str(folder)}, "test")
    (folder / "tokenizer.json").write_text("{")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "x.safetensors")
    (why,) = config.check_models_in_reach().values()  # the engines may run as somebody who may read it
    assert why == f"this user has no permission to read {folder}"
    with pytest.raises(InputError, match=r"its tokenizer\.json cannot be read"):
        config.check_models()


def test_what_vllm_reads_is_not_judged_by_what_transformers_would(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    change(folder, vocab_size=Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() - 1)
    check_models({"model": str(folder)}, EngineConfig(kind="vllm"))
    assert "vLLM needs a local folder" in refused("memory://models/any", engine=EngineConfig(kind="vllm"))
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json in it" in refused(folder, engine=EngineConfig(kind="vllm"))


def test_too_little_memory_is_no_fault_of_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(problem: str) -> None:
        def fails(*_: object, **__: object) -> None:
            raise RuntimeError(problem)

        monkeypatch.setattr(model_folders.AutoModelForCausalLM, "from_pretrained", fails)
        load_model(str(folder), torch.float32)

    with pytest.raises(RuntimeError, match="allocate"):
        load("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    with pytest.raises(InputError, match="transformers cannot load it: size mismatch"):
        load("size mismatch for lm_head.weight")


def test_a_tokenizer_of_another_model_is_named_by_its_size(folder: Path) -> None:
    vocab_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    known = f"its tokenizer has {vocab_size} tokens, its model only {vocab_size - 1}"
    assert known in refused(change(folder, vocab_size=vocab_size - 1))


def test_a_model_that_does_not_go_on_from_a_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5", "vocab_size": 500}')
    assert "its architecture (t5) is not one that continues a text" in refused(folder)


def test_a_plain_model_is_no_stage_of_a_cascade(folder: Path) -> None:
    Tokenizer(WordLevel({"x": 0})).save(str(folder / "tokenizer.json"))
    check_models({"model": str(folder)}, EngineConfig())
    with pytest.raises(
        TokenizerMismatchError, match=r"lacks <\|segmentation\|>.*cannot serve as generator\. Serve it as `model`"
    ):
        check_models({"generator": str(folder)}, EngineConfig())
    change(folder, cert_ray_view="context_first")
    assert "cannot serve as model of both stages. Take 'cert_ray_view' out" in refused(folder)


@pytest.mark.parametrize("role", ["sketcher", "generator"])
def test_a_model_of_both_stages_is_none_of_two(folder: Path, role: str) -> None:
    change(folder, cert_ray_view="context_first")
    check_models({"model": str(folder)}, EngineConfig())
    told = f"it cannot be the {role}: it was trained for both stages. Serve it as `model`, alone."
    assert told in refused(folder, role)


def test_sketcher_and_generator_the_wrong_way_round_are_noticed(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    stages = {
        "sketcher": change(folder, cert_ray_view="sketcher"),
        "generator": change(other, cert_ray_view="generator"),
    }
    check_models(stages, EngineConfig())
    with pytest.raises(ConfigError, match=r"each was trained to be the other\. Swap them"):
        check_models({"sketcher": stages["generator"], "generator": stages["sketcher"]}, EngineConfig())
    check_models(dict.fromkeys(stages, stages["sketcher"]), EngineConfig())  # one model, tried as both


def test_infill_tokens_that_are_not_there_are_refused(folder: Path) -> None:
    assert "lacks one of these tokens" in refused(folder, engine=EngineConfig(infill=("<P>", "<S>", "<M>")))


def test_a_model_in_a_store_is_looked_at_without_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://models/one"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        storage.write_bytes(storage.join(url, name), (folder / name).read_bytes())
    read, read_bytes = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda one: read.append(storage.name_of(one)) or read_bytes(one))
    monkeypatch.setattr(storage, "copy_files_to_local", lambda *_: pytest.fail("that copies the weights"))
    check_models({"sketcher": url}, EngineConfig())
    assert sorted(read) == ["config.json", "tokenizer.json"]
    storage.write_bytes(storage.join(url, "config.json"), b"{")
    assert f"{url}: it cannot be the sketcher: transformers cannot use its config.json" in refused(url, "sketcher")
    storage.remove(storage.join(url, "tokenizer.json"))
    assert "no tokenizer.json in it" in refused(url)


def test_of_several_models_the_one_that_cannot_be_served_is_named(folder: Path, tmp_path: Path) -> None:
    models = {"fine": {"model": str(folder)}, "pandas": {"sketcher": str(folder), "generator": str(tmp_path / "gone")}}
    config = ServeConfig.from_mapping({"models": models}, "test")
    with pytest.raises(InputError, match=r"gone: it cannot be the generator of pandas: no such model folder\."):
        config.check_models()
    # A node may build the application where no model lies.
    assert config.check_models_in_reach() == {"pandas": f"{tmp_path / 'gone'} does not exist on this machine"}
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"the model of fine: no tokenizer\.json"):
        config.check_models_in_reach()


def test_a_folder_that_is_there_and_no_model_is_no_folder_of_another_machine(folder: Path) -> None:
    """The wrong folder, an unfinished copy, a file: who deploys it is told at once."""
    config = ServeConfig.from_mapping({"model": str(folder)}, "test")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"it cannot be the model: no config\.json in it\. Give the folder"):
        config.check_models_in_reach()
    shutil.rmtree(folder)
    assert config.check_models_in_reach() == {"cert": f"{folder} does not exist on this machine"}
    folder.mkdir()
    with pytest.raises(InputError, match=r"no config\.json in it"):
        config.check_models_in_reach()
    far = ServeConfig.from_mapping({"sketcher": str(folder), "generator": str(folder / "elsewhere")}, "test")
    with pytest.raises(InputError, match=r"it cannot be the sketcher: no config\.json in it"):
        far.check_models_in_reach()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(InputError, match="no such model folder"):
        config.check_models_in_reach()


def test_models_in_a_store_are_looked_at_where_it_can_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [storage.join("memory://deployed", name) for name in ("a", "b")]
    for url in urls:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            storage.write_bytes(storage.join(url, name), (folder / name).read_bytes())
    models = {"plain": {"model": urls[1]}, "pandas": {"sketcher": str(folder), "generator": urls[0]}}
    config = ServeConfig.from_mapping({"models": models}, "test")
    assert config.check_models_in_reach() == {}
    storage.remove(storage.join(urls[0], "tokenizer.json"))
    with pytest.raises(InputError, match=r"deployed/a: it cannot be the generator of pandas: no tokenizer\.json"):
        config.check_models_in_reach()

    def denied(url: str) -> bool:
        if url in urls:
            raise RuntimeError("no credentials")  # as botocore's, which is no OSError
        return True

    monkeypatch.setattr(storage, "is_folder", denied)
    assert config.check_models_in_reach() == dict.fromkeys(models, "RuntimeError: no credentials")
    with pytest.raises(RuntimeError, match="no credentials"):
        config.check_models()


def test_a_model_is_looked_at_once_before_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, tokenizer = [], Tokenizer.from_file

    class Reading:
        @staticmethod
        def from_file(path: str) -> Tokenizer:
            read.append(path)
            return tokenizer(path)

    monkeypatch.setattr(model_folders, "Tokenizer", Reading)
    Answerer.load(ModelConfig(sketcher=str(folder), generator=str(folder)))
    assert read == [str(folder / "tokenizer.json")] * 2  # of sketcher and generator
    read.clear()
    load_model(str(folder), torch.float32)
    assert len(read) == 1


def test_the_weights_of_a_store_are_looked_at_when_they_are_here(folder: Path) -> None:
    url = "memory://models/cut"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        storage.write_bytes(storage.join(url, name), (folder / name).read_bytes())
    storage.write_bytes(storage.join(url, "model.safetensors"), (folder / "model.safetensors").read_bytes()[:-1])
    check_models({"model": url}, EngineConfig())  # without its weights
    with pytest.raises(InputError, match=r"cut: its model\.safetensors is damaged or was not copied completely"):
        Answerer.load(ModelConfig(model=url))


def test_weights_of_another_shape_or_none_are_not_replaced_by_random_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"its weights do not match its config\.json: model\.norm\.weight is missing\. Copy"
    ):
        load_model(str(folder), torch.float32)
    save_file(weights | {"model.norm.weight": gone[:-1]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is \[31\] instead of \[32\]\. Copy"):
        load_model(str(folder), torch.float32)


def test_loading_begins_with_the_same_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folders, "AutoModelForCausalLM", None)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"its tokenizer\.json cannot be read"):
        load_model(str(folder), torch.float32)
