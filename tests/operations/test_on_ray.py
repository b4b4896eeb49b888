"""Sessions of Ray: what processes of a private one are told."""

from __future__ import annotations

import io
import logging
import os

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


def test_processes_of_a_private_ray_know_its_address_where_another_runs_beside() -> None:
    import ray

    from cert_ray.operations import on_ray

    @ray.remote(runtime_env={"env_vars": {"RAY_ADDRESS": "192.0.2.9:1"}})
    def told() -> str | None:
        on_ray.know_own_cluster()
        return os.environ.get("RAY_ADDRESS")

    assert ray.get(told.remote()) == ray.get_runtime_context().gcs_address
