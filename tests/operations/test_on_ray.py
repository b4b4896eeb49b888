"""Sessions of Ray: what processes of a private one are told."""

from __future__ import annotations

import io
import logging
import os
import threading

import pytest

from tests.ray_marks import RAY_DATA

pytestmark = RAY_DATA


class _AskedError(Exception):
    """Ray is not started here."""


def test_a_private_ray_tells_its_processes_so_when_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.operations import on_ray

    asked = []

    def init(**options: object) -> None:
        asked.append(options)
        raise _AskedError

    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(on_ray.ray, "init", init)
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")  # which it sets
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(_AskedError), on_ray.ray_session():
        pass
    (options,) = asked
    assert options["address"] == "local"
    assert options["runtime_env"]["worker_process_setup_hook"] is on_ray.know_own_cluster
    assert options["runtime_env"]["env_vars"]["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "1"


def test_a_private_ray_does_not_tell_of_the_token_that_it_is_meant_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication import authentication_token_setup as setup

    from cert_ray.operations import on_ray

    shown = io.StringIO()
    theirs = logging.getLogger("ray")

    def init(**_: object) -> None:
        setup._warn_token_auth_enabled()
        setup._warn_token_auth_disabled()
        setup.logger.warning("Token authentication is enabled but no token was found. Requests will fail.")
        raise _AskedError

    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(on_ray.ray, "init", init)
    monkeypatch.setattr(theirs, "handlers", [logging.StreamHandler(shown)])
    monkeypatch.setattr(setup.logger, "disabled", False)
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(_AskedError), on_ray.ray_session():
        pass
    disabled, missing = shown.getvalue().splitlines()
    assert disabled.startswith("Token authentication is disabled")
    assert missing.startswith("Token authentication is enabled but no token")


def test_a_private_ray_that_is_not_up_in_time_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.errors import ClusterError
    from cert_ray.operations import on_ray

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: False)
    ended: list[bool] = []
    monkeypatch.setattr(on_ray.ray, "init", init)
    monkeypatch.setattr(on_ray.ray, "shutdown", lambda: ended.append(True))  # the suite's Ray goes on
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"did not start in time.*run the same command again"), on_ray.ray_session():
        pass
    assert ended


@pytest.fixture
def a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody listens at every address, and Ray is not up here."""
    from cert_ray.operations import on_ray

    monkeypatch.setattr(on_ray, "wait_for_listener", lambda *_: None)
    monkeypatch.setattr(on_ray, "ensure_token_if_auth_enabled", lambda **_: None)
    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(on_ray.ray, "shutdown", lambda: None)


def why_not_joined(address: str = "10.0.0.1:6379", patience_s: float = 60) -> str:
    from cert_ray.errors import ClusterError
    from cert_ray.operations import on_ray

    with pytest.raises(ClusterError) as caught, on_ray.ray_session(address, patience_s=patience_s):
        pytest.fail("joined")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_token_is_told_without_trying_to_join(a_head: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from cert_ray.operations import on_ray

    def refuse(address: str) -> None:
        raise ray.exceptions.AuthenticationError("RPC error: InvalidAuthToken")

    monkeypatch.setattr(on_ray, "GcsClient", refuse)
    monkeypatch.setattr(on_ray.ray, "init", lambda **_: pytest.fail("tried"))
    assert why_not_joined().startswith("the Ray cluster at 10.0.0.1:6379: it does not accept this process' token")
    assert "RAY_AUTH_MODE=token" in why_not_joined()


def test_no_token_where_one_is_wanted_is_told_before_rays_client_would_abort(
    a_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from cert_ray.operations import on_ray

    def refuse(create_token_if_missing: bool) -> None:
        assert not create_token_if_missing
        raise ray.exceptions.AuthenticationError("no authentication token was found")

    monkeypatch.setattr(on_ray, "ensure_token_if_auth_enabled", refuse)
    monkeypatch.setattr(on_ray, "GcsClient", lambda **_: pytest.fail("tried"))
    assert "or there is none here. Set RAY_AUTH_MODE=token" in why_not_joined()


def test_what_listens_and_is_no_head_is_given_up(a_head: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.operations import on_ray

    ended = threading.Event()
    monkeypatch.setattr(on_ray, "GcsClient", lambda address: ended.wait(60))
    told = why_not_joined(patience_s=0.01)
    ended.set()
    assert "does not answer as a head of Ray" in told
    assert "the dashboard's is 8265" in told


# Ray 2.60's own words, to a cluster whose version was changed in its GCS.
OTHER = """Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.11.7
This process on node 192.0.2.2 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


def test_a_cluster_of_another_version_is_one_line_with_both(a_head: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.operations import on_ray

    def init(**_: object) -> None:
        raise RuntimeError(OTHER)

    monkeypatch.setattr(on_ray, "GcsClient", lambda address: None)
    monkeypatch.setattr(on_ray.ray, "init", init)
    told = why_not_joined()
    assert "started with: Ray: 2.59.0 Python: 3.11.7 This process" in told
    assert told.endswith(
        "Use the cluster's image, or install its versions here: `ray[default]==VERSION` in the same Python."
    )


def test_no_cluster_on_this_machine_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from cert_ray.operations import on_ray

    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(on_ray, "canonicalize_bootstrap_address", lambda address: None)
    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(on_ray.ray, "shutdown", lambda: None)
    monkeypatch.setattr(on_ray.ray, "init", init)
    assert "Start one with `ray start --head`" in why_not_joined("auto")

    def nothing(address: str) -> None:
        init()

    monkeypatch.setattr(on_ray, "canonicalize_bootstrap_address", nothing)
    assert "no Ray runs on this machine. Start one with `ray start --head`" in why_not_joined("auto")


def test_processes_of_a_private_ray_know_its_address_where_another_runs_beside() -> None:
    import ray

    from cert_ray.operations import on_ray

    @ray.remote(runtime_env={"env_vars": {"RAY_ADDRESS": "192.0.2.9:1"}})
    def told() -> str | None:
        on_ray.know_own_cluster()
        return os.environ.get("RAY_ADDRESS")

    assert ray.get(told.remote()) == ray.get_runtime_context().gcs_address
