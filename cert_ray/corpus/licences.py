"""Which files may be used: compares an allow-list with the licences that repository and SPDX header state.

In: a raw document and SPDX ids (or expressions `ID WITH exception`). Out: the SPDX expression of the file's header, or
the drop. `license-expression` reads expressions. Of `OR`, one side must be allowed; of `AND`, both. An allowed id also
allows that licence with any exception, since exceptions only permit more. If repository and header both state a
licence, both must be allowed. Licence texts are not recognised: a file with neither statement is `licence_unknown`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any

import pydantic
from boolean import Expression
from license_expression import (
    AND,
    OR,
    ExpressionError,
    LicenseSymbol,
    LicenseWithExceptionSymbol,
    Licensing,
    get_spdx_licensing,
)

from cert_ray.corpus.inputs import RawDocument
from cert_ray.schemas import Dropped, DropReason

_HEAD = 4_096  # bytes or characters; assumed: SPDX asks for a line "at or near the top of the file"
_HEADER = r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9(][A-Za-z0-9(). +:/-]*)"
_TEXT_HEADER, _BYTES_HEADER = re.compile(_HEADER), re.compile(_HEADER.encode())
# Separators between several licences of one repository: "MIT, Apache-2.0", "['MIT', 'Apache-2.0']".
_SEPARATORS = re.compile(r"[\[\]'\",;|]+")
_AFFIXES = re.compile(r"^the\s+|\s+licen[cs]e$", re.IGNORECASE)


_IDS = LicenseSymbol | LicenseWithExceptionSymbol


def _known_ids(licences: tuple[str, ...] | None) -> tuple[str, ...] | None:
    unknown = [licence for licence in licences or () if not isinstance(_parse(licence), _IDS)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no SPDX licence id; such are MIT, Apache-2.0, GPL-3.0-only")
    return licences


# None allows every file, whatever its licence.
AllowedLicences = Annotated[tuple[str, ...] | None, pydantic.AfterValidator(_known_ids)]


def spdx_header(document: RawDocument) -> str | None:
    """The SPDX expression that the first lines of `document` state: in canonical form if known, else as written."""
    payload = document.payload
    if isinstance(payload, bytes):
        found = _BYTES_HEADER.search(payload, 0, _HEAD)
        stated = found[1].decode() if found else None
    else:
        match = _TEXT_HEADER.search(payload, 0, _HEAD)
        stated = match[1] if match else None
    if stated is None:
        return None
    expression = _parse(stated.strip())
    return stated.strip() if expression is None else str(expression)


def judge_licence(document: RawDocument, header: str | None, allowed: tuple[str, ...]) -> Dropped | None:
    """Why `document`, whose SPDX header is `header`, may not be used; None if it may."""
    stated = [licence for licence in (document.licence, header) if licence]
    if not stated:
        return Dropped(DropReason.LICENCE_UNKNOWN, "none stated")
    for licence in stated:
        expressions = _read(licence)
        if expressions is None:
            return Dropped(DropReason.LICENCE_UNKNOWN, licence)
        if not all(_allows(expression, _keys(allowed)) for expression in expressions):
            return Dropped(DropReason.LICENCE_NOT_ALLOWED, licence)
    return None


@lru_cache(maxsize=4_096)
def _read(stated: str) -> tuple[Expression, ...] | None:
    """The licences of a repository, all of which apply; None if any is unknown."""
    whole = _parse(stated)
    parts = [part.strip() for part in _SEPARATORS.split(stated)]
    expressions = [whole] if whole is not None else [_parse(part) for part in parts if part]
    return None if not expressions or None in expressions else tuple(expressions)


@lru_cache(maxsize=4_096)
def _parse(stated: str) -> Expression | None:
    """`stated` as an expression of known ids, in upper or lower case; "Apache 2.0" and "MIT License" work, too."""
    for text in (stated, "-".join(_AFFIXES.sub("", stated.strip()).split())):
        try:
            return _licensing().parse(text, validate=True)
        except ExpressionError:
            continue
    return None


@lru_cache(maxsize=1)
def _licensing() -> Licensing:
    return get_spdx_licensing()


@lru_cache(maxsize=64)
def _keys(allowed: tuple[str, ...]) -> frozenset[str]:
    return frozenset(str(_parse(licence)) for licence in allowed)


def _allows(expression: Any, allowed: frozenset[str]) -> bool:
    if isinstance(expression, OR):
        return any(_allows(part, allowed) for part in expression.args)
    if isinstance(expression, AND):
        return all(_allows(part, allowed) for part in expression.args)
    if isinstance(expression, LicenseWithExceptionSymbol):
        return str(expression) in allowed or expression.license_symbol.key in allowed
    return str(expression) in allowed
