"""Which library's models answer a request: by the name that it gives, or by what its prompts import.

In: the request's `model`, the prompts, and the names that are served. Out: one of the names. Pure: nothing is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cert_ray.errors import RequestError
from cert_ray.libraries import imported_libraries


def resolve(model: str, prompts: Sequence[str], served: Mapping[str, str | None], any_library: str = "cert") -> str:
    """The served name that answers. `served` maps names to their library, or to None for a model of no library.

    A served name answers for itself. `any_library` stands for the served library that the prompts use most; among
    equals, and where none is used, the first in `served` answers. So list Pandas before NumPy: its users import both.

    Raises:
        RequestError: 404 for any other name.
    """
    if model in served:
        return model
    if model != any_library or not served:
        names = ", ".join([*served, any_library] if served else ["none"])
        problem = f"The model {model!r} does not exist here; this server has {names}."
        raise RequestError(404, problem, "model", "model_not_found")
    uses = sum((imported_libraries(prompt) for prompt in prompts), Counter[str]())
    return max(served, key=lambda name: uses[served[name] or ""])
