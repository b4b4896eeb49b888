"""How every option group of cert-ray is declared: frozen, validated, without unknown fields.

In: keyword arguments or a YAML mapping. Out: a `Config` that can be written whole into a manifest.
Each stage declares its own subclass beside what it configures. "Off" is `None`, never a sentinel. A field that affects
only the cost of a result, not its bytes, is declared `Annotated[..., COST_ONLY]` and left out of digests.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, get_args, get_origin

import pydantic
import xxhash

from cert_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _CostOnly:
    """Marks a field that changes no byte of any result."""


COST_ONLY = _CostOnly()


class Config(pydantic.BaseModel):
    """Frozen options with validated values. Unknown names and numbers that are not finite are refused.

    A subclass that may be given a secret sets `hide_input_in_errors=True`: then no error shows its values.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str) -> Self:
        """Validate `options` read from `where` (a file or a verb, for the message).

        Raises:
            ConfigError: naming each field that cannot be used, the value received and what is allowed.
        """
        try:
            return cls.model_validate(dict(options))
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(error, cls, where)) from error

    def digest(self) -> str:
        """128-bit xxh3 of the canonical JSON of all options that decide the result: equal options, equal digests."""
        return str(xxhash.xxh3_128_hexdigest(self.model_dump_json(exclude=self._cost_only()).encode()))

    def decides_as(self, options: Mapping[str, Any], but: Iterable[str] = ()) -> bool:
        """Whether `options`, taken from a manifest, decide the same result as these; those in `but` may differ."""
        return not self.differing(options, but)

    def differing(self, options: Mapping[str, Any], but: Iterable[str] = ()) -> list[str]:
        """The dotted names of the options that decide the result and differ from `options`, taken from a manifest."""
        excluded = {**self._cost_only(), **dict.fromkeys(but, True)}
        return list(_differing(_without(options, excluded), self.model_dump(mode="json", exclude=excluded)))

    def _cost_only(self) -> dict[str, Any]:
        """The fields that change no bytes, nested ones included, in the form of pydantic's `exclude`."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if COST_ONLY in field.metadata:
                found[name] = True
            elif isinstance(value, Config) and (inner := value._cost_only()):
                found[name] = inner
        return found


def _without(options: Mapping[str, Any], excluded: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in options.items():
        inner = excluded.get(name)
        if inner is not True:
            kept[name] = _without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for name in {**one, **other}:
        mine, others = one.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(others, Mapping):
            yield from (f"{name}.{inner}" for inner in _differing(mine, others))
        elif mine != others or (name in one) != (name in other):
            yield name


_received = reprlib.Repr()  # shortens values: a recipe may hold anything, and one wrong value must not print it whole
_received.maxstring = _received.maxother = 200
_MEMBER = re.compile(r"<\w+\.\w+: ('\w+')>")  # a member of an enumeration, as a literal's error words it
_SHAPES = {  # in YAML's words
    "tuple_type": "should be a list, as [a, b]",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping of options",
    "too_short": "should hold at least {min_length}",
}


def _explain(error: pydantic.ValidationError, cls: type[Config], where: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = "".join(f"{part}." for part in problem["loc"]).removesuffix(".")
        kind = problem["type"]
        if kind == "extra_forbidden":
            known = _known_options(cls, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
            told = f"unknown option; {f'perhaps {near[0]} is meant; ' if near else ''}known are {', '.join(known)}"
        elif kind == "missing":
            told = "required, but not given"
        else:
            shape = _SHAPES.get(kind, "").format(**problem.get("ctx", {}))
            told = shape or _MEMBER.sub(r"\1", problem["msg"].removeprefix("Value error, "))
            of_a_whole = kind == "value_error" and isinstance(problem["input"], Mapping)  # its message names the parts
            if not of_a_whole and not cls.model_config.get("hide_input_in_errors"):
                told += f" (got {_received.repr(problem['input'])})"
        lines.append(f"{name}: {told}" if name else told)
    return f"{where}: " + "; ".join(lines)


def _known_options(cls: type[Config], path: Iterable[int | str]) -> list[str]:
    """The options that exist at `path` inside `cls`; numbers and keys of a mapping are skipped."""
    annotation: Any = cls
    for part in path:
        if get_origin(annotation) is dict:  # its keys may have the name of an option
            annotation = get_args(annotation)[1]
        else:
            annotation = _options_of(annotation).get(str(part), annotation)
    return sorted(_options_of(annotation))


def _options_of(annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return {name: found for inner in get_args(annotation) for name, found in _options_of(inner).items()}
