"""What generated code can and cannot do: every attack is run, and must come to nothing."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cert_ray.errors import SandboxError
from cert_ray.evaluation import sandbox as sandbox_module
from cert_ray.evaluation.environments import current_environment
from cert_ray.evaluation.namespaces import NOBODY, ways
from cert_ray.evaluation.sandbox import Limits, Outcome, Sandbox, describe_isolation

LIMITS = Limits(
    cpu_time_s=1, wall_time_s=40, memory_bytes=512 << 20, processes=12, file_bytes=4 << 20, output_bytes=1 << 20
)

NOBODY_FOR_GOOD = (
    "import ctypes, os\nlibc, bounding_set_holds = ctypes.CDLL(None), 23\n"
    f"assert os.getresuid() == os.getresgid() == ({NOBODY},) * 3, (os.getresuid(), os.getresgid())\n"
    "held = [n for n in range(64) if libc.prctl(bounding_set_holds, n, 0, 0, 0) == 1]\nassert held == [], held"
)


@pytest.fixture(scope="module", params=["nested", "one program per sandbox", "network namespace from outside"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Both ways to keep programs apart, namespaces for each or a whole sandbox; and both to keep the network away."""
    with pytest.MonkeyPatch.context() as patched, Sandbox(current_environment(), LIMITS) as opened:
        if request.param == "one program per sandbox":
            opened._nested = False
        if request.param == "network namespace from outside":
            if len(ways()) == 1:
                pytest.skip("unshare is not installed")
            patched.setattr(sandbox_module, "find_way", lambda *_: ways()[1])
        yield opened


@pytest.mark.usefixtures("contained")
class TestVerdicts:
    def test_a_program_that_reaches_its_end_passes(self, sandbox: Sandbox) -> None:
        execution = sandbox.run("import math\nprint('seen', math.pi)\nassert math.pi > 3")
        assert execution.outcome is Outcome.PASSED
        assert execution.output.startswith("seen 3.14")

    @pytest.mark.parametrize(
        ("program", "detail"),
        [
            ("assert 1 == 2, 'not so'", "AssertionError: not so"),
            ("x = (", "SyntaxError"),
            ("import sys; sys.exit(0)", "SystemExit: 0"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt"),
            ("import os; os._exit(0)", "exited with status 0 before check() returned"),
            ("exit()", "SystemExit"),
            ("class E(BaseException):\n  def __str__(self): raise SystemExit\nraise E", "E"),
            ("print('\\x01passed', flush=True); import os; os.write(3, b'{\"outcome\": \"passed\"}'); os._exit(0)", ""),
            ("import os; os.write(3, b'\\x00setup failed'); os._exit(0)", "out of turn"),
            ("import os; os.close(3)\nassert False", ""),
            ("import atexit, os; atexit.register(os._exit, 0); assert False", "AssertionError"),
        ],
    )
    def test_leaving_early_or_writing_a_verdict_does_not_pass(
        self, sandbox: Sandbox, program: str, detail: str
    ) -> None:
        execution = sandbox.run(program)
        assert execution.outcome is Outcome.FAILED
        assert detail in execution.detail

    def test_code_meant_for_scripts_does_not_run(self, sandbox: Sandbox) -> None:
        assert sandbox.run("if __name__ == '__main__': raise SystemExit").outcome is Outcome.PASSED

    def test_text_that_utf8_cannot_hold_is_a_wrong_answer(self, sandbox: Sandbox) -> None:
        assert sandbox.run("x = '\ud800'").outcome is Outcome.FAILED
        assert sandbox.run("x = 1\0").outcome is Outcome.FAILED

    def test_dataclasses_and_pickles_find_their_module(self, sandbox: Sandbox) -> None:
        program = (
            "from __future__ import annotations\nimport dataclasses, pickle\n"
            "@dataclasses.dataclass\nclass A:\n  x: int\n"
            "assert pickle.loads(pickle.dumps(A(1))) == A(1)"
        )
        assert sandbox.run(program).outcome is Outcome.PASSED


@pytest.mark.usefixtures("contained")
class TestAttacks:
    def test_no_network_not_even_to_this_machine(self, sandbox: Sandbox) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            execution = sandbox.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
            assert execution.outcome is Outcome.FAILED
            server.settimeout(0)
            with pytest.raises(BlockingIOError):
                server.accept()

    def test_nothing_is_written_outside(self, sandbox: Sandbox, tmp_path: Path) -> None:
        target = tmp_path / "written"
        places = [str(target), "/etc/written", "/usr/written", "/dev/written", f"{sys.prefix}/written", "/written"]
        for place in places:
            program = f"import os; os.makedirs(os.path.dirname({place!r}), exist_ok=True); open({place!r}, 'w')"
            execution = sandbox.run(program)
            assert not Path(place).exists()
            if not place.startswith("/tmp"):  # which is the program's own, if it is there at all
                assert execution.outcome is Outcome.FAILED, place

    def test_secrets_of_this_process_are_not_seen(
        self, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("A_TOKEN", "hush-hush-1234")
        (tmp_path / "secret").write_text("hush-hush-1234")
        sandbox.close()  # so that the next process is started under this environment
        files = [str(tmp_path / "secret"), str(Path("~root/.bashrc").expanduser()), "/etc/shadow"]
        program = (
            f"import os, glob\nfound = str(dict(os.environ))\nfor name in glob.glob('/proc/*/environ') + {files!r}:\n"
            "    try: found += open(name, errors='replace').read()\n    except OSError: pass\n"
            "print(found)\nassert 'hush' not in found and 'root' not in found.replace('/root', '')"
        )
        execution = sandbox.run(program)
        assert execution.outcome is Outcome.PASSED, execution
        assert "A_TOKEN" not in execution.output

    def test_processes_are_limited(self, sandbox: Sandbox) -> None:
        program = "import os, time\nfor n in range(40):\n    if os.fork() == 0:\n        time.sleep(60)\n"
        execution = sandbox.run(program)
        assert (execution.outcome, execution.detail.split(":")[0]) == (Outcome.FAILED, "BlockingIOError")

    def test_memory_is_limited(self, sandbox: Sandbox) -> None:
        assert sandbox.run("x = bytearray(2 << 30)").outcome is Outcome.OUT_OF_MEMORY
        assert sandbox.run("x = []\nwhile True: x.append(bytearray(1 << 20))").outcome is Outcome.OUT_OF_MEMORY

    def test_files_are_limited(self, sandbox: Sandbox) -> None:
        assert sandbox.run("open('x', 'wb').write(b'x' * (64 << 20))").outcome is Outcome.FAILED
        many = "for n in range(64): open(f'x{n}', 'wb').write(b'x' * (1 << 20))"
        assert sandbox.run(many).outcome is Outcome.FAILED

    def test_endless_output_ends(self, sandbox: Sandbox) -> None:
        execution = sandbox.run("while True: print('x' * 1000)")
        assert execution.outcome is Outcome.TOO_MUCH_OUTPUT
        assert len(execution.output) <= 8192

    def test_a_loop_ends_by_cpu_time(self, sandbox: Sandbox) -> None:
        execution = sandbox.run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass")
        assert execution.outcome is Outcome.TIMED_OUT
        assert "CPU" in execution.detail

    @pytest.mark.parametrize("target", ["os.getppid()", "-1", "1", "0"])
    def test_killing_its_parents_does_not_pass_and_stops_nothing(self, sandbox: Sandbox, target: str) -> None:
        program = f"import os, signal, time\nos.kill({target}, signal.SIGKILL)\ntime.sleep(0.2)\nassert False"
        assert sandbox.run(program).outcome in (Outcome.FAILED, Outcome.KILLED)
        assert sandbox.run("pass").outcome is Outcome.PASSED

    def test_crashes_of_native_code_are_its_own(self, sandbox: Sandbox) -> None:
        assert sandbox.run("import ctypes; ctypes.string_at(0)").outcome is Outcome.KILLED
        assert sandbox.run("import os; os.abort()").outcome is Outcome.KILLED

    def test_one_program_leaves_nothing_for_the_next(self, sandbox: Sandbox) -> None:
        leave = (
            "import os, time\nfor place in ('/tmp/left', '/dev/shm/left', '/dev/left', 'left'):\n"
            "    try: open(place, 'w').write('x')\n    except OSError: pass\n"
            "import os.path; os.path.exists = lambda x: True\n"
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)\n"
        )
        assert sandbox.run(leave).outcome is Outcome.PASSED
        look = (
            "import os\nassert len('') == 0\n"
            "assert not any(map(os.path.exists, ('/tmp/left', '/dev/shm/left', '/dev/left', 'left')))\n"
            "assert all('sleep' not in open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit())"
        )
        execution = sandbox.run(look)
        assert execution.outcome is Outcome.PASSED, execution

    def test_no_capabilities_are_left(self, sandbox: Sandbox) -> None:
        for call in ("sethostname(b'x', 1)", "mount(b'x', b'/box', b'tmpfs', 0, None)", "umount2(b'/box', 2)"):
            program = f"import ctypes; assert ctypes.CDLL(None).{call} == 0"
            assert sandbox.run(program).outcome is Outcome.FAILED, call

    def test_programs_are_nobody_and_no_capability_can_be_gained(self, sandbox: Sandbox) -> None:
        execution = sandbox.run(NOBODY_FOR_GOOD)
        assert execution.outcome is Outcome.PASSED, execution


@pytest.mark.usefixtures("contained")
def test_so_they_are_where_unshare_made_the_user_namespace_as_for_users_below_gvisor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 1000)
        *_, way = ways()
    if not way.renames_root:
        pytest.skip("unshare is not installed")
    monkeypatch.setattr(sandbox_module, "find_way", lambda *_: way)
    with Sandbox(current_environment(), LIMITS) as sandbox:
        execution = sandbox.run(NOBODY_FOR_GOOD)
        assert execution.outcome is Outcome.PASSED, execution
        assert sandbox._nested


@pytest.mark.slow
@pytest.mark.usefixtures("contained")
@pytest.mark.parametrize("nested", [True, False])
def test_a_fork_bomb_ends(nested: bool) -> None:
    with Sandbox(current_environment(), LIMITS.model_copy(update={"wall_time_s": 1.0})) as sandbox:
        sandbox._nested = nested
        program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        assert sandbox.run(program).outcome in (Outcome.TIMED_OUT, Outcome.KILLED)
        assert sandbox.run("assert True").outcome is Outcome.PASSED


@pytest.mark.usefixtures("contained")
def test_a_sleep_ends_by_wall_time() -> None:
    with Sandbox(current_environment(), LIMITS.model_copy(update={"wall_time_s": 1.0})) as sandbox:
        execution = sandbox.run("import time\nwhile True:\n    try: time.sleep(1000)\n    except BaseException: pass")
    assert execution.outcome is Outcome.TIMED_OUT
    assert "still running" in execution.detail


@pytest.mark.usefixtures("contained")
def test_what_a_program_started_does_not_outlive_it() -> None:
    mark = f"600.{os.getpid()}"
    with Sandbox(current_environment(), LIMITS) as sandbox:
        program = f"import subprocess; subprocess.Popen(['sleep', '{mark}'], start_new_session=True)"
        assert sandbox.run(program).outcome is Outcome.PASSED
        assert _ended("sleep", mark)


@pytest.mark.usefixtures("contained")
def test_closing_ends_every_process() -> None:
    sandbox = Sandbox(current_environment(), LIMITS)
    sandbox.run("pass")
    assert sandbox._process is not None
    group = sandbox._process._process.pid
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@pytest.mark.usefixtures("contained")
def test_a_sandbox_killed_from_outside_is_started_again() -> None:
    with Sandbox(current_environment(), LIMITS) as sandbox:
        assert sandbox.run("pass").outcome is Outcome.PASSED
        assert sandbox._process is not None
        os.killpg(sandbox._process._process.pid, signal.SIGKILL)
        assert sandbox.run("assert 1").outcome is Outcome.PASSED


@pytest.mark.usefixtures("contained")
def test_an_environment_that_cannot_start_is_our_failure_not_a_wrong_answer() -> None:
    here = current_environment()
    broken = type(here)(here.python, here.python_version, here.readable, ("no_such_module",), ())
    with Sandbox(broken, LIMITS) as sandbox, pytest.raises(SandboxError, match="no_such_module") as caught:
        sandbox.run("pass")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_without_bubblewrap_it_refuses_with_both_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"apt-get install bubblewrap.*--unsafe"):
        Sandbox(current_environment())


@pytest.mark.parametrize("unsafe", [False, True])
def test_without_libseccomp_it_refuses_with_both_ways_out(monkeypatch: pytest.MonkeyPatch, unsafe: bool) -> None:
    monkeypatch.setattr(sandbox_module, "find_filter", lambda *, network: None)
    monkeypatch.setattr(sandbox_module, "find_bubblewrap", lambda: "/usr/bin/bwrap")
    with pytest.raises(SandboxError, match=r"apt-get install libseccomp2.*--unfiltered"):
        Sandbox(current_environment(), unsafe=unsafe)


def test_unfiltered_runs_without_libseccomp_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("NOT on a node without libseccomp2" in line for line in describe_isolation(unfiltered=True))
    monkeypatch.setattr(sandbox_module, "find_filter", lambda *, network: None)
    assert any("NO seccomp" in line for line in describe_isolation(unfiltered=True))
    with Sandbox(current_environment(), LIMITS, unsafe=True, unfiltered=True) as sandbox:
        assert sandbox.run("import os; os.close(os.memfd_create('x'))").outcome is Outcome.PASSED


def test_unsafe_still_limits_and_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "hush-hush-1234")
    mark = f"600.{os.getpid()}1"
    with Sandbox(current_environment(), LIMITS, unsafe=True) as sandbox:
        start = f"import subprocess; subprocess.Popen(['sleep', '{mark}'], start_new_session=True)"
        assert sandbox.run(start).outcome is Outcome.PASSED
        assert _ended("sleep", mark)
        assert sandbox.run("import os; assert 'A_TOKEN' not in os.environ").outcome is Outcome.PASSED
        assert sandbox.run("while True: pass").outcome is Outcome.TIMED_OUT
        assert sandbox.run("x = bytearray(2 << 30)").outcome is Outcome.OUT_OF_MEMORY
        assert sandbox.run("import os; os._exit(0)").outcome is Outcome.FAILED
        folder = sandbox.run("import os; open('x', 'w'); print(os.getcwd())").output.strip()
    assert folder
    assert not Path(folder).exists()


def test_the_description_names_limits_and_warns_when_unsafe() -> None:
    assert any("no network" in line for line in describe_isolation())
    assert describe_isolation(unsafe=True)[0].startswith("UNSAFE")
    assert set(sandbox_module.KNOWN_LIMITS) <= set(describe_isolation()) & set(describe_isolation(unsafe=True))


def _ended(*command: str) -> bool:
    """Whether no process is such a command any longer; one that was killed may take a moment to be gone."""

    def found() -> list[psutil.Process]:  # one that is dead and not yet buried has no command line
        return [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == [*command]]

    psutil.wait_procs(found(), timeout=10)
    return not found()
