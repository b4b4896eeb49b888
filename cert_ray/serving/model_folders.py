"""A model folder, local or remote, as a loaded model and its tokenizer. Only safetensors, never a model's own code."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError
from cert_ray.gpt_neo import fuse_attention
from cert_ray.manifests import is_finished, read_manifest
from cert_ray.sketching import prompt_format
from cert_ray.tokens.encoding import MODEL_VIEW


def load_model(folder: str, dtype: torch.dtype) -> tuple[Any, Tokenizer]:
    """The model in `folder`, on the CPU, and its tokenizer.

    Raises:
        InputError: when it is no such folder, or holds no safetensors or no tokenizer.json.
        SchemaVersionError: when its manifest is of another version, or not that of a model.
    """
    cure = "Give the folder that `cert-ray export` wrote, or one that transformers saved with safetensors."
    if not storage.is_folder(folder):
        raise InputError(folder, "no such model folder", cure)
    if is_finished(folder):  # ours: another schema version is refused by name; other folders have no manifest
        read_manifest(folder, "model", "export")
    if storage.is_local(folder):
        return _load_local(storage.local_path(folder), folder, dtype, cure)
    with tempfile.TemporaryDirectory(prefix="cert-ray-model-") as copied:
        storage.copy_folder_to_local(folder, Path(copied))
        return _load_local(Path(copied), folder, dtype, cure)


def _load_local(path: Path, folder: str, dtype: torch.dtype, cure: str) -> tuple[Any, Tokenizer]:
    for needed, pattern in (("config.json",) * 2, ("tokenizer.json",) * 2, ("safetensors weights", "*.safetensors")):
        if not any(path.glob(pattern)):
            raise InputError(folder, f"no {needed} in it", cure)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(folder, f"transformers cannot load it: {error}", cure) from error
    vocab_size, known = model.get_input_embeddings().num_embeddings, tokenizer.get_vocab_size(with_added_tokens=True)
    if known > vocab_size:
        raise InputError(folder, f"its tokenizer has {known} tokens, its model only {vocab_size}", cure)
    return fuse_attention(model), tokenizer


def trained_view(folder: str) -> str | None:
    """The view that the model in `folder`, local or remote, was trained on; None where its config.json does not say.

    Raises:
        InputError: when there is a config.json that cannot be read.
    """
    url = storage.join(folder, "config.json")
    if not storage.exists(url):
        return None
    try:
        found = json.loads(storage.read_text(url)).get(MODEL_VIEW)
    except (ValueError, AttributeError):  # no JSON object: loading the model says so
        return None
    except RecursionError as error:
        raise InputError(url, "its JSON is nested too deeply", "Give a model's folder, with its own file.") from error
    except (IsADirectoryError, PermissionError) as error:
        problem = "it is a folder" if isinstance(error, IsADirectoryError) else "it may not be read"
        raise InputError(url, problem, "Give a model's folder, with a config.json that this user may read.") from error
    return None if found is None else str(found)


def window(folder: str, model_config: Any) -> int:
    """How many tokens the model reads at most.

    Raises:
        InputError: when the configuration does not say.
    """
    for name in ("max_position_embeddings", "n_positions"):
        tokens = getattr(model_config, name, None)
        if isinstance(tokens, int):
            return tokens
    raise InputError(folder, "config.json does not say how long the window is", "Add max_position_embeddings to it.")


def end_ids(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: those the model's configuration names, and the project's own end of text."""
    named = [model.config.eos_token_id, model.generation_config.eos_token_id]
    ids = {number for entry in named for number in (entry if isinstance(entry, list) else [entry])}
    own = tokenizer.token_to_id(prompt_format.END_OF_TEXT)
    # A model's default numbers (50256 for GPT-Neo) may lie outside a smaller vocabulary.
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    return frozenset(number for number in (*ids, own) if number is not None and number < known)


def find_infill(folder: str, tokenizer: Tokenizer, infill: tuple[str, str, str] | None) -> tuple[int, int, int] | None:
    """The ids of the tokens that mark prefix, suffix and middle.

    Raises:
        ConfigError: when the tokenizer lacks one.
    """
    if infill is None:
        return None
    before_prefix, before_suffix, before_middle = (tokenizer.token_to_id(token) for token in infill)
    if before_prefix is None or before_suffix is None or before_middle is None:
        raise ConfigError(f"infill={infill!r}: the tokenizer of {folder} lacks one of them. Leave infill out.")
    return before_prefix, before_suffix, before_middle
