"""Whether a stage's folder already holds what would be made: so a second run costs a checksum."""

from __future__ import annotations

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.errors import ShardCorruptError
from cert_ray.manifests import Manifest


def finished_manifest(folder: str, stage: str, verb: str, config: Config, inputs_digest: str) -> Manifest | None:
    """The manifest of `folder` if it was made by these options from these inputs and its files are whole, else None.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote `folder`.
    """
    if not manifests.is_finished(folder):
        return None
    manifest = manifests.read_manifest(folder, stage, verb)
    if (manifest.config, manifest.inputs_digest) != (config.model_dump(mode="json"), inputs_digest):
        return None
    try:
        for file in manifest.files:
            manifests.check_file(folder, file, verb)
    except ShardCorruptError:
        return None
    return manifest
