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
        ("import pandas as pd\nfrom numpy import array, ones as o\nx = array([1])\npd.f(o(2))\n", "cert-numpy"),
        ('def f():\n    """>>> import numpy as np\n    >>> np.ones(2)"""\n    import pandas\n', "cert-pandas"),
        ("import pandas as pd\nX = rb'''\nimport numpy as np\nnp.a\n'''\n", "cert-pandas"),
        ('import numpy as np\ndef f(x):\n    """\n    import pandas\n    pandas.x', "cert-numpy"),  # ends in a string
        ("x = '#'; y = \"'''\"  # \"\"\"\nimport numpy as np\n", "cert-numpy"),
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
    with pytest.raises(RequestError, match=r"this server has cert\."):
        resolve("gpt-4", [""], {"cert": None})


@pytest.mark.parametrize(
    "text", ["'\\\"", '"' * 3, "'", "from a import (b, ", "x.x(", "from a import b\nb(1)\n", 'f"{']
)
def test_a_megabyte_of_anything_is_read_once(text: str) -> None:
    """Read again from each of its quotes, it would take an hour; a front door reads prompts in its event loop."""
    assert resolve("cert", [text * (1_000_000 // len(text))], SERVED) == "cert-pandas"
