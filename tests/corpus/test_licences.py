"""The allow-list judges what repository and header state."""

from __future__ import annotations

import pytest

from cert_ray.corpus.documents import DocumentsConfig
from cert_ray.corpus.inputs import RawDocument
from cert_ray.corpus.licences import judge_licence, spdx_header
from cert_ray.errors import ConfigError
from cert_ray.schemas import DropReason

PERMISSIVE = ("MIT", "apache-2.0", "BSD-3-Clause", "GPL-2.0 WITH Classpath-exception-2.0")


def judged(licence: str | None, header: str | None = None) -> DropReason | None:
    payload = f"# SPDX-License-Identifier: {header}\nx = 1\n" if header else "x = 1\n"
    document = RawDocument("a.py", "input", payload.encode(), licence=licence)
    dropped = judge_licence(document, spdx_header(document), PERMISSIVE)
    return dropped.reason if dropped else None


@pytest.mark.parametrize(
    ("licence", "header", "reason"),
    [
        ("MIT", None, None),
        ("mit", None, None),
        ("MIT License", None, None),
        ("Apache 2.0", None, None),
        (None, "MIT", None),
        ("MIT, Apache-2.0", None, None),
        ("['MIT', 'BSD-3-Clause']", None, None),
        ("MIT, GPL-3.0-only", None, DropReason.LICENCE_NOT_ALLOWED),  # all of a repository's licences hold
        ("GPL-3.0", None, DropReason.LICENCE_NOT_ALLOWED),
        ("MIT OR GPL-3.0", None, None),
        ("MIT AND GPL-3.0", None, DropReason.LICENCE_NOT_ALLOWED),
        ("(MIT OR GPL-3.0) AND Apache-2.0", None, None),
        ("Apache-2.0 WITH LLVM-exception", None, None),
        ("GPL-2.0 WITH Classpath-exception-2.0", None, None),
        ("GPL-2.0 WITH GCC-exception-2.0", None, DropReason.LICENCE_NOT_ALLOWED),
        ("MIT", "GPL-3.0-or-later", DropReason.LICENCE_NOT_ALLOWED),  # the file speaks for itself
        ("GPL-3.0", "MIT", DropReason.LICENCE_NOT_ALLOWED),
        ("MIT", "LicenseRef-Secret", DropReason.LICENCE_UNKNOWN),
        (None, None, DropReason.LICENCE_UNKNOWN),
        ("", None, DropReason.LICENCE_UNKNOWN),
        ("ask me", None, DropReason.LICENCE_UNKNOWN),
        ("MIT, ask me", None, DropReason.LICENCE_UNKNOWN),
        ("((", None, DropReason.LICENCE_UNKNOWN),
    ],
)
def test_every_stated_licence_must_be_allowed(
    licence: str | None, header: str | None, reason: DropReason | None
) -> None:
    assert judged(licence, header) == reason


@pytest.mark.parametrize(
    ("payload", "header"),
    [
        ("#!/bin/python\n# SPDX-License-Identifier: mit or gpl-2.0+\n", "MIT OR GPL-2.0-or-later"),
        ('"""Doc.\n\nSPDX-License-Identifier: Apache-2.0"""\n', "Apache-2.0"),
        ("# SPDX-License-Identifier: LicenseRef-Own\r\nx = 1\r\n", "LicenseRef-Own"),
        ("x = re.compile(r'SPDX-License-Identifier:\\s*(.*)')\n", None),
        ("x = 1\n" * 1_000 + "# SPDX-License-Identifier: MIT\n", None),
        ("# SPDX-License-Identifier:\n# MIT\n", None),
        ("", None),
    ],
)
def test_header_is_found_at_the_top_in_text_and_bytes(payload: str, header: str | None) -> None:
    assert spdx_header(RawDocument("a.py", "input", payload)) == header
    assert spdx_header(RawDocument("a.py", "input", payload.encode())) == header


def test_list_with_an_unknown_id_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"licences: .*Apache2.*no SPDX licence id.*Apache-2.0"):
        DocumentsConfig.from_mapping({"sources": {"inputs": ["x"]}, "licences": ["MIT", "Apache2"]}, "test")
