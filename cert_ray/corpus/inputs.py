"""The options of reading, and what one read gives: a raw document, or a drop.

In: recipe options. Out: the types that `sources`, `archives` and `tables` share, and the kind of input that a file
name stands for. Nothing is opened here.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from enum import StrEnum

import pydantic

from cert_ray.config import Config
from cert_ray.schemas import Dropped


class Columns(Config):
    """Where a Parquet or JSONL input keeps what we read. The defaults are The Stack's names.

    `content` and `path` must be there. The others may be missing unless you name them yourself; null means that the
    input has no such column. Without `path`, a row is called by its number, and nothing counts as a test file.
    """

    content: str = "content"
    path: str | None = "max_stars_repo_path"
    repository: str | None = "max_stars_repo_name"
    stars: str | None = "max_stars_count"
    licence: str | None = "max_stars_repo_licenses"

    def required(self) -> list[str]:
        """The columns that an input must have."""
        asked_for = {"content", "path"} | self.model_fields_set
        return [name for field, name in self.named().items() if field in asked_for]

    def named(self) -> dict[str, str]:
        """Column by field, without those that the input does not have."""
        return {field: name for field, name in self.model_dump().items() if name is not None}


class SourceConfig(Config):
    """What is read. Inputs are taken in the order given, files within one in the order of their paths."""

    inputs: tuple[str, ...] = pydantic.Field(min_length=1)  # files, folders or globs; local or any fsspec URL
    include: tuple[str, ...] = ("*.py",)  # on the file's name; rows of tables are all read
    exclude: tuple[str, ...] = ()  # on the path inside the input; `*` also crosses `/`
    # Archives and tables found in a folder: True reads them, False leaves them closed, None reads them only where no
    # file of the folder matches `include` (a store of archives, as against a source tree with archives as test data).
    open_containers: bool | None = None
    columns: Columns = Columns()
    max_file_bytes: int = pydantic.Field(default=1_000_000, gt=0)  # PAPER.md: files under 1 MB
    unit_bytes: int = pydantic.Field(default=32 << 20, gt=0)  # assumed: tens of seconds of work, little to lose
    # Reading stops after so many files, or before the file that would make it more bytes. Loose files and row groups
    # count by their size; an archive or JSONL file by its size on disk, and gives at most the bytes that were left.
    limit: int | None = pydantic.Field(default=None, gt=0)
    max_input_bytes: int | None = pydantic.Field(default=None, gt=0)

    def matcher(self) -> Matcher:
        """`include` and `exclude`, compiled."""
        return Matcher(self.include, self.exclude)


class Matcher:
    """Whether a path inside an input is to be read."""

    def __init__(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
        self._include = re.compile("|".join(map(fnmatch.translate, include)))
        self._exclude = re.compile("|".join(map(fnmatch.translate, exclude))) if exclude else None

    def __call__(self, path: str) -> bool:
        if self._include.match(path.rpartition("/")[2]) is None:
            return False
        return self._exclude is None or self._exclude.match(path) is None


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A file as it was read, not decoded yet unless it came from a table.

    `path` is relative to `source`, and `source` is the input as given, so a corpus read from another place by a
    relative path gives the same rows.
    """

    path: str
    source: str
    payload: bytes | str
    repository: str | None = None
    stars: int | None = None
    licence: str | None = None


Rejected = tuple[str, str, Dropped]  # path, source, why
Record = RawDocument | Rejected


class InputKind(StrEnum):
    """What a container's name promises."""

    TAR = "tar"
    ZIP = "zip"
    JSONL = "jsonl"
    PARQUET = "parquet"


_SUFFIXES = {
    InputKind.TAR: (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    InputKind.ZIP: (".zip", ".whl"),
    InputKind.JSONL: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    InputKind.PARQUET: (".parquet",),
}
SUPPORTED = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)


def kind_of(url: str) -> InputKind | None:
    """The kind of container that `url` names, or None."""
    name = url.lower()
    return next((kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)
