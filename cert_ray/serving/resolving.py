"""Which library's models answer a request: by the name it gives, or by what its prompts import.

In: the request's `model`, the prompts, and the served names. Out: one of those names. Pure: nothing is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from cert_ray.errors import RequestError
from cert_ray.libraries import imported_libraries

# What begins a triple-quoted string, and what may hold those quotes without beginning one. Not the scanner of sketches:
# a front door reads prompts in its event loop, and these alternatives look at each character at most twice.
_QUOTES = re.compile(r"""("{3}|'{3})|"[^"\\\n]*+"|'[^'\\\n]*+'|\#[^\n]*+""")


def resolve(model: str, prompts: Sequence[str], served: Mapping[str, str | None], any_library: str = "cert") -> str:
    """The served name that answers. `served` maps names to their library, or to None for a model of no library.

    A served name answers for itself. `any_library` stands for the served library that the prompts use most. On a tie,
    and if none is used, the first in `served` answers. So list Pandas before NumPy: its users import both.

    Raises:
        RequestError: 404 for any other name.
    """
    if model in served:
        return model
    if model != any_library or not served:
        names = ", ".join(dict.fromkeys([*served, any_library]) if served else ["none"])
        problem = f"The model {model!r} does not exist here; this server has {names}."
        raise RequestError(404, problem, "model", "model_not_found")
    uses = sum((imported_libraries(_without_blocks(prompt)) for prompt in prompts), Counter[str]())
    return max(served, key=lambda name: uses[served[name] or ""])


def _without_blocks(prompt: str) -> str:
    """`prompt` without its triple-quoted strings, which are not code; also without one still open at the end."""
    parts: list[str] = []
    at = behind = 0
    while (match := _QUOTES.search(prompt, at)) is not None:
        at = match.end()
        if match[1]:
            end = prompt.find(match[1], at)
            at = len(prompt) if end < 0 else end + 3
            parts.append(prompt[behind : match.start()])
            behind = at
    return " ".join([*parts, prompt[behind:]])
