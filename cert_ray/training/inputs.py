"""Checks before a run starts, done once and without a model. In: a `TrainConfig`. Out: digests, or an error.

Finds a finished output of the same run, and refuses that of another. Imports neither torch nor transformers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from cert_ray import manifests, storage
from cert_ray.errors import CertRayError, ConfigError, InputError
from cert_ray.manifests import Manifest
from cert_ray.tokens.shards import check_pack, pack_digest
from cert_ray.training.config import TrainConfig
from cert_ray.training.loggers import check_installed
from cert_ray.training.sampling import SEGMENT_DOCUMENTS

STAGE = "model"
VERB = "train"
_TOKENIZER = "tokenizer.json"
_OF_THE_BASE = ("dequantised_from", "licence")
# The files that are loaded from a Hugging Face folder.
MODEL_FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model")
_NOT_OF_THE_WEIGHTS = ("machine", "machines")  # notes; earlier versions wrote the first


@dataclass(frozen=True, slots=True)
class Checked:
    """Inputs that were found readable: their digests, and what the pack says about itself."""

    config: TrainConfig  # with local paths made absolute: workers run elsewhere
    inputs_digest: str
    run_digest: str  # of the inputs and of the options that the weights depend on
    pack: Manifest
    origin: dict[str, str]  # `origin_of` the base


def check(config: TrainConfig) -> Checked:
    """Read the pack's manifest, check its files (`check_pack`), and digest everything that the weights will depend on.

    Raises:
        ConfigError: when a logger's package is missing here, or a URL points into this process's own memory.
        NotFinishedError, SchemaVersionError, ShardCorruptError: when the pack cannot be used.
    """
    check_installed(config.loggers)
    for url in filter(None, (config.output, config.tokens, config.base, config.tokenizer)):
        storage.check_shared(url)
    config = _with_absolute_paths(config)
    pack = check_pack(config.tokens)
    digest = xxhash.xxh3_128(pack.model_dump_json().encode())
    digest.update(_describe(config.base).encode(errors="surrogateescape"))  # file names need not be text
    if config.tokenizer is not None:
        digest.update(_tokenizer_bytes(config.tokenizer))
    if pack.rows_kept > SEGMENT_DOCUMENTS:  # earlier versions read such packs in another order
        digest.update(f"segments of {SEGMENT_DOCUMENTS}".encode())
    inputs_digest = digest.hexdigest()
    run_digest = xxhash.xxh3_128_hexdigest(f"{inputs_digest} {config.result_digest()}".encode())
    return Checked(config, inputs_digest, run_digest, pack, origin_of(config.base))


def check_same_pack(config: TrainConfig, pack: Manifest, digest: str) -> None:
    """Raise `InputError` if `pack`, found at `config.tokens`, does not have this `digest`."""
    if pack_digest(pack) != digest:
        raise InputError(
            config.tokens,
            "no longer the pack that this run began with",
            "Pack it again as it was and run the same again, which goes on; or train on this one into another output.",
        )


def waits_for(config: TrainConfig, cluster: Mapping[str, float]) -> str | None:
    """What a cluster with these resources lacks for the run to start, and what to change; None if it suffices.

    This is not an error: an autoscaler or a person may add nodes.
    """
    workers = config.min_workers or config.workers
    wanted = {"CPU": float(workers * config.cpus_per_worker), "GPU": float(workers if config.use_gpu else 0)}
    lacking = [
        f"{count:g} {kind}s, and the cluster has {cluster.get(kind, 0):g}"
        for kind, count in wanted.items()
        if count > cluster.get(kind, 0)
    ]
    if not lacking:
        return None
    return (
        f"the run waits for nodes: {workers} workers want {'; '.join(lacking)}. If none will join, stop it and "
        "lower workers or cpus_per_worker (more gradient_accumulation keeps the rows per step), or set min_workers."
    )


def finished(checked: Checked) -> Manifest | None:
    """The manifest of the same run if it has finished before; None if the output is not finished.

    Raises:
        ConfigError: when the output holds the model of another run, or a fetched base.
        ShardCorruptError: when a file of the finished model is missing or damaged.
    """
    output = checked.config.output
    if not manifests.is_finished(output):
        return None
    manifest = manifests.read_manifest(output, STAGE, VERB)
    digest = manifest.notes.get("run_digest")
    if digest != checked.run_digest:
        what = "a fetched base" if digest is None else f"the model of another run ({_differences(manifest, checked)})"
        raise ConfigError(
            f"output: {output} holds {what}. "
            "Choose another output (a recipe's: another `run`, or another name of the model), or delete that folder."
        )
    for file in manifest.files:
        manifests.check_file(output, file, VERB)
    return manifest


def origin_of(base: str) -> dict[str, str]:
    """What is known of the pre-trained model that `base` is, or was trained from: `dequantised_from`, `licence`.

    A fetched base has these in its notes and options, a trained model in its notes. For a model that an earlier version
    trained, they come from the model it started from, if that still exists.
    """
    asked: set[str] = set()
    try:
        while base not in asked and storage.is_folder(base) and manifests.is_finished(base):
            asked.add(base)
            manifest = manifests.read_manifest(base, STAGE, VERB)
            facts = {**manifest.config, **manifest.notes}
            found = {name: facts[name] for name in _OF_THE_BASE if facts.get(name)}
            if found or "run_digest" not in manifest.notes:  # without a run_digest: not trained here
                return found
            base = manifest.notes["base"]
    except (CertRayError, OSError):
        if not asked:
            raise
    return {}


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    update: dict[str, str] = {"tokens": storage.absolute(config.tokens), "output": storage.absolute(config.output)}
    if storage.is_folder(config.base):
        update["base"] = storage.absolute(config.base)
    if config.tokenizer is not None and storage.is_folder(config.tokenizer):
        update["tokenizer"] = storage.absolute(config.tokenizer)
    return config.model_copy(update=update)


def _describe(base: str) -> str:
    """What identifies a base: a preset's name, a hub id; for a folder its manifest, or the checksums of its files.

    Without a manifest, the weights are read once.
    """
    if not storage.is_folder(base):
        return base
    if manifests.is_finished(base):
        manifest = manifests.read_manifest(base, STAGE, VERB)
        notes = {name: note for name, note in manifest.notes.items() if name not in _NOT_OF_THE_WEIGHTS}
        return manifest.model_copy(update={"notes": notes}).model_dump_json()
    names = sorted(filter(_is_loaded, storage.list_file_names(base)))
    return "\n".join(f"{name} {storage.checksum(storage.join(base, name)).checksum}" for name in names)


def _is_loaded(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def _tokenizer_bytes(folder: str) -> bytes:
    url = storage.join(folder, _TOKENIZER)
    return storage.read_bytes(url) if storage.exists(url) else folder.encode()


def _differences(manifest: Manifest, checked: Checked) -> str:
    now = checked.config.result_options()
    # An earlier version's config may lack options, which then have their defaults.
    then = TrainConfig.model_construct(**manifest.config).result_options()
    names = [name for name in sorted(now.keys() | then.keys()) if then.get(name) != now.get(name)]
    if manifest.inputs_digest != checked.inputs_digest:
        names.append("the inputs' content")
    return "differs in " + ", ".join(names)
