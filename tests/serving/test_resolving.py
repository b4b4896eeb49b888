"""Which library's models answer."""

from __future__ import annotations

import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.resolving import resolve

SERVED = {"cert-pandas": "pandas", "cert-numpy": "numpy", "plain": None}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("import pandas as pd\n", "cert-pandas"),
        ("import numpy as np\nx = np.zeros(", "cert-numpy"),
        ("from numpy.linalg import norm\n", "cert-numpy"),
        ("import os, numpy\n", "cert-numpy"),
        ("import numpy as np\nimport pandas as pd\n", "cert-pandas"),  # equals go by the order served
        ("import pandas as pd\nimport numpy as np\na = np.arange(5)\nb = np.ones(3)\nc = pd", "cert-numpy"),
        ("def f(:\n  import numpy as np", "cert-numpy"),  # it need not parse
        ("import torch\n", "cert-pandas"),
        ("# import numpy\n", "cert-pandas"),
        ("", "cert-pandas"),
    ],
)
def test_any_library_is_the_one_the_prompt_uses_most(prompt: str, name: str) -> None:
    assert resolve("cert", [prompt], SERVED) == name


def test_a_name_answers_for_itself() -> None:
    for name in SERVED:
        assert resolve(name, ["import numpy as np\n"], SERVED) == name


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(RequestError, match="cert-pandas, cert-numpy, plain, cert") as refused:
        resolve("gpt-4", [""], SERVED)
    assert (refused.value.status, refused.value.param) == (404, "model")
