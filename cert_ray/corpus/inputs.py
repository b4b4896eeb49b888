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

Names = str | tuple[str, ...]

# Units for cores to share, each of seconds of work, so little is lost with one. Assumed: more units than a small
# machine has cores, none so small that starting it shows (a task of Ray's takes 5 ms), none so large that its end is
# waited for.
UNITS_OF_INPUT = 64
LEAST_UNIT_BYTES, MOST_UNIT_BYTES = 1 << 20, 32 << 20

# Names as they are found: The Stack's first version, its second, and others that people use.
_PATHS = ("max_stars_repo_path", "path")
_REPOSITORIES = ("max_stars_repo_name", "repo_name", "repository")
_STARS = ("max_stars_count", "star_events_count", "stars")
_LICENCES = ("max_stars_repo_licenses", "detected_licenses", "licenses", "license")


def _nested(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"metadata.{name}" for name in names)


class Columns(Config):
    """Where a Parquet or JSONL input keeps what we read: a column, `a.b` for a field inside one, or several names.

    Of several names the first that a row has counts. The defaults know the shapes of `PRESETS` apart by themselves.
    `content` and `path` must be there. The others may be missing unless you name a single column yourself; null means
    that the input has no such column. Without `path`, a row is called by its number, and nothing counts as a test file.
    """

    content: Names = ("content", "text")
    path: Names | None = (*_PATHS, *_nested(_PATHS), "id")
    repository: Names | None = (*_REPOSITORIES, *_nested(_REPOSITORIES))
    stars: Names | None = (*_STARS, *_nested(_STARS))
    licence: Names | None = (*_LICENCES, *_nested(_LICENCES))

    def required(self) -> dict[str, tuple[str, ...]]:
        """The fields that an input must have, with the names that they may have."""
        named = self.named()
        return {
            field: names
            for field, names in named.items()
            if field in ("content", "path") or (field in self.model_fields_set and len(names) == 1)
        }

    def named(self) -> dict[str, tuple[str, ...]]:
        """Names by field, without the fields that the input does not have."""
        fields = ((field, getattr(self, field)) for field in type(self).model_fields)
        return {field: (names,) if isinstance(names, str) else names for field, names in fields if names is not None}


# `columns: NAME` in a recipe. The sources: the dataset cards of The Stack and The Stack v2 (with their content filled
# in), datatrove's `Document` as its JSONL and Parquet writers put it down, dolma's document format.
PRESETS = {
    "auto": Columns(),
    "the-stack": Columns(content="content", path=_PATHS, repository=_REPOSITORIES, stars=_STARS, licence=_LICENCES),
    "datatrove": Columns(
        content="text",
        path=(*_nested(_PATHS), *_PATHS, "id"),  # without `metadata.` where its writer was told to expand metadata
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
    # Archives and tables found in a folder: True reads them, False leaves them closed, None reads them only where no
    # file of the folder matches `include` (a store of archives, as against a source tree with archives as test data).
    open_containers: bool | None = None
    columns: Columns = Columns()  # or one of PRESETS by its name
    max_file_bytes: int = pydantic.Field(default=1_000_000, gt=0)  # PAPER.md: files under 1 MB
    # Bytes of a work unit; None fits them to the inputs: `unit_bytes_of`.
    unit_bytes: int | None = pydantic.Field(default=None, gt=0)
    # Reading stops after so many files, or before the file that would make it more bytes. Loose files and row groups
    # count by their size; an archive or JSONL file by its size on disk, and gives at most the bytes that were left.
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
        """Bytes of the units of inputs of so many bytes in all, as they lie in storage.

        A power of two, so that inputs that grow a little keep their units.
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
