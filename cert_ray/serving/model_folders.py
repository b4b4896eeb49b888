"""A model folder, local or remote, as a loaded model and its tokenizer. Only safetensors, never a model's own code.

`describe` reads the small parts (config, tokenizer, and for local folders the headers of the weights), so that most
faults of a folder show within a second and before anything is deployed. `load_model` starts with the same checks,
unless it is given their result.
"""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError
from cert_ray.gpt_neo import fuse_attention
from cert_ray.manifests import is_finished, read_manifest
from cert_ray.sketching import prompt_format
from cert_ray.tokens.encoding import MODEL_VIEW

_CURE: Final = "Give the folder that `cert-ray export` wrote, or one that transformers saved with safetensors."
_FROM_HUB: Final = "For a model on the Hugging Face hub, first run `hf download OWNER/NAME --local-dir FOLDER`."
_CONFIG: Final = "config.json"
_TOKENIZER: Final = "tokenizer.json"
_SHARDS: Final = "model.safetensors.index.json"
_WEIGHTS: Final = "model.safetensors"
# What transformers raises for a config.json that it cannot use (tried: other JSON, other types, unknown architectures,
# nesting).
_UNUSABLE: Final = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, StrictDataclassError, SafetensorError,
)  # fmt: skip
# What it raises for weights that do not fit. A RuntimeError counts only if it says so: others mean too little memory.
_UNFIT: Final = (OSError, ValueError, KeyError, SafetensorError, RuntimeError)
_OF_SHAPES: Final = re.compile(r"\b(size|shape|dimension)s?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Described:
    """What a model folder says about its model."""

    folder: str
    config: Any  # transformers' own
    tokenizer: Tokenizer

    @property
    def view(self) -> str | None:
        """The view that the model was trained on, if config.json says."""
        found = getattr(self.config, MODEL_VIEW, None)
        return None if found is None else str(found)


def describe(folder: str, *, with_weights: bool = True) -> Described:
    """The configuration and tokenizer of the model in `folder`. Its weights must be there, but are not read.

    Without `with_weights`, it is not checked that they are there as transformers wants them, nor that every token of
    the tokenizer has an embedding.

    Raises:
        InputError: when it is no such folder, lacks a file, or one of these files is damaged.
        SchemaVersionError: when its manifest is of another version, or not that of a model.
    """
    _check_folder(folder)
    if storage.is_local(folder):
        return _describe(storage.local_path(folder), folder, with_weights=with_weights)
    files = (file.url.split("/") for file in storage.list_files(folder))
    names = {name for *_, parent, name in files if parent == storage.name_of(folder)}
    _check_files(names, folder, with_weights=with_weights)
    with tempfile.TemporaryDirectory(prefix="cert-ray-model-") as copied:
        for name in {_CONFIG, _TOKENIZER, _SHARDS} & names:
            (Path(copied) / name).write_bytes(storage.read_bytes(storage.join(folder, name)))
        if with_weights:
            _check_shards(Path(copied), names, folder)
        return _read(Path(copied), folder, with_weights=with_weights)


def load_model(folder: str, dtype: torch.dtype, described: Described | None = None) -> tuple[Any, Tokenizer]:
    """The model in `folder`, on the CPU, and its tokenizer. `described` is a fresh result of `describe`, if at hand.

    Raises:
        InputError: when it is no such folder, lacks a file, or holds no model that transformers can load whole.
        SchemaVersionError: when its manifest is of another version, or not that of a model.
    """
    if described is None:
        _check_folder(folder)
    with _on_this_machine(folder) as path:
        # Remote weights' headers were not read, and files may have been replaced between the description and the copy.
        if described is None or not storage.is_local(folder):
            described = _describe(path, folder)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True,  # reported below, by name
            )  # fmt: skip
        except _UNFIT as error:
            if isinstance(error, RuntimeError) and _OF_SHAPES.search(str(error)) is None:
                raise
            raise InputError(folder, f"transformers cannot load it: {_in_short(error)}", _CURE) from error
    _check_whole(found, folder)
    _check_vocabulary(described.tokenizer, model.get_input_embeddings().num_embeddings, folder)
    return fuse_attention(model), described.tokenizer


def _check_whole(found: dict[str, Any], folder: str) -> None:
    """Refuse missing or misshapen tensors: transformers only warns, and fills them with random numbers."""
    problems = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    problems += [
        f"{name} is {list(has)} instead of {list(wanted)}" for name, has, wanted in sorted(found["mismatched_keys"])
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        problem = f"its weights do not match its {_CONFIG}: {', '.join(problems[:3])}{more}"
        raise InputError(folder, problem, "Copy the whole folder again, or export the model again.")


@contextmanager
def _on_this_machine(folder: str) -> Iterator[Path]:
    if storage.is_local(folder):
        yield storage.local_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="cert-ray-model-") as copied:
        storage.copy_files_to_local(folder, Path(copied))
        yield Path(copied)


def _check_folder(folder: str) -> None:
    if not storage.is_folder(folder):
        raise InputError(folder, "no such model folder", f"{_CURE} {_FROM_HUB}")
    if is_finished(folder):  # ours: another schema version is refused by name. Other folders have no manifest
        read_manifest(folder, "model", "export")


def _describe(path: Path, folder: str, *, with_weights: bool = True) -> Described:
    try:
        names = {file.name for file in path.iterdir() if file.is_file()}
        _check_files(names, folder, with_weights=with_weights)
        if with_weights:
            _check_shards(path, names, folder)
            for name in sorted(names):
                if name.endswith(".safetensors"):
                    _check_header(path / name, folder)
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}"
        raise InputError(
            str(error.filename or folder), problem, "Let this user read all of the model's files."
        ) from error
    return _read(path, folder, with_weights=with_weights)


def _check_files(names: Set[str], folder: str, *, with_weights: bool) -> None:
    for name in (_CONFIG, _TOKENIZER):
        if name not in names:
            raise InputError(folder, f"no {name} in it", _CURE)
    if with_weights and not any(name.endswith(".safetensors") for name in names):
        raise InputError(folder, "no safetensors weights in it", _CURE)


def _check_shards(path: Path, names: Set[str], folder: str) -> None:
    """When weights are split over several files, every one must be there."""
    if _WEIGHTS in names or _SHARDS not in names:
        return
    try:
        named = set(json.loads((path / _SHARDS).read_text())["weight_map"].values())
        if not all(isinstance(name, str) for name in named):
            raise TypeError("a file's name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(folder, f"its {_SHARDS} is damaged: {error!r}", _CURE) from error
    absent = sorted(named - names)
    if absent:
        raise InputError(folder, f"its {_SHARDS} names {', '.join(absent)}, which is missing", _CURE)


def _check_header(weights: Path, folder: str) -> None:
    """Refuse a cut-off file: the header says what a weights file holds, and so how long it is."""
    try:
        with safe_open(weights, framework="pt") as opened:
            opened.keys()
    except SafetensorError as error:
        problem = f"its {weights.name} is damaged or was not copied completely: {_in_short(error)}"
        raise InputError(folder, problem, "Copy it again.") from error


def _read(path: Path, folder: str, *, with_weights: bool) -> Described:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as error:
        problem = f"transformers cannot use its {_CONFIG}: {_in_short(error)}"
        raise InputError(folder, problem.replace(str(path), folder), _CURE) from error
    try:
        tokenizer = Tokenizer.from_file(str(path / _TOKENIZER))
    except Exception as error:  # its errors have no more specific type
        raise InputError(folder, f"its {_TOKENIZER} cannot be read: {_in_short(error)}", _CURE) from error
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if with_weights and isinstance(vocab_size, int):
        _check_vocabulary(tokenizer, vocab_size, folder)
    return Described(folder, config, tokenizer)


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: str) -> None:
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    if known > vocab_size:
        raise InputError(folder, f"its tokenizer has {known} tokens, its model only {vocab_size}", _CURE)


def _in_short(error: Exception) -> str:
    """Another package's message on one line, cut to 300 characters."""
    return textwrap.shorten(str(error) or repr(error), 300, placeholder=" ...")


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
        problem = "it is a folder" if isinstance(error, IsADirectoryError) else "this user has no permission to read it"
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


def generation_config(path: Path, model_config: Any) -> Any:
    """A local folder's generation settings, as transformers loads them with the model."""
    if (path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(model_config)


def end_ids(model_config: Any, generation: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: those that the model's two configurations name, and the project's own end of text."""
    named = [model_config.eos_token_id, generation.eos_token_id]
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
        raise ConfigError(f"infill={infill!r}: the tokenizer of {folder} lacks one of these tokens. Leave infill out.")
    return before_prefix, before_suffix, before_middle
