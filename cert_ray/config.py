"""How every option group of cert-ray is declared: frozen, validated, without unknown fields.

In: keyword arguments or a YAML mapping. Out: a `Config` that can be written whole into a manifest.
Each stage declares its own subclass beside what it configures. "Off" is `None`, never a sentinel. A field that decides
what a result costs and nothing about its bytes is declared `Annotated[..., COST_ONLY]`: no digest knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pydantic
import xxhash

from cert_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _CostOnly:
    """Marks a field that changes no byte of any result."""


COST_ONLY = _CostOnly()


class Config(pydantic.BaseModel):
    """Frozen options with validated values; unknown names are refused.

    One that may be given a secret is declared with `hide_input_in_errors=True`: no error shows its values.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

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
        """128-bit xxh3 of the canonical JSON of every option that decides the result: equal ones, equal digest."""
        return str(xxhash.xxh3_128_hexdigest(self.model_dump_json(exclude=self._cost_only()).encode()))

    def decides_as(self, options: Mapping[str, Any], but: Iterable[str] = ()) -> bool:
        """Whether `options`, as a manifest holds them, decide the same result as these; those in `but` may differ."""
        excluded = {**self._cost_only(), **dict.fromkeys(but, True)}
        return _without(options, excluded) == self.model_dump(mode="json", exclude=excluded)

    def _cost_only(self) -> dict[str, Any]:
        """The fields that change no bytes, also inside of others, as pydantic excludes them."""
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


def _explain(error: pydantic.ValidationError, cls: type[Config], where: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"]) or cls.__name__
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown option; known are {', '.join(sorted(cls.model_fields))}")
        elif problem["type"] == "missing":
            lines.append(f"{name}: required, but not given")
        else:
            got = "" if cls.model_config.get("hide_input_in_errors") else f" (got {problem['input']!r})"
            lines.append(f"{name}: {problem['msg']}{got}")
    return f"{where}: " + "; ".join(lines)
