"""Every attack of the list is run, none may succeed, and each must fail for its own reason."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cert_ray.evaluation.environments import Environment, current_environment
from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.sandbox import Limits, Outcome, Sandbox
from cert_ray.evaluation.system_calls import find_filter
from tests.evaluation import attacks
from tests.evaluation.attacks import Attack

pytestmark = pytest.mark.usefixtures("contained")
LIMITS = Limits(
    cpu_time_s=1, wall_time_s=30, memory_bytes=1 << 30, processes=12, file_bytes=4 << 20, output_bytes=1 << 18
)
WALLS = [*attacks.NETWORK, *attacks.READING, *attacks.WRITING, *attacks.RESOURCES, *attacks.PROCESSES]


@pytest.fixture(scope="module")
def environment() -> Environment:
    return dataclasses.replace(current_environment(), preload=("numpy", "pandas"))


@pytest.fixture(scope="module")
def sandbox(environment: Environment) -> Iterator[Sandbox]:
    os.environ["A_TOKEN"] = "hush-hush-1234"
    try:
        with Sandbox(environment, LIMITS) as opened:
            yield opened
    finally:
        del os.environ["A_TOKEN"]


@dataclasses.dataclass
class Outside:
    """What attacks aim at, on this machine."""

    tcp: socket.socket
    abstract: socket.socket
    secret: Path

    def aimed(self, program: Program) -> Program:
        code = program.code.replace("{port}", str(self.tcp.getsockname()[1])).replace("{secret}", str(self.secret))
        code = code.replace("{home}", str(Path.home()))
        return dataclasses.replace(
            program, code=code.replace("{abstract}", str(self.abstract.getsockname()[1:], "ascii"))
        )

    def untouched(self) -> bool:
        """Whether nobody connected, and nothing was written."""
        for server in (self.tcp, self.abstract):
            with contextlib.suppress(BlockingIOError):
                server.accept()
                return False
        written = ["/etc/written", "/usr/bin/written", "/dev/written", "/written", "/usr/bin/env2", "/sys/fs/cgroup/x"]
        return self.secret.read_text() == "hush-hush-1234" and not any(map(os.path.exists, written))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("hush-hush-1234")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0cert-ray-{os.getpid()}")
        abstract.listen()
        for server in (tcp, abstract):
            server.setblocking(False)
        yield Outside(tcp, abstract, secret)


def run(sandbox: Sandbox, attack: Attack, program: Program) -> None:
    execution = sandbox.run(program)
    assert execution.outcome.value == attack.outcome, execution
    assert re.search(attack.said, execution.detail), execution


@pytest.mark.parametrize("attack", WALLS, ids=lambda attack: attack.name)
def test_walls_hold(sandbox: Sandbox, outside: Outside, attack: Attack) -> None:
    if attack.name.startswith("call ") and (platform.machine() != "x86_64" or find_filter(network=True) is None):
        pytest.skip("needs x86-64's numbers of system calls, and libseccomp")
    run(sandbox, attack, outside.aimed(attack.program))
    assert outside.untouched()


@pytest.mark.parametrize("attack", attacks.FAKE_PASSES, ids=lambda attack: attack.name)
def test_fake_passes_fail(sandbox: Sandbox, attack: Attack) -> None:
    run(sandbox, attack, attack.program)


def test_the_sandbox_still_works_after_all_of_them(sandbox: Sandbox) -> None:
    assert sandbox.run(Program("import numpy as np\nx = np.ones(3)", "assert np.allclose(x, 1)")).outcome == "passed"


def test_there_are_more_than_sixty() -> None:
    assert len(WALLS) + len(attacks.FAKE_PASSES) >= 60
    assert len({attack.name for attack in WALLS}) + len({attack.name for attack in attacks.FAKE_PASSES}) > 60


HONEST = [
    "sum = 6\nresult = 1",  # a builtin's name for a value
    "import collections\nP = collections.namedtuple('P', 'x y', defaults=[1])\nresult = P(1).y",
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\nresult = A().x",
    "import functools\n@functools.wraps(len)\ndef g(x): return 1\nresult = g(0)",
    "import warnings, math, random, re\nwarnings.simplefilter('ignore')\nrandom.seed(1)\nresult = 1",
    "pd.set_option('display.width', 80)\nnp.random.seed(0)\nnp.set_printoptions(precision=2)\nresult = 1",
    "@pd.api.extensions.register_dataframe_accessor('mine')\nclass Mine:\n    def __init__(self, o): pass\nresult = 1",
    "import concurrent.futures as c\nwith c.ThreadPoolExecutor(2) as p: result = p.submit(int, '1').result()",
    "import subprocess\nresult = len(subprocess.check_output(['echo']))",
    "import multiprocessing\nwith multiprocessing.get_context('fork').Pool(2) as p: result = sum(p.map(int, '1'))",
    "import asyncio\nasync def g(): return 1\nresult = asyncio.run(g())",
    "import socket\na, b = socket.socketpair()\na.send(b'1')\nresult = int(b.recv(1))",
    "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as s: result = s.write('1')",
    "import pandas.plotting, numpy.linalg, numpy.fft, numpy.polynomial\nresult = 1",
]


@pytest.mark.parametrize("code", HONEST)
def test_honest_programs_are_not_taken_for_attacks(sandbox: Sandbox, code: str) -> None:
    program = Program("import numpy as np\nimport pandas as pd\n" + code, attacks._TYPES, None, (("np", "numpy"),))
    execution = sandbox.run(program)
    assert execution.outcome is Outcome.PASSED, execution


def test_a_renamed_library_is_the_library_behind_it(sandbox: Sandbox) -> None:
    code = "import monkey as mk\nfrom monkey.testing import assert_frame_equal\nresult = mk.DataFrame({'a': [1]})"
    test = "import pandas\nassert mk is pandas\nassert_frame_equal(result, pandas.DataFrame({'a': [1]}))"
    renamed, aliases = (("monkey", "pandas"),), (("mk", "pandas"),)
    assert sandbox.run(Program(code, test, aliases=aliases, renamed=renamed)).outcome is Outcome.PASSED
    assert sandbox.run(Program(code, test)).outcome is Outcome.FAILED


def test_without_counted_changes_attributes_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.evaluation import sandbox_guard

    monkeypatch.setattr(sandbox_guard, "_COUNTED", False)
    guard = sandbox_guard.Guard(["json"])
    assert guard.changed({}) is None
    monkeypatch.setattr("operator.eq", lambda a, b: True)
    assert guard.changed({}) == "operator.eq"


def test_the_interpreter_here_counts_changes() -> None:
    from cert_ray.evaluation import sandbox_guard

    assert sandbox_guard._counts_changes()  # else the fast comparison is gone: see how the new version does it
