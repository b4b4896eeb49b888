"""The options for reading inputs, and what a read yields: a raw document, or a drop.

In: recipe options. Out: the types that `sources`, `archives` and `tables` share, and the kind of input that a file
name indicates. Nothing is opened here.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from enum import StrEnum

import pydantic

from cert_ray.config import Config
from cert_ray.schemas import Dropped

Names = str | tuple[str, ...]

# Units for the cores to share, each seconds of work, so losing one costs little. Assumed: more units than a small
# machine has cores, none so small that starting it matters (a Ray task takes 5 ms), none so large that the others wait
# for it to end.
UNITS_OF_INPUT = 64
LEAST_UNIT_BYTES, MOST_UNIT_BYTES = 1 << 20, 32 << 20

# Column names in use: those of The Stack v1, of The Stack v2, and others.
_PATHS = ("max_stars_repo_path", "path")
_REPOSITORIES = ("max_stars_repo_name", "repo_name", "repository")
_STARS = ("max_stars_count", "star_events_count", "stars")
_LICENCES = ("max_stars_repo_licenses", "detected_licenses", "licenses", "license")


def _nested(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"metadata.{name}" for name in names)


class Columns(Config):
    """Which columns of a Parquet or JSONL input to read: a name, `a.b` for a field inside a column, or several names.

    Of several names, the first that a row has is used. The defaults tell the formats of `PRESETS` apart by themselves.
    `content` and `path` must exist. The others may be missing unless you name a single column yourself. Null means that
    the input has no such column. Without `path`, a row is named by its number, and nothing counts as a test file.
    """

    content: Names = ("content", "text")
    path: Names | None = (*_PATHS, *_nested(_PATHS), "id")
    repository: Names | None = (*_REPOSITORIES, *_nested(_REPOSITORIES))
    stars: Names | None = (*_STARS, *_nested(_STARS))
    licence: Names | None = (*_LICENCES, *_nested(_LICENCES))

    def required(self) -> dict[str, tuple[str, ...]]:
        """The fields that an input must have, each with its possible column names."""
        named = self.named()
        return {
            field: names
            for field, names in named.items()
            if field in ("content", "path") or (field in self.model_fields_set and len(names) == 1)
        }

    def named(self) -> dict[str, tuple[str, ...]]:
        """Column names by field, without the fields set to None."""
        fields = ((field, getattr(self, field)) for field in type(self).model_fields)
        return {field: (names,) if isinstance(names, str) else names for field, names in fields if names is not None}


# `columns: NAME` in a recipe. Sources: the dataset cards of The Stack and The Stack v2 (with their content filled in),
# datatrove's `Document` as its JSONL and Parquet writers write it, dolma's document format.
PRESETS = {
    "auto": Columns(),
    "the-stack": Columns(content="content", path=_PATHS, repository=_REPOSITORIES, stars=_STARS, licence=_LICENCES),
    "datatrove": Columns(
        content="text",
        path=(*_nested(_PATHS), *_PATHS, "id"),  # no `metadata.` if its writer was told to expand metadata
        repository=(*_nested(_REPOSITORIES), *_REPOSITORIES),
        stars=(*_nested(_STARS), *_STARS),
        licence=(*_nested(_LICENCES), *_LICENCES),
    ),
    "dolma": Columns(
        content="text",
        path=(*_nested(_PATHS), "id"),
        repository=_nested(_REPOSITORIES),
        stars=_nested(_STARS),
        licence=_nested(_LICENCES),
    ),
}


class SourceConfig(Config):
    """What is read. Inputs are taken in the order given, files within one in the order of their paths."""

    inputs: tuple[str, ...] = pydantic.Field(min_length=1)  # files, folders or globs; local or any fsspec URL
    include: tuple[str, ...] = ("*.py",)  # on the file's name; rows of tables are all read
    exclude: tuple[str, ...] = ()  # on the path inside the input; `*` also crosses `/`
    # Archives and tables found in a folder: True reads them, False leaves them closed, None reads them only if no file
    # of the folder matches `include` (a store of archives, not a source tree with archives as test data).
    open_containers: bool | None = None
    columns: Columns = Columns()  # or one of PRESETS by its name
    max_file_bytes: int = pydantic.Field(default=1_000_000, gt=0)  # the paper: files under 1 MB
    # Bytes per work unit; None derives it from the size of the inputs, see `unit_bytes_of`.
    unit_bytes: int | None = pydantic.Field(default=None, gt=0)
    # Reading stops after this many files, or before the file that would exceed this many bytes. Loose files and row
    # groups count with their size; an archive or JSONL file with its size on disk, and yields at most the bytes left.
    limit: int | None = pydantic.Field(default=None, gt=0)
    max_input_bytes: int | None = pydantic.Field(default=None, gt=0)

    @pydantic.field_validator("columns", mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in PRESETS:
            raise ValueError(f"unknown; known are {', '.join(PRESETS)}, or a mapping of fields to columns")
        return PRESETS[value]

    def unit_bytes_of(self, input_bytes: int) -> int:
        """Bytes per unit for inputs that take `input_bytes` in storage.

        By default a power of two, so that inputs that grow a little keep their units.
        """
        if self.unit_bytes is not None:
            return self.unit_bytes
        fitting = max(input_bytes // UNITS_OF_INPUT, 1)
        return min(max(1 << (fitting.bit_length() - 1), LEAST_UNIT_BYTES), MOST_UNIT_BYTES)

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
    """A file as it was read, not yet decoded unless it came from a table.

    `path` is relative to `source`, and `source` is the input as given. So a corpus that was moved gives the same rows
    if it is read by a relative path.
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
    """The kind of container that a name indicates."""

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
