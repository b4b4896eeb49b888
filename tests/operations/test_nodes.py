"""`cert-ray doctor --cluster`: nodes that run other code, lack room or do not answer are named."""

from __future__ import annotations

import pytest

from cert_ray.errors import ConfigError
from cert_ray.evaluation import sandbox
from cert_ray.evaluation.sandbox import missing_protection
from cert_ray.operations.doctor import Level
from cert_ray.operations.nodes import (
    NodeFacts,
    facts_of_this_node,
    judge_nodes,
    refuse_other_versions,
    tell_unprotected,
    versions_here,
)

GIB = 1 << 30
HERE = {"python": "3.11.7", "ray": "2.60.0", "cert-ray": "0.1.0"}
SOUND = NodeFacts("10.0.0.1", 8, 0, HERE, memory_bytes=32 * GIB, disk_free_bytes=100 * GIB)


def levels(node: NodeFacts) -> list[Level]:
    return [finding.level for finding in judge_nodes([node], HERE)]


def test_a_sound_node_is_one_line() -> None:
    (finding,) = judge_nodes([SOUND], HERE)
    assert finding.level == Level.OK
    assert finding.found == "8 CPUs, 0 GPUs, 32 GiB memory"


@pytest.mark.parametrize("part", HERE)
def test_another_version_fails_and_is_named(part: str) -> None:
    other = SOUND.answered({"versions": {**HERE, part: "9.9"}})
    _, finding = judge_nodes([other], HERE)
    assert finding.level == Level.FAIL
    assert finding.found == f"{part} 9.9, this process has {HERE[part]}"
    assert "10.0.0.1" in finding.name


@pytest.mark.parametrize("part", HERE)
def test_a_run_is_refused_where_a_node_runs_another_version(part: str) -> None:
    other = SOUND.answered({"address": "10.0.0.9", "versions": {**HERE, part: "9.9"}})
    with pytest.raises(ConfigError, match=rf"^node 10.0.0.9 has {part} 9.9, this process has {HERE[part]}\."):
        refuse_other_versions([SOUND, other], HERE)


def test_a_silent_node_keeps_no_run_from_starting_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    refuse_other_versions([SOUND, SOUND.silent("no answer within 30 s")], HERE)
    (warning,) = caplog.records
    assert warning.getMessage() == "node 10.0.0.1 could not be checked: no answer within 30 s"


def test_a_run_is_refused_where_a_node_answers_with_an_error() -> None:
    bare = SOUND.failed("ModuleNotFoundError: No module named 'cert_ray'")
    with pytest.raises(ConfigError, match=r"^node 10.0.0.1 cannot run cert-ray: ModuleNotFoundError: .*one image"):
        refuse_other_versions([SOUND, bare], HERE)


def test_little_room_is_a_warning_that_says_what_to_change() -> None:
    small = SOUND.answered({"memory_bytes": 6 * GIB, "disk_free_bytes": GIB})
    _, memory, disk = judge_nodes([small], HERE)
    assert (memory.level, disk.level) == (Level.WARN, Level.WARN)
    assert "--num-cpus=4" in memory.advice


@pytest.mark.parametrize(
    ("missing", "told"), [("bubblewrap", "--unsafe"), ("libseccomp2", "--unfiltered")], ids=lambda value: value
)
def test_a_node_that_cannot_contain_generated_code_is_named(missing: str, told: str) -> None:
    bare = SOUND.answered({"missing_protection": (missing,)})
    _, finding = judge_nodes([bare], HERE)
    assert finding.level == Level.WARN
    assert "10.0.0.1" in finding.name
    assert missing in finding.found
    assert f"apt-get install {missing}" in finding.advice
    assert told in finding.advice


def test_a_node_on_which_no_sandbox_starts_is_named_unless_no_task_would_run_there() -> None:
    said = {"sandbox_failure": "bwrap: Can't mount proc"}
    _, finding = judge_nodes([SOUND.answered(said)], HERE)
    assert (finding.level, finding.found) == (
        Level.WARN,
        "no sandbox for generated code: bwrap: Can't mount proc",
    )
    assert "systempaths=unconfined" in finding.advice
    assert levels(SOUND.answered({**said, "cpus": 0})) == [Level.OK]


def test_nodes_without_protection_are_one_line_for_each_kind() -> None:
    failing = [SOUND.answered({"address": f"10.0.0.{n}", "sandbox_failure": "no namespaces"}) for n in range(2, 7)]
    bare = SOUND.answered({"address": "10.0.1.1", "gpus": 1, "missing_protection": ("bubblewrap", "libseccomp2")})
    head = bare.answered({"cpus": 0})
    several, one = tell_unprotected([SOUND, *failing, bare, head], unsafe=False, unfiltered=False)
    assert "5 node(s) of 8 CPUs and 0 GPUs (10.0.0.2, 10.0.0.3, 10.0.0.4, ...): no namespaces. " in several
    assert "1 node(s) of 8 CPUs and 1 GPUs (10.0.1.1): without bubblewrap and libseccomp2. apt-get" in one
    (one,) = tell_unprotected([*failing, bare], unsafe=True, unfiltered=False)
    assert "without libseccomp2. " in one
    assert tell_unprotected(failing, unsafe=True, unfiltered=True) == []


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize(
    ("missing", "cure"), [("libseccomp2", "apt-get install libseccomp2"), ("pyseccomp", "pip install pyseccomp")]
)
def test_nodes_that_run_generated_code_without_a_filter_are_named(missing: str, cure: str, unsafe: bool) -> None:
    bare = SOUND.answered({"address": "10.0.1.1", "missing_protection": (missing,)})
    head = bare.answered({"cpus": 0})
    (line,) = tell_unprotected([SOUND, bare, head], unsafe=unsafe, unfiltered=True)
    assert line == (
        "generated code will run, and no system call is refused, on 1 node(s) of 8 CPUs and 0 GPUs (10.0.1.1): "
        f"--unfiltered, without {missing}. {cure}, and leave --unfiltered out."
    )


def test_a_node_without_a_filter_on_which_no_sandbox_starts_runs_nothing_and_is_one_line() -> None:
    bare = SOUND.answered({"missing_protection": ("libseccomp2",), "sandbox_failure": "no namespaces"})
    (line,) = tell_unprotected([bare], unsafe=False, unfiltered=True)
    assert line.startswith("generated code will not run on 1 node(s)")


def test_of_nodes_that_did_not_say_it_is_told_that_nothing_is_known() -> None:
    silent, old = SOUND.silent("no answer within 30 s"), SOUND.failed("TypeError: one argument too many")
    head = NodeFacts("10.0.0.9", 0, 0).silent("no answer within 30 s")
    waiting, failed = tell_unprotected([silent, old, head], unsafe=False, unfiltered=False)
    assert waiting == (
        "it is not known whether generated code will run on 1 node(s) of 8 CPUs and 0 GPUs (10.0.0.1): "
        "no answer within 30 s"
    )
    assert failed.endswith("(10.0.0.1): TypeError: one argument too many")


def test_an_evaluation_warns_of_nodes_on_which_a_sandbox_was_tried_in_vain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cert_ray.operations import on_ray

    tried = []

    def asked(timeout_s: float, try_sandbox: bool) -> list[NodeFacts]:
        tried.append(try_sandbox)
        return [SOUND, SOUND.answered({"sandbox_failure": "no namespaces" if try_sandbox else None})]

    monkeypatch.setattr(on_ray, "ask_nodes", asked)
    on_ray.warn_of_unprotected_nodes(unsafe=False, unfiltered=False)
    (warning,) = caplog.records
    assert "1 node(s) of 8 CPUs and 0 GPUs (10.0.0.1): no namespaces. " in warning.getMessage()
    on_ray.warn_of_unprotected_nodes(unsafe=True, unfiltered=False)
    assert tried == [True, False]


def test_a_node_without_facts_fails_alone() -> None:
    assert levels(SOUND.silent("no answer within 60 s")) == [Level.FAIL]
    assert levels(SOUND.failed("No module named 'cert_ray'")) == [Level.FAIL]


@pytest.mark.ray
def test_every_node_of_a_cluster_is_asked(ray_cluster: None) -> None:
    from cert_ray.operations.on_ray import ask_nodes

    (node,) = ask_nodes(try_sandbox=True)
    assert (node.silence, node.error) == (None, None)
    assert node.versions == versions_here()
    assert node.cpus == 4
    assert node.memory_bytes > 0
    assert node.missing_protection == missing_protection()
    if "bubblewrap" not in node.missing_protection:
        assert node.sandbox_failure == sandbox.why_no_sandbox(unfiltered=bool(node.missing_protection))


@pytest.mark.ray
def test_a_node_on_which_asking_raises_has_answered(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.operations import on_ray

    def without_cert_ray() -> None:  # without an argument, as older nodes' own
        raise ModuleNotFoundError("No module named 'cert_ray'")

    monkeypatch.setattr(on_ray, "facts_of_this_node", without_cert_ray)
    (node,) = on_ray.ask_nodes()
    assert node.silence is None
    assert node.error == "ModuleNotFoundError: No module named 'cert_ray'"


def test_a_filter_that_cannot_be_made_is_no_reason_to_refuse_a_node_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room() -> tuple[str, ...]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sandbox, "missing_protection", no_room)
    assert facts_of_this_node()["missing_protection"] == ("libseccomp2",)
