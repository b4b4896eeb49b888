"""Sessions of Ray: what processes of a private one are told."""

from __future__ import annotations

import os

from tests.ray_marks import RAY_DATA

pytestmark = RAY_DATA


def test_processes_of_a_private_ray_know_its_address_where_another_runs_beside() -> None:
    import ray

    from cert_ray.operations import on_ray

    @ray.remote(runtime_env={"env_vars": {"RAY_ADDRESS": "192.0.2.9:1"}})
    def told() -> str | None:
        on_ray.know_own_cluster()
        return os.environ.get("RAY_ADDRESS")

    assert ray.get(told.remote()) == ray.get_runtime_context().gcs_address
