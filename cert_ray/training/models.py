"""The model to train: a preset from scratch, or any causal language model to start from, with the pack's tokenizer.

In: a `TrainConfig` and the packed tokens' facts. Out: a model in fp32 whose embeddings fit the tokenizer, and the
folder of that tokenizer's files. Weights come only from safetensors, and no code of a model's author is run. The base's
vocabulary is kept; special tokens may have been added after it, and start as `warm_start` says. The model's config, and
so every export, names the view that it is trained on (`MODEL_VIEW`) and the pack's end and padding tokens, which
serving needs.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM

from cert_ray import storage
from cert_ray.errors import CertRayError, ConfigError, DiskFullError, InputError, TokenizerMismatchError
from cert_ray.gpt_neo import fuse_attention
from cert_ray.tokens.encoding import MODEL_VIEW
from cert_ray.tokens.vocabulary import load_tokenizer, splits_otherwise, tokenizer_digest
from cert_ray.training.bases import BASES
from cert_ray.training.checkpoints import is_of_a_full_disk
from cert_ray.training.config import TrainConfig
from cert_ray.training.inputs import MODEL_FILES
from cert_ray.training.presets import PRESETS, preset_config
from cert_ray.training.warm_start import add_tokens

_ADDS_ALONE = (
    "Its tokenizer may only be added to: name another folder as `run`, where `cert-ray tokenizer` takes it over, "
    "or the base that this run was made for."
)
# The files of a tokenizer in a Hugging Face folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

_REFUSED = (401, 403, 404)  # the hub's answers that starting the run again would not change


class PackFacts(Protocol):
    """The part of `tokens.shards.PackedTokens` that is needed here."""

    view: str | None
    vocab_size: int
    context_tokens: int
    tokenizer_digest: str
    end_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to train, and the folder of its tokenizer's files on this machine."""

    model: Any
    tokenizer_folder: Path


def fetch(config: TrainConfig, copies: Path) -> None:
    """Copy the base and the tokenizer, if they are remote, to `copies`, where `load` finds them.

    Raises:
        ConfigError: when one of them does not exist.
    """
    if config.base not in PRESETS:
        local_folder(config.base, "base", copies)
    if config.tokenizer is not None:
        local_folder(config.tokenizer, "tokenizer", copies)


def load(config: TrainConfig, pack: PackFacts, copies: Path | None = None) -> Loaded:
    """The model that `config.base` names, for the tokens of `pack`; `copies` as for `local_folder`.

    Raises:
        TokenizerMismatchError: when the pack was made with another tokenizer, or its tokenizer does not extend the
            base's.
        ConfigError, InputError: when base or tokenizer cannot be used.
    """
    loaded = _load(config, pack, copies)
    setattr(loaded.model.config, MODEL_VIEW, pack.view)
    if config.activation_checkpointing:
        _checkpoint_activations(loaded.model, config)
    return loaded


def _checkpoint_activations(model: Any, config: TrainConfig) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"activation_checkpointing: {config.base} cannot do it: {error}") from error


def _load(config: TrainConfig, pack: PackFacts, copies: Path | None) -> Loaded:
    if config.base in PRESETS:
        if config.tokenizer is None:
            raise ConfigError(
                f"tokenizer: required with the preset {config.base}; give the folder the pack was made with."
            )
        folder = local_folder(config.tokenizer, "tokenizer", copies)
        _check_tokenizer(folder, config, pack)
        return Loaded(_from_scratch(config, pack), folder)
    base = local_folder(config.base, "base", copies)
    folder = local_folder(config.tokenizer, "tokenizer", copies) if config.tokenizer else base
    _check_tokenizer(folder, config, pack)
    return Loaded(_continued(config, base, folder, pack), folder)


def parameter_count(model: torch.nn.Module) -> int:
    """The number of trained parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _from_scratch(config: TrainConfig, pack: PackFacts) -> Any:
    shape = preset_config(config.base, pack.vocab_size, pack.context_tokens, pack.end_id, pack.pad_id)
    torch.manual_seed(config.seed)
    return fuse_attention(AutoModelForCausalLM.from_config(shape, dtype=torch.float32))


def base_shape(base: str, vocab_size: int, context_tokens: int) -> Any:
    """The Hugging Face config of a preset, or of a folder's or hub id's model, without its weights.

    Raises:
        ConfigError: when there is no such preset, folder or hub id.
    """
    if base in PRESETS:
        return preset_config(base, vocab_size, context_tokens, 0, 0)
    check_there(base, "base")
    try:
        with tempfile.TemporaryDirectory(prefix="cert-ray-shape-") as copy:
            return AutoConfig.from_pretrained(_config_folder(base, Path(copy)), trust_remote_code=False)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: {base!r} is no preset, and its config.json could not be loaded: {error}") from error


def _config_folder(base: str, copy: Path) -> Path:
    """The folder of the config.json of `base` on this machine; only this file is copied from a remote folder."""
    if not storage.is_folder(base):
        return _hub_folder(base, "base", ("config.json",))
    if storage.is_local(base):
        return storage.local_path(base)
    (copy / "config.json").write_bytes(storage.read_bytes(storage.join(base, "config.json")))
    return copy


def _continued(config: TrainConfig, base: Path, tokenizer_folder: Path, pack: PackFacts) -> Any:
    if not (base / "config.json").is_file():
        raise InputError(
            config.base, "no config.json in it", "Give a folder that `cert-ray train` or transformers saved."
        )
    if not any(base.glob("*.safetensors")):
        raise InputError(config.base, "no *.safetensors in it", "Other weight files are not loaded; convert the model.")
    shape = AutoConfig.from_pretrained(base, trust_remote_code=False)
    window = getattr(shape, "max_position_embeddings", None)
    if window is not None and pack.context_tokens > window:
        raise ConfigError(
            f"base: {config.base} has a window of {window} tokens, the packed rows have {pack.context_tokens}; "
            f"pack with --context-tokens {window} or less."
        )
    model = AutoModelForCausalLM.from_pretrained(
        base, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    added = range(_base_vocabulary(config, base, tokenizer_folder), pack.vocab_size)
    add_tokens(model, added, load_tokenizer(str(tokenizer_folder)))
    for named in (model.config, model.generation_config):  # the base's may differ, e.g. the end of a chat turn
        named.eos_token_id, named.pad_token_id = pack.end_id, pack.pad_id
    return fuse_attention(model)


def _check_tokenizer(folder: Path, config: TrainConfig, pack: PackFacts) -> None:
    found = tokenizer_digest(load_tokenizer(str(folder)))
    if found != pack.tokenizer_digest:
        raise TokenizerMismatchError(
            f"{config.tokens} was packed with another tokenizer ({pack.tokenizer_digest}) than the one in "
            f"{config.tokenizer or config.base} ({found}). Pack the view again with that tokenizer."
        )


def _base_vocabulary(config: TrainConfig, base: Path, tokenizer_folder: Path) -> int:
    """How many tokens the base knows. The run's tokenizer must give each the same id, and split text as the base's."""
    theirs = load_tokenizer(str(base))
    known = theirs.get_vocab(with_added_tokens=True)
    if tokenizer_folder != base:
        ours = load_tokenizer(str(tokenizer_folder))
        given = ours.get_vocab(with_added_tokens=True)
        moved = [token for token, token_id in known.items() if given.get(token) != token_id]
        if moved:
            raise TokenizerMismatchError(
                f"{config.tokenizer} does not extend the tokenizer of {config.base}: {len(moved)} of its {len(known)} "
                f"tokens have another id or none, {moved[0]!r} among them. {_ADDS_ALONE}"
            )
        if other := splits_otherwise(theirs, ours):
            raise TokenizerMismatchError(
                f"{config.tokenizer} does not extend the tokenizer of {config.base}: tokens have equal ids, but it "
                f"splits text otherwise ({', '.join(other)}). {_ADDS_ALONE}"
            )
    return 1 + max(known.values(), default=-1)


def local_folder(name: str, option: str, copies: Path | None = None) -> Path:
    """The folder `name` on this machine: itself, a copy of a remote one, or the download of a hub id.

    Args:
        copies: the folder for the copy, where a later call finds it; the caller removes it. None: a temporary folder
            until this process ends.

    Raises:
        ConfigError: naming `option`, when `name` is none of these.
    """
    if storage.is_folder(name):
        if storage.is_local(name):
            return storage.local_path(name)
        if copies is None:
            copies = Path(tempfile.mkdtemp(prefix="cert-ray-models-"))
            atexit.register(shutil.rmtree, copies, ignore_errors=True)
        kept = copies / xxhash.xxh3_64_hexdigest(name.encode())
        if not kept.exists():
            arriving = Path(tempfile.mkdtemp(dir=copies))
            storage.copy_files_to_local(name, arriving)
            arriving.rename(kept)
        return kept
    check_there(name, option)
    return _hub_folder(name, option, MODEL_FILES)


def check_there(name: str, option: str) -> None:
    """Raise `ConfigError`, saying what to do, if `name` is no folder and cannot be a hub id; the hub is not asked.

    A folder of `cert-ray fetch-base` is named like a hub id (`bases/smollm2-135m`), but is never sought on the hub.
    """
    if storage.is_folder(name):
        return
    if (fetched := storage.name_of(name)) in BASES:
        raise ConfigError(
            f"{option}: there is no folder {name!r}; `cert-ray fetch-base {fetched} --output {name}` makes it."
        )
    if "://" in name or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = f"a preset ({', '.join(PRESETS)}), " if option in ("base", "start") else ""
        raise ConfigError(
            f"{option}: {name!r} is not a folder; give {known}a folder that exists, or a hub id like org/name."
        )


def _hub_folder(name: str, option: str, patterns: tuple[str, ...]) -> Path:
    """The folder with the hub's files that match `patterns`, downloaded now or before. Fails at once without the hub.

    Raises:
        ConfigError: when the hub has no such model, or denies access, or must not be used.
        DiskFullError: when its cache has no room for the files.
        CertRayError: when the hub does not answer, which may be temporary.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        if is_of_a_full_disk(error):
            raise DiskFullError(
                f"{option}: {name!r} cannot be downloaded, the disk of {constants.HF_HUB_CACHE} is full. "
                "Free some of it, or set HF_HUB_CACHE, on every node, to a folder of a larger disk."
            ) from error
        if isinstance(error, RuntimeError):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        asked = "HF_HUB_OFFLINE is set, and it is not in the cache" if constants.HF_HUB_OFFLINE else why
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSED
        lasts = constants.HF_HUB_OFFLINE or refused or isinstance(error, HFValidationError)
        raise (ConfigError if lasts else CertRayError)(
            f"{option}: {name!r} is no folder here, and the hub does not give it: {asked}. "
            "Check the spelling, the network and HF_TOKEN; or download it elsewhere and give its folder; or use what "
            f"needs no hub: {', '.join(BASES)}, by `cert-ray fetch-base`."
        ) from error
