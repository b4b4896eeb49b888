"""The reason in the tracebacks of a failed process, nested as Ray and Serve nest them.

In: what Serve's status says of a deployment. Out: one line.
"""

from __future__ import annotations

import re
import textwrap

_RAISED = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception)(?:: |$)", re.MULTILINE)  # how a traceback's last line begins
_OURS = re.compile(r"^cert_ray\.errors\.\w+: ")  # its messages say enough
_REASON_CHARACTERS = 1_000


def reason_in(message: str) -> str:
    """The error at the end of a replica's tracebacks, on one line. Without a traceback, the message, shortened."""
    raised = list(_RAISED.finditer(message))
    reason = message[raised[-1].start() :] if raised else message
    return textwrap.shorten(_OURS.sub("", reason), _REASON_CHARACTERS, placeholder=" ...")
